"""Masks that a penalty closes: soft movement pruning and L0 regularisation, led to the sparsity asked for."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from sparsesoup.errors import UserError
from sparsesoup.gates.base import gates
from sparsesoup.gates.density import masked_share, penalty, sizes
from sparsesoup.gates.hard_concrete import SHIFT, SHUT, START, HardConcrete, logistic_noise
from sparsesoup.methods.learnt import Gated, Phases, Reach, check_rate, learn, scores, straight, tiled
from sparsesoup.patterns import Block, Element, Tie
from sparsesoup.problem import Problem
from sparsesoup.rng import generator
from sparsesoup.schedules import Cubic
from sparsesoup.state import TrainState
from sparsesoup.ticket import Ticket

GAIN = 100.0  # a density 0.1 too high over 1 % of T raises the penalty by a tenth
BOUND = 1e4  # most by which the penalty may leave its setting


@dataclass(frozen=True, kw_only=True)
class SoftMovement:
    """Soft movement pruning: a weight is kept while sigmoid(score) > threshold. Sanh et al. 2020, sec. 4 ("SMvP").

    A penalty pulls all scores down. It does not reach a sparsity by itself, so it grows while too many weights are
    open and shrinks while too few are; what is left is trimmed. Masked weights may return until then.

    Args:
        score_rate: peak learning rate of the scores.
        threshold: the threshold at the end of its rise, in (0, 1).
        penalty: weight of the mean sigmoid(score) in the loss at the end of its rise, before feedback.
        feedback: whether the penalty follows the density.
        scope: who competes with whom when the masks are trimmed.
        pattern: what is masked together; 1 x 1 is single weights.
        phases: when the masks become sparser.
    """

    score_rate: float = 5e-2
    threshold: float = 0.1
    penalty: float = 400.0
    feedback: bool = True
    scope: Reach = "global"
    pattern: Block = Element
    phases: Phases = field(default_factory=Phases)

    def __post_init__(self) -> None:
        check_penalty(self.score_rate, self.penalty, self.threshold)

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """The ticket after T steps."""
        ties = tiled(problem.targets, self.pattern)
        plan, areas = self.phases.plan(problem.steps), sizes(ties, problem.targets)
        hook = Led(plan, sparsity, areas, self.phases.every, self.feedback, self.threshold, problem.steps)
        term = penalty(hook.weigh(self.penalty), dict.fromkeys(range(len(ties)), 1.0))
        gated = Gated(ties, straight(scores(problem, ties)), self.score_rate, self.scope, term)
        return learn(problem, sparsity, self.phases, gated, hook)


@dataclass(frozen=True, kw_only=True)
class HardConcreteL0:
    """L0 regularisation: random gates whose chance of being open is penalised. Louizos et al. 2018; Sanh et al. 2020.

    The penalty follows the density as in soft-movement. At the end the gates, which are not binary, are folded into
    the weights, and what is left is trimmed.

    Args:
        score_rate: peak learning rate of the gates' logits.
        penalty: weight of the mean chance of being open in the loss, before feedback.
        feedback: whether the penalty follows the density.
        start: logit at which all gates begin.
        scope: who competes with whom when the masks are trimmed.
        phases: when the masks become sparser.
    """

    score_rate: float = 1e-1
    penalty: float = 125.0
    feedback: bool = True
    start: float = START
    scope: Reach = "global"
    phases: Phases = field(default_factory=Phases)

    def __post_init__(self) -> None:
        check_penalty(self.score_rate, self.penalty)
        if not self.start > SHUT:
            raise UserError(f"start is a logit above {SHUT:.2f}, where all gates are shut, got {self.start:g}")

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """The ticket after T steps."""
        ties = tiled(problem.targets, Element)
        plan, areas = self.phases.plan(problem.steps), sizes(ties, problem.targets)
        hook = Led(plan, sparsity, areas, self.phases.every, self.feedback, None, problem.steps)
        term = penalty(hook.weigh(self.penalty), dict.fromkeys(range(len(ties)), 1.0), SHIFT)
        learnt = scores(problem, ties, self.start)
        longest = max(math.prod(target.shape) for target in problem.targets.values())
        noise = logistic_noise(longest + (1 << 20), generator(problem.seed, "noise of the gates"))

        def make(number: int, place: int, tie: Tie) -> nn.Module:
            score = learnt[number]
            assert score is not None
            return HardConcrete(score, noise, number)

        return learn(problem, sparsity, self.phases, Gated(ties, make, self.score_rate, self.scope, term), hook)


@dataclass(frozen=True)
class Led:
    """The hook that raises the threshold and lets the penalty follow the density.

    Args:
        plan: the sparsity that is wanted at each step, and the curve of threshold and penalty.
        sparsity: at its end.
        areas: weights in a group of each tie.
        every: steps between two looks.
        feedback: whether the penalty follows.
        threshold: of sigmoid(score) at the end of the plan; None leaves the gates' own.
        total: T.
    """

    plan: Cubic
    sparsity: float
    areas: list[int]
    every: int
    feedback: bool
    threshold: float | None
    total: int

    def __call__(self, state: TrainState) -> None:
        if state.step % self.every and state.step != self.plan.stop:
            return
        if self.threshold is not None:
            tau = self.plan.at(state.step, self.threshold)
            for _, gate in gates(state.model):
                gate.level.fill_(torch.logit(torch.tensor(tau)))
        state.masked = masked_share(state, self.areas)
        log = state.memory.setdefault("feedback", torch.zeros(()))
        if self.feedback and self.plan.start <= state.step:
            behind = self.plan.at(state.step, self.sparsity) - state.masked
            log.add_(GAIN * behind * self.every / self.total).clamp_(-math.log(BOUND), math.log(BOUND))

    def weigh(self, final: float) -> Callable[[TrainState], float]:
        """What the penalty weighs at a step: on the curve of the threshold, times what the feedback makes of it."""

        def share(state: TrainState) -> float:
            return final * self.plan.at(state.step, 1.0 - 1e-9) * float(state.memory["feedback"].exp())

        return share


def check_penalty(score_rate: float, weight: float, threshold: float = 0.5) -> None:
    """UserError unless masks can be closed by this penalty."""
    check_rate(score_rate)
    if not 0.0 <= weight < math.inf:
        raise UserError(f"penalty is a number of at least 0, got {weight:g}")
    if not 0.0 < threshold < 1.0:
        raise UserError(f"threshold of sigmoid(score) lies in (0, 1), got {threshold:g}")
