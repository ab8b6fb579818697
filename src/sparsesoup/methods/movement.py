"""Movement pruning: keep weights that move away from zero in training. Sanh et al. 2020."""

from dataclasses import dataclass, field
from typing import Literal

from torch.nn import Parameter

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.granularity import Block, CoupledGroups, Element
from sparsesoup.core.groups import block_groups
from sparsesoup.core.targets import target_parameters
from sparsesoup.methods.gates.density import group_sizes
from sparsesoup.methods.learned_masks import (
    GateSetup,
    LearnedMasks,
    LearnedScope,
    PhaseShares,
    check_rate,
    initial_scores,
    short_of_travel,
    straight_through_gates,
    threshold_hook,
)
from sparsesoup.methods.scores import magnitude
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize

PUBLISHED = 1e-2  # learning rate of scores that start equal; only their order matters


@dataclass(frozen=True, kw_only=True)
class MovementPruning(LearnedMasks):
    """Hard movement pruning: the mask is the top-k of learned scores at every step. Sanh et al. 2020, eq. 3 to 6.

    A score rises if a weight moves away from zero; its sign matters, since the largest |score| would also keep the
    weights that training shrinks fastest. Masked weights may return until the masks are fixed.

    As published all scores start equal, and then only their order matters, whatever their learning rate. That needs
    a training in which weights move further than their own size. Started at |theta_0|, a short run behaves like
    magnitude pruning with straight-through gradients, a long one like movement pruning; this start is ours.

    Args:
        start: scores start equal, or at |theta_0|.
        score_rate: peak learning rate of scores that start at |theta_0|; default: that of the weights.
        scope: ranking scope: per tensor, or global.
        pattern: tile of weights masked as one group; 1 x 1 is single weights.
        phases: sparsity schedule.
        every_steps: steps between corrections of the thresholds.
    """

    start: Literal["equal", "magnitude"] = "equal"
    score_rate: float | None = None
    scope: LearnedScope = "tensor"
    pattern: Block = Element
    phases: PhaseShares = field(default_factory=PhaseShares)
    every_steps: int = 10

    def __post_init__(self) -> None:
        if self.score_rate is not None:
            check_rate(self.score_rate)
            if self.start == "equal":
                raise UserError(
                    "has no effect where all scores begin equal: only their order counts; leave it out, or set "
                    "--method.start magnitude",
                    "score_rate",
                )
        require(self.every_steps >= 1, "every_steps", "a number of steps, at least 1", self.every_steps)

    def doubts(self, problem: Problem, sparsity: float) -> list[str]:
        """Return notes for the user before the first step."""
        single = self.start == "equal" and self.pattern == Element
        return short_of_travel(problem, self.phases, "or set --method.start magnitude") if single else []

    def peak_score_rate(self, size: RunSize) -> float:
        """Return the peak learning rate of the scores."""
        if self.start == "equal":
            return PUBLISHED
        return size.training.learning_rate if self.score_rate is None else self.score_rate

    def make_gates(self, problem: Problem, sparsity: float) -> GateSetup:
        """Return the gates, with a hook that sets their thresholds."""
        groups = block_groups(problem.targets, self.pattern)
        areas, steps = group_sizes(groups, problem.targets), problem.steps
        scores = initial_scores(problem, groups) if self.start == "equal" else _magnitude_scores(problem, groups)
        hook = threshold_hook(self.phases, steps, sparsity, areas, self.scope, self.every_steps)
        return GateSetup(groups, straight_through_gates(scores), hook, self.scope)


def _magnitude_scores(problem: Problem, groups: tuple[CoupledGroups, ...]) -> list[Parameter | None]:
    """Return a score per group: the mean |theta_0| of its weights."""
    table = magnitude(target_parameters(problem.pretrained, problem.targets))
    shapes = {name: target.shape for name, target in problem.targets.items()}
    found: list[Parameter | None] = []
    for coupled in groups:
        name, block = coupled.members[0]
        mean = table[name] if block == Element else coupled.sum_over_groups(table) / coupled.group_size(shapes)
        found.append(Parameter(mean))
    return found


@dataclass(frozen=True, kw_only=True)
class MagnitudeStraightThrough(LearnedMasks):
    """Top-k of |w| at every step with masked weights kept behind the mask: magnitude pruning as in movement pruning.

    Sanh et al. 2020, sec. 4 ("MaP"). A masked weight gets no gradient, but may return when others shrink below it.

    Args:
        scope: ranking scope: per tensor, or global.
        phases: sparsity schedule.
        every_steps: steps between corrections of the thresholds.
    """

    scope: LearnedScope = "tensor"
    phases: PhaseShares = field(default_factory=PhaseShares)
    every_steps: int = 10

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, "every_steps", "a number of steps, at least 1", self.every_steps)

    def peak_score_rate(self, size: RunSize) -> float:
        """Return 0: the weights themselves are the scores."""
        return 0.0

    def make_gates(self, problem: Problem, sparsity: float) -> GateSetup:
        """Return the gates, with a hook that sets their thresholds."""
        groups = block_groups(problem.targets, Element)
        areas, steps = group_sizes(groups, problem.targets), problem.steps
        hook = threshold_hook(self.phases, steps, sparsity, areas, self.scope, self.every_steps)
        return GateSetup(groups, straight_through_gates([None] * len(groups)), hook, self.scope)
