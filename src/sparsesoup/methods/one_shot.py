"""Score once, prune once, train."""

from dataclasses import dataclass
from typing import Literal

from sparsesoup.core.granularity import Block, Element, Structure
from sparsesoup.core.groups import need_groups
from sparsesoup.core.masking import Scope
from sparsesoup.core.rng import generator
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods.scores import magnitude, random
from sparsesoup.methods.select_masks import choose
from sparsesoup.training.cached_train import train_once
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem, need_dense, need_steps


@dataclass(frozen=True, kw_only=True)
class Dense:
    """No pruning: T steps of plain fine-tuning, the row that every table needs."""

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """The fine-tuned model with all of its weights; the sparsity must be 0."""
        need_dense(sparsity, "dense")
        need_steps(problem, 1, "a run")
        state = problem.start()
        problem.journal.piece("train", state, train_once, state, problem, problem.steps)
        return problem.ticket(state)


@dataclass(frozen=True, kw_only=True)
class OneShot:
    """Prune the pre-trained weights once, before training, by the best scores.

    Args:
        score: magnitude (|theta_0|) or random (uniform, the control).
        structure: what of the model falls together: weights, or whole rows, columns, heads, units, heads-and-units.
        pattern: the tile in which weights fall together; 1 x 1 is single weights.
        scope: who competes with whom.
    """

    score: Literal["magnitude", "random"] = "magnitude"
    structure: Structure = "weights"
    pattern: Block = Element
    scope: Scope = "global"

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """The ticket after T steps of training with the mask."""
        need_steps(problem, 1, "a run")
        pattern = need_groups(problem.targets, self.structure, sparsity, self.pattern, self.scope)
        state = problem.start()
        params = state.params()
        scores = magnitude(params) if self.score == "magnitude" else random(params, generator(problem.seed, "score"))
        state.prune_(choose(state, scores, sparsity, pattern=pattern, scope=self.scope))
        problem.journal.piece("train", state, train, state, problem, problem.steps)
        return problem.ticket(state)
