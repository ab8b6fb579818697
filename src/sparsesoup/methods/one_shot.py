"""One-shot pruning before training."""

from dataclasses import dataclass
from typing import Literal

from sparsesoup.core.granularity import Block, Element, Structure
from sparsesoup.core.groups import validate_groups
from sparsesoup.core.masking import Scope
from sparsesoup.core.rng import cpu_generator
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods.scores import magnitude, random_scores
from sparsesoup.methods.select_masks import select_masks
from sparsesoup.training.cached_train import train_cached
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem, need_dense, require_steps


@dataclass(frozen=True, kw_only=True)
class DenseFinetuning:
    """No pruning: T steps of plain fine-tuning, the dense baseline."""

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """Return the fine-tuned model with all of its weights; the sparsity must be 0."""
        need_dense(sparsity, "dense")
        require_steps(problem, 1, "a run")
        state = problem.start_run()
        problem.journal.run_stage("train", state, train_cached, state, problem, problem.steps)
        return problem.finish_run(state)


@dataclass(frozen=True, kw_only=True)
class OneShot:
    """Prune the pre-trained weights once, before training.

    Args:
        score: magnitude (|theta_0|) or random (uniform, the control).
        structure: structure to prune: weights, or whole rows, columns, heads, units, heads-and-units.
        pattern: tile of weights pruned as one group; 1 x 1 is single weights.
        scope: ranking scope.
    """

    score: Literal["magnitude", "random"] = "magnitude"
    structure: Structure = "weights"
    pattern: Block = Element
    scope: Scope = "global"

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """Return the ticket after T steps of training with the mask."""
        require_steps(problem, 1, "a run")
        pattern = validate_groups(problem.targets, self.structure, sparsity, self.pattern, self.scope)
        state = problem.start_run()
        params = state.prunable_parameters()
        scores = (
            magnitude(params)
            if self.score == "magnitude"
            else random_scores(params, cpu_generator(problem.seed, "score"))
        )
        state.set_masks_(select_masks(state, scores, sparsity, pattern=pattern, scope=self.scope))
        problem.journal.run_stage("train", state, train, state, problem, problem.steps)
        return problem.finish_run(state)
