"""Movement pruning: weights are kept for where the training moves them, not for what they are. Sanh et al. 2020."""

from dataclasses import dataclass, field

from sparsesoup.gates.density import sizes
from sparsesoup.methods.learnt import (
    Gated,
    Phases,
    Reach,
    check_every,
    check_rate,
    following,
    learn,
    scores,
    straight,
)
from sparsesoup.patterns import Block, Element
from sparsesoup.problem import Problem
from sparsesoup.structures import tiled
from sparsesoup.ticket import Ticket
from sparsesoup.train import Hook


@dataclass(frozen=True, kw_only=True)
class Movement:
    """Hard movement pruning: the mask is the top of learned scores at every step. Sanh et al. 2020, eq. 3 to 6.

    A score rises where a weight moves away from zero; its sign counts, since the largest |score| would also keep the
    weights that training shrinks fastest. Masked weights may return until the masks are fixed.

    Args:
        score_rate: peak learning rate of the scores; it rises and falls with that of the weights.
        scope: who competes with whom: the weights of a tensor, or all.
        pattern: what is masked together; 1 x 1 is single weights.
        phases: when the masks become sparser.
        every: steps from one correction of the thresholds to the next.
    """

    score_rate: float = 1e-2
    scope: Reach = "tensor"
    pattern: Block = Element
    phases: Phases = field(default_factory=Phases)
    every: int = 10

    def __post_init__(self) -> None:
        check_rate(self.score_rate)
        check_every(self.every)

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """The ticket after T steps."""
        return learn(problem, sparsity, self.phases, *self.gated(problem, sparsity))

    def gated(self, problem: Problem, sparsity: float) -> tuple[Gated, Hook]:
        """The gates, and the hook that sets their levels."""
        ties = tiled(problem.targets, self.pattern)
        hook = following(self.phases, problem, sparsity, sizes(ties, problem.targets), self.scope, self.every)
        return Gated(ties, straight(scores(problem, ties)), self.score_rate, self.scope), hook


@dataclass(frozen=True, kw_only=True)
class MagnitudeThrough:
    """The top of |w| at every step, masked weights kept behind the mask: magnitude pruning in movement pruning's frame.

    Sanh et al. 2020, sec. 4 ("MaP"). A masked weight gets no gradient, but may return when others shrink below it.

    Args:
        scope: who competes with whom: the weights of a tensor, or all.
        phases: when the masks become sparser.
        every: steps from one correction of the thresholds to the next.
    """

    scope: Reach = "tensor"
    phases: Phases = field(default_factory=Phases)
    every: int = 10

    def __post_init__(self) -> None:
        check_every(self.every)

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """The ticket after T steps."""
        ties = tiled(problem.targets, Element)
        hook = following(self.phases, problem, sparsity, sizes(ties, problem.targets), self.scope, self.every)
        gated = Gated(ties, straight([None] * len(ties)), 0.0, self.scope)
        return learn(problem, sparsity, self.phases, gated, hook)
