"""Learned masks: trainable gates on the weights, trimmed to the target sparsity and then fixed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.granularity import CoupledGroups, Element
from sparsesoup.core.masking import check_sparsity, topk_masks
from sparsesoup.core.masks import Masks
from sparsesoup.core.schedules import CubicSchedule
from sparsesoup.core.targets import target_parameters
from sparsesoup.methods.base import Method
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
from sparsesoup.training.hooks import Hook, ScheduledHook
from sparsesoup.training.plan import ActiveRun, LoopHooks, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import TrainState

LearnedScope = Literal["tensor", "global"]


@dataclass(frozen=True, kw_only=True)
class PhaseShares:
    """Schedule of learned masks: dense warm-up, cubic rise of the sparsity, cool-down, and fixed masks at the end.

    Args:
        warmup: share of T before the first weight is masked; scores are trained from the start.
        cooldown: share of T at the end in which the sparsity is constant.
        settle: last share of T, within the cool-down, with masks trimmed to exactly the sparsity and fixed.
    """

    warmup: float = 0.1
    cooldown: float = 0.3
    settle: float = 0.1

    def __post_init__(self) -> None:
        require(0.0 <= self.warmup < 1.0, "warmup", "a share of T in [0, 1)", self.warmup)
        allowed = f"above 0 and at most cooldown ({self.cooldown:g})"
        require(0.0 < self.settle <= self.cooldown, "settle", allowed, self.settle)
        left = f"below {1 - self.warmup:g}, since warmup is {self.warmup:g} and a step to prune in must be left"
        require(self.warmup + self.cooldown < 1.0, "cooldown", left, self.cooldown)

    def pruning_schedule(self, total: int) -> CubicSchedule:
        """Return the sparsity schedule for `total` steps."""
        return CubicSchedule(round(self.warmup * total), round((1 - self.cooldown) * total))

    def check_settled(self, total: int) -> int:
        """Return the number of steps with fixed masks."""
        return max(1, round(self.settle * total))

    def pruning_end(self, total: int) -> int:
        """Return the step from which the masks are fixed."""
        return total - self.check_settled(total)

    def fits_steps(self, total: int) -> bool:
        """Return True if `total` steps have one for each phase."""
        plan = self.pruning_schedule(total)
        return total >= 4 and plan.start < plan.stop <= self.pruning_end(total)


@dataclass(frozen=True)
class GateSetup:
    """Gates with their coupled groups, and what happens to them in training.

    Args:
        groups: the coupled groups.
        make: makes the gate of a group.
        hook: called after each step.
        penalty: added to the loss.
        scope: ranking scope when the masks are trimmed.
        biases: mask the bias of fully masked rows too.
        floor: share of the groups of every matrix kept whatever their scores.
        trim: returns the final masks; default: the best groups that fit.
        masked: returns the share masked by the gates; default: that of closed groups.
    """

    groups: tuple[CoupledGroups, ...]
    make: Make
    hook: Hook
    scope: LearnedScope = "global"
    penalty: Callable[[TrainState], Tensor] | None = None
    biases: bool = False
    floor: float = 0.0
    trim: Callable[[TrainState], Masks] | None = None
    masked: Callable[[TrainState], float] | None = None


class LearnedMasks(Method):
    """A method that trains gates with the weights, and trims them to the sparsity: T steps in total.

    A subclass has the settings `phases` and, if some weights are always kept, `floor`; and what is below.
    """

    phases: PhaseShares
    floor: float

    def make_gates(self, problem: Problem, sparsity: float) -> GateSetup:
        """Return the gates."""
        raise NotImplementedError

    def peak_score_rate(self, size: RunSize) -> float:
        """Return the peak learning rate of the scores; 0 if there are none."""
        raise NotImplementedError

    def fall_to_close(self) -> float:
        """Return the distance that a score has to fall before its gate closes."""
        return 0.0

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the search for the masks, their trimming to exactly the sparsity, and a training with fixed masks."""
        check_sparsity(sparsity)
        if (floor := getattr(self, "floor", 0.0)) > 1 - sparsity:
            raise UserError(
                f"a floor of {floor:g} of every matrix leaves no sparsity of {sparsity:g}; it is at most "
                f"{1 - sparsity:.3g} here"
            )
        why = f"a warm-up of {self.phases.warmup:g} T and a cool-down of {self.phases.cooldown:g} T"
        size.require_fit(self.phases.fits_steps, why)
        self._check_scores_can_close(size)
        settled = self.phases.check_settled(size.steps)
        copies = 4.0 if self.peak_score_rate(size) else 1.0  # scores with gradients and moments
        return [
            Phase(name="search", steps=size.steps - settled, loop=_search_hooks, copies=copies),
            # At every restart too, since that needs the model as the next phase found it.
            Phase(name="trim", end=_trim_to_sparsity, always=_detach_gates),
            Phase(name="settle", steps=settled, loop=settle_hooks, masks_final=0),
        ]

    def check(self, problem: Problem, sparsity: float) -> None:
        """Leave it to `start_run`, which makes the gates."""

    def start_run(self, problem: Problem, sparsity: float) -> ActiveRun:
        """Start a run with gates."""
        gated, size = self.make_gates(problem, sparsity), problem.size

        def attach(model: nn.Module) -> tuple[list[Parameter], float]:
            learned = attach_gates(model, gated.groups, gated.make)
            if gated.biases:
                attach_biases(model, problem.targets)
            return learned, self.peak_score_rate(size) / (size.training.learning_rate or 1.0)

        return ActiveRun(problem, problem.start_run(attach), own=gated)

    def _check_scores_can_close(self, size: RunSize) -> None:
        """Raise a UserError if no score can fall far enough: a step moves it by at most its learning rate."""
        peak, fall = self.peak_score_rate(size), self.fall_to_close()
        if peak and not size.training.learning_rate:
            raise UserError("scores learn in proportion to the weights; train.learning_rate must be above 0, got 0")
        rate = rate_of_scores(size, peak)
        steps = range(self.phases.pruning_schedule(size.steps).start, self.phases.pruning_end(size.steps))
        longest = sum(map(rate, steps)) if fall else 0.0
        if longest < fall:
            raise UserError(
                f"scores can fall by {longest:.2f} in {size.steps} steps at a rate of {peak:g}, and must by "
                f"{fall:.2f} before a gate closes; raise --method.score-rate above "
                f"{peak * fall / max(longest, 1e-9):.2g}, or --steps"
            )


def _search_hooks(run: ActiveRun) -> LoopHooks:
    return LoopHooks([run.own.hook], at_start=True, penalty=run.own.penalty)


def settle_hooks(run: ActiveRun) -> LoopHooks:
    """Biases of pruned rows have no mask, so they are zeroed after each step."""
    return LoopHooks([zero_biases_] if run.own.biases else [])


def _trim_to_sparsity(run: ActiveRun) -> None:
    """Fix the masks at exactly the sparsity, ranked by the gates; note the sparsity that their thresholds gave."""
    state, gated = run.state, run.own
    masked = masked_share(state, group_sizes(gated.groups, state.targets), exact=True) if gated.masked is None else None
    state.notes["threshold_sparsity"] = gated.masked(state) if masked is None else masked
    state.set_masks_(_best_groups(run, gated) if gated.trim is None else gated.trim(state))
    fold_gates_(state)
    if gated.biases:
        zero_biases_(state)


def _best_groups(run: ActiveRun, gated: GateSetup) -> Masks:
    single = all(len(coupled.members) == 1 and coupled.members[0][1] == Element for coupled in gated.groups)
    groups = Element if single else gated.groups
    return topk_masks(weight_scores(run.state, gated.floor), run.sparsity, pattern=groups, scope=gated.scope)


def _detach_gates(run: ActiveRun) -> None:
    detach_gates_(run.state)


def threshold_hook(
    phases: PhaseShares, steps: int, sparsity: float, areas: list[int], scope: LearnedScope, every: int
) -> Hook:
    """Return a hook that keeps the masked share on the schedule.

    Thresholds are exact when set and kept for `every` steps: a top-k at each step would cost as much as the step.
    """
    plan = phases.pruning_schedule(steps)

    def is_due(step: int) -> bool:
        return bool(plan.sparsity_at(step, sparsity)) and (step % every == 0 or step == plan.stop)

    def follow(state: TrainState) -> None:
        goal = plan.sparsity_at(state.step, sparsity)
        set_thresholds_(state, areas, goal, scope)
        state.masked = goal

    return ScheduledHook(is_due, follow)


def initial_scores(
    problem: Problem, groups: tuple[CoupledGroups, ...], start: float = 0.0, own: bool = False
) -> list[Parameter | None]:
    """Return equal scores for all groups; `own`: separate scores for each member."""
    shapes = {name: target.shape for name, target in problem.targets.items()}
    found: list[Parameter | None] = []
    for coupled in groups:
        single = len(coupled.members) == 1 and coupled.members[0][1] == Element
        shape: tuple[int, ...] = shapes[coupled.members[0][0]] if single else (coupled.num_groups(shapes),)
        found.append(Parameter(torch.full((len(coupled.members), *shape) if own and not single else shape, start)))
    return found


def straight_through_gates(learned: list[Parameter | None], shift: float | None = None) -> Make:
    """Return a factory of straight-through gates with these scores; with a shift, penalised ones."""

    def make(number: int, member: int, coupled: CoupledGroups) -> nn.Module:
        return StraightThroughGate(learned[number], coupled.members[member][1], number, member, shift)

    return make


def short_of_travel(problem: Problem, phases: PhaseShares, otherwise: str) -> list[str]:
    """Return a warning if weights cannot move as far as their mean magnitude before the first one is masked.

    In Sanh et al. 2020 they can move 2.7 times that far. Scores that start equal are mostly noise before that.
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


def rate_of_scores(size: RunSize, score_rate: float) -> Callable[[int], float]:
    """Return step -> learning rate of the scores: the schedule of the weights with its own peak."""
    rate, peak = size.rate_schedule(), size.training.learning_rate or 1.0
    return lambda step: rate(step) * score_rate / peak


def check_rate(score_rate: float) -> None:
    """Raise a UserError unless the learning rate of the scores is positive."""
    require(0.0 < score_rate < math.inf, "score_rate", "a learning rate above 0", score_rate)
