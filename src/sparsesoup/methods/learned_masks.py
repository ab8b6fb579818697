"""Learned masks: gates on the weights, trained with them, trimmed to the sparsity asked for, and fixed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import CoupledGroups, Element
from sparsesoup.core.masking import check_sparsity, topk_masks
from sparsesoup.core.schedules import CubicSchedule
from sparsesoup.core.targets import target_parameters
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods.gates.attach import (
    Make,
    attach_biases,
    attach_gates,
    detach_gates_,
    fold_gates_,
    weight_scores,
    zero_biases_,
)
from sparsesoup.methods.gates.density import group_sizes, masked_share, set_thresholds_
from sparsesoup.methods.gates.straight_through import StraightThroughGate
from sparsesoup.training.loop import Hook, train
from sparsesoup.training.problem import Problem, require_schedule_fits
from sparsesoup.training.state import TrainState

LearnedScope = Literal["tensor", "global"]


@dataclass(frozen=True, kw_only=True)
class PhaseShares:
    """When learned masks become sparser: not yet, on a cubic curve, no more, and at last fixed.

    Args:
        warmup: share of T before the first weight is masked; scores are learnt all the while.
        cooldown: share of T at the end in which the sparsity is constant.
        settle: share of T, the end of the cool-down, in which the masks are trimmed to exactly the sparsity and fixed.
    """

    warmup: float = 0.1
    cooldown: float = 0.3
    settle: float = 0.1

    def __post_init__(self) -> None:
        if not (0.0 <= self.warmup < 1.0 and 0.0 < self.settle <= self.cooldown):
            raise UserError(f"phases need warmup in [0, 1) and 0 < settle <= cooldown, got {self}")
        if self.warmup + self.cooldown >= 1.0:
            raise UserError(
                f"warmup {self.warmup:g} and cooldown {self.cooldown:g} leave no step to prune in; their sum must be "
                f"below 1"
            )

    def pruning_schedule(self, total: int) -> CubicSchedule:
        """The sparsity at each of `total` steps."""
        return CubicSchedule(round(self.warmup * total), round((1 - self.cooldown) * total))

    def check_settled(self, total: int) -> int:
        """Steps with fixed masks."""
        return max(1, round(self.settle * total))

    def pruning_end(self, total: int) -> int:
        """The step from which the masks are fixed."""
        return total - self.check_settled(total)

    def fits_steps(self, total: int) -> bool:
        """Whether `total` steps have one for each phase."""
        plan = self.pruning_schedule(total)
        return total >= 4 and plan.start < plan.stop <= self.pruning_end(total)


@dataclass(frozen=True)
class GateSetup:
    """What is masked together, by which gates, and how they learn."""

    ties: tuple[CoupledGroups, ...]
    make: Make
    score_rate: float
    scope: LearnedScope = "global"
    penalty: Callable[[TrainState], Tensor] | None = None
    way: float = 0.0  # how far a score has to fall before its gate closes
    biases: bool = False  # the bias of a row that is masked whole goes with it
    floor: float = 0.0  # share of every tie's groups that stays whatever their scores


def train_gates(problem: Problem, sparsity: float, phases: PhaseShares, gated: GateSetup, hook: Hook) -> Ticket:
    """The ticket of learned masks, after T steps."""
    return problem.finish_run(train_gates_state(problem, sparsity, phases, gated, hook))


def train_gates_state(
    problem: Problem, sparsity: float, phases: PhaseShares, gated: GateSetup, hook: Hook
) -> TrainState:
    """Learn masks with weights, trim them to exactly the sparsity, and train on with them fixed: T steps in all."""
    check_sparsity(sparsity)
    if gated.floor > 1 - sparsity:
        raise UserError(
            f"a floor of {gated.floor:g} of every matrix leaves no sparsity of {sparsity:g}; it is at most "
            f"{1 - sparsity:.3g} here"
        )
    why = f"a warm-up of {phases.warmup:g} T and a cool-down of {phases.cooldown:g} T"
    require_schedule_fits(problem, phases.fits_steps, why)
    settled = phases.check_settled(problem.steps)
    _check_scores_can_close(problem, phases, gated)
    state = start_with_gates(problem, gated)
    problem.journal.run_stage("search", state, train_scores, state, problem, problem.steps - settled, hook, gated)
    problem.journal.run_stage("trim", state, _trim_to_sparsity, state, problem, sparsity, gated)
    detach_gates_(state)  # between pieces: a restart meets the model as the next piece left it
    problem.journal.run_stage("settle", state, _train_with_fixed_masks, state, problem, settled, gated)
    return state


def _check_scores_can_close(problem: Problem, phases: PhaseShares, gated: GateSetup) -> None:
    """UserError if no score can fall far enough in time: an optimizer moves it by its learning rate a step at most."""
    start, stop = phases.pruning_schedule(problem.steps).start, phases.pruning_end(problem.steps)
    rate = rate_of_scores(problem, gated.score_rate)
    longest = sum(rate(step) for step in range(start, stop))
    if gated.way and longest < gated.way:
        raise UserError(
            f"scores can fall by {longest:.2f} in {problem.steps} steps at a rate of {gated.score_rate:g}, and must by "
            f"{gated.way:.2f} before a gate closes; raise --method.score-rate above "
            f"{gated.score_rate * gated.way / max(longest, 1e-9):.2g}, or --steps"
        )


def start_with_gates(problem: Problem, gated: GateSetup) -> TrainState:
    """A run at its beginning, its gates on."""
    peak = problem.training.learning_rate
    if gated.score_rate and not peak:
        raise UserError("scores learn in proportion to the weights; train.learning_rate must be above 0, got 0")

    def put_on(model: nn.Module) -> tuple[list[Parameter], float]:
        learnt = attach_gates(model, gated.ties, gated.make)
        if gated.biases:
            attach_biases(model, problem.targets)
        return learnt, gated.score_rate / (peak or 1.0)

    return problem.start_run(put_on)


def train_scores(state: TrainState, problem: Problem, steps: int, hook: Hook, gated: GateSetup) -> None:
    """Train weights and scores; what is due at step 0 comes before."""
    if state.step == 0:
        hook(state)
    train(state, problem, steps, hooks=[hook], penalty=gated.penalty)


def _trim_to_sparsity(state: TrainState, problem: Problem, sparsity: float, gated: GateSetup) -> None:
    """Fix the masks at exactly the sparsity, by the gates' own ranking; note what their thresholds alone gave."""
    state.notes["threshold_sparsity"] = masked_share(state, group_sizes(gated.ties, state.targets), exact=True)
    single = all(len(tie.members) == 1 and tie.members[0][1] == Element for tie in gated.ties)
    ties = Element if single else gated.ties
    state.set_masks_(topk_masks(weight_scores(state, gated.floor), sparsity, pattern=ties, scope=gated.scope))
    fold_gates_(state)
    if gated.biases:
        zero_biases_(state)


def _train_with_fixed_masks(state: TrainState, problem: Problem, steps: int, gated: GateSetup) -> None:
    """Train on with the masks fixed; biases of pruned rows have no mask, so they are held at zero after each step."""
    train(state, problem, steps, hooks=[zero_biases_] if gated.biases else [])


def threshold_hook(
    phases: PhaseShares, problem: Problem, sparsity: float, areas: list[int], scope: LearnedScope, every: int
) -> Hook:
    """The hook that keeps the share of masked weights on the curve.

    Thresholds are exact when set and carried over for `every` steps: a fresh top-k at each would cost as much as it.
    """
    plan = phases.pruning_schedule(problem.steps)

    def follow(state: TrainState) -> None:
        goal = plan.sparsity_at(state.step, sparsity)
        if goal and (state.step % every == 0 or state.step == plan.stop):
            set_thresholds_(state, areas, goal, scope)
            state.masked = goal

    return follow


def initial_scores(
    problem: Problem, ties: tuple[CoupledGroups, ...], start: float = 0.0, own: bool = False
) -> list[Parameter | None]:
    """A score of each group of each tie, equal at first; `own`: one for each member."""
    shapes = {name: target.shape for name, target in problem.targets.items()}
    found: list[Parameter | None] = []
    for tie in ties:
        single = len(tie.members) == 1 and tie.members[0][1] == Element
        shape: tuple[int, ...] = shapes[tie.members[0][0]] if single else (tie.num_groups(shapes),)
        found.append(Parameter(torch.full((len(tie.members), *shape) if own and not single else shape, start)))
    return found


def straight_through_gates(learnt: list[Parameter | None], shift: float | None = None) -> Make:
    """Makes straight-through gates on these scores; with a shift, penalised ones."""

    def make(number: int, place: int, tie: CoupledGroups) -> nn.Module:
        return StraightThroughGate(learnt[number], tie.members[place][1], number, place, shift)

    return make


def short_of_travel(problem: Problem, phases: PhaseShares, otherwise: str) -> list[str]:
    """A word of warning where no weight can travel as far as it is large before the first one is masked.

    In Sanh et al. 2020 it can travel 2.7 times that far. Scores that begin equal are little but noise before.
    """
    rate, weights = problem.rate_schedule(), target_parameters(problem.pretrained, problem.targets).values()
    total = sum(float(weight.detach().abs().sum()) for weight in weights)
    mean = total / sum(weight.numel() for weight in weights)
    travel = sum(rate(step) for step in range(phases.pruning_schedule(problem.steps).start)) / max(mean, 1e-12)
    if travel >= 1.0:
        return []
    return [
        f"before the first weights are masked a weight can travel {travel:.2g} times the mean |weight| (2.7 in the "
        f"paper), too little to tell which ones move away from zero; raise --steps, --train.learning-rate or "
        f"--method.phases.warmup, {otherwise}"
    ]


def rate_of_scores(problem: Problem, score_rate: float) -> Callable[[int], float]:
    """Step -> learning rate of the scores: that of the weights, with a peak of its own."""
    rate, peak = problem.rate_schedule(), problem.training.learning_rate or 1.0
    return lambda step: rate(step) * score_rate / peak


def check_rate(score_rate: float) -> None:
    """UserError unless scores can learn at this rate."""
    if not 0.0 < score_rate < math.inf:
        raise UserError(f"score_rate is a learning rate above 0, got {score_rate:g}")


def check_every(every: int) -> None:
    """UserError unless thresholds are corrected."""
    if every < 1:
        raise UserError(f"every is a number of steps, at least 1, got {every}")
