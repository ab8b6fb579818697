"""Masks closed by a penalty: soft movement pruning and L0 regularisation, controlled to the target sparsity."""

import math
from dataclasses import dataclass, field

from torch import nn

from sparsesoup.core.errors import require
from sparsesoup.core.granularity import Block, CoupledGroups, Element
from sparsesoup.core.groups import block_groups
from sparsesoup.core.rng import cpu_generator
from sparsesoup.methods.gates.density import group_sizes
from sparsesoup.methods.gates.hard_concrete import CLOSED_LOGIT, SHIFT, START, HardConcrete, SharedNoise, logistic_noise
from sparsesoup.methods.gates.penalty_controller import SparsityController
from sparsesoup.methods.learned_masks import (
    GateSetup,
    LearnedMasks,
    LearnedScope,
    PhaseShares,
    check_rate,
    initial_scores,
    rate_of_scores,
    short_of_travel,
    straight_through_gates,
)
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize

LARGEST = 1e6  # the published weights are 125 and 400


@dataclass(frozen=True, kw_only=True)
class SoftMovement(LearnedMasks):
    """Soft movement pruning: keep a weight while sigmoid(score) > threshold. Sanh et al. 2020, sec. 4 ("SMvP").

    A penalty pulls all scores down. With a constant weight, as published, it does not reach a given sparsity; when
    controlled, it pulls while too many weights are open and pushes while too few are. The rest is trimmed.

    Args:
        score_rate: peak learning rate of the scores.
        threshold: final threshold of sigmoid(score), in (0, 1).
        penalty: final weight of the mean sigmoid(score) in the loss (published: 400); default: controlled to reach the
            sparsity.
        floor: share of every matrix kept whatever the threshold (published: 0.005).
        scope: ranking scope when the masks are trimmed.
        pattern: tile of weights masked as one group; 1 x 1 is single weights. With larger tiles the bias of a fully
            masked row is masked too.
        phases: sparsity schedule.
    """

    score_rate: float = 5e-2
    threshold: float = 0.1
    penalty: float | None = None
    floor: float = 0.0
    scope: LearnedScope = "global"
    pattern: Block = Element
    phases: PhaseShares = field(default_factory=PhaseShares)

    def __post_init__(self) -> None:
        check_penalty(self.score_rate, self.penalty, self.threshold)
        check_floor(self.floor)

    def doubts(self, problem: Problem, sparsity: float) -> list[str]:
        """Return notes for the user before the first step."""
        single = self.pattern == Element
        return short_of_travel(problem, self.phases, "or use magnitude-ste") if single else []

    def peak_score_rate(self, size: RunSize) -> float:
        """Return the peak learning rate of the scores."""
        return self.score_rate

    def fall_to_close(self) -> float:
        """Return the distance that a score has to fall before its gate closes."""
        return -math.log(self.threshold / (1 - self.threshold))

    def make_gates(self, problem: Problem, sparsity: float) -> GateSetup:
        """Return the gates, with their controller."""
        groups = block_groups(problem.targets, self.pattern)
        lead = SparsityController(
            plan=self.phases.pruning_schedule(problem.steps), end=self.phases.pruning_end(problem.steps),
            sparsity=sparsity,
            rate=rate_of_scores(problem.size, self.score_rate),
            areas=group_sizes(groups, problem.targets), weights=[1.0] * len(groups), penalty=self.penalty,
            threshold=self.threshold, floor=self.floor,
        )  # fmt: skip
        make = straight_through_gates(initial_scores(problem, groups), shift=0.0)
        biases = self.pattern != Element  # as in the code of the block variant, but not of single weights
        return GateSetup(groups, make, lead, self.scope, lead.penalty_term, biases, self.floor)


@dataclass(frozen=True, kw_only=True)
class HardConcreteL0(LearnedMasks):
    """L0 regularisation: random gates with a penalty on their opening probability. Louizos 2018; Sanh et al. 2020.

    The penalty is controlled as in soft-movement. At the end the gates, which are not binary, are folded into the
    weights, and the rest is trimmed.

    Args:
        score_rate: peak learning rate of the gates' logits.
        penalty: final weight of the mean opening probability in the loss (published: 125); default: controlled to reach
            the sparsity.
        start: initial logit of all gates.
        scope: ranking scope when the masks are trimmed.
        phases: sparsity schedule.
    """

    score_rate: float = 1e-1
    penalty: float | None = None
    start: float = START
    scope: LearnedScope = "global"
    phases: PhaseShares = field(default_factory=PhaseShares)

    def __post_init__(self) -> None:
        check_penalty(self.score_rate, self.penalty)
        allowed = f"a logit from {CLOSED_LOGIT:.2f}, where all gates are shut, to 100"
        require(CLOSED_LOGIT < self.start < 100, "start", allowed, self.start)

    def peak_score_rate(self, size: RunSize) -> float:
        """Return the peak learning rate of the scores."""
        return self.score_rate

    def fall_to_close(self) -> float:
        """Return the distance that a score has to fall before its gate closes."""
        return self.start - CLOSED_LOGIT

    def make_gates(self, problem: Problem, sparsity: float) -> GateSetup:
        """Return the gates, with their controller."""
        groups = block_groups(problem.targets, Element)
        lead = SparsityController(
            plan=self.phases.pruning_schedule(problem.steps), end=self.phases.pruning_end(problem.steps),
            sparsity=sparsity,
            rate=rate_of_scores(problem.size, self.score_rate),
            areas=group_sizes(groups, problem.targets), weights=[1.0] * len(groups), penalty=self.penalty, shift=SHIFT,
        )  # fmt: skip
        learned = initial_scores(problem, groups, self.start)
        longest = max(math.prod(target.shape) for target in problem.targets.values())
        noise = SharedNoise(logistic_noise(longest + (1 << 20), cpu_generator(problem.seed, "noise of the gates")))

        def make(number: int, member: int, coupled: CoupledGroups) -> nn.Module:
            score = learned[number]
            assert score is not None
            return HardConcrete(score, noise, number)

        return GateSetup(groups, make, lead, self.scope, lead.penalty_term)


def check_floor(floor: float) -> None:
    """Raise a UserError unless the floor is a share in [0, 1)."""
    require(0.0 <= floor < 1.0, "floor", "a share of every matrix in [0, 1)", floor)


def check_penalty(score_rate: float, weight: float | None, threshold: float = 0.5) -> None:
    """Raise a UserError unless this penalty can close masks."""
    check_rate(score_rate)
    allowed = f"in [0, {LARGEST:g}], above which no task is left to learn"
    require(weight is None or 0.0 <= weight <= LARGEST, "penalty", allowed, weight)
    require(0.0 < threshold < 1.0, "threshold", "in (0, 1), as sigmoid(score) is", threshold)
