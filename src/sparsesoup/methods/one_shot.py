"""One-shot pruning before training."""

from dataclasses import dataclass
from typing import Literal

from sparsesoup.core.granularity import Block, Element, Structure
from sparsesoup.core.masking import Scope
from sparsesoup.core.rng import cpu_generator
from sparsesoup.methods.base import Method, require_dense
from sparsesoup.methods.scores import magnitude, random_scores
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize


@dataclass(frozen=True, kw_only=True)
class DenseFinetuning(Method):
    """No pruning: T steps of plain fine-tuning, the dense baseline. The sparsity must be 0."""

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return a single training."""
        require_dense("dense", sparsity)
        return [Phase(name="train", steps=size.steps, shared=True, keeps_moments=False)]


@dataclass(frozen=True, kw_only=True)
class OneShot(Method):
    """Prune the pre-trained weights once, before training.

    Args:
        score: magnitude (|theta_0|) or random (uniform, the control).
        structure: structure to prune: weights, rows, columns, heads, units, heads-and-units or features-and-units.
        pattern: tile of weights pruned as one group; 1 x 1 is single weights.
        scope: ranking scope.
    """

    score: Literal["magnitude", "random"] = "magnitude"
    structure: Structure = "weights"
    pattern: Block = Element
    scope: Scope = "global"

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the training that follows the pruning."""
        return [Phase(name="train", steps=size.steps)]

    def start_run(self, problem: Problem, sparsity: float) -> ActiveRun:
        """Start a run with the mask."""
        run = super().start_run(problem, sparsity)
        params = run.state.prunable_parameters()
        scores = (
            magnitude(params)
            if self.score == "magnitude"
            else random_scores(params, cpu_generator(problem.seed, "score"))
        )
        run.state.set_masks_(self.select_masks(run.state, sparsity, scores))
        return run
