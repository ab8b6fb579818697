"""One-shot pruning by weights times inputs. Wanda, Sun et al. 2024."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import Tensor

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.granularity import Structure
from sparsesoup.core.masking import Scope
from sparsesoup.core.targets import Targets
from sparsesoup.methods.base import Method
from sparsesoup.methods.pruning_at_init import prune_then_train
from sparsesoup.methods.scores.activation import for_each_block, wanda_scores, weigh_by_inputs
from sparsesoup.methods.scores.calibration import calibration_batches
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Wanda(Method):
    """Keep the weights of each row with the largest |w_ij| ||x_j||, x_j the inputs. Wanda, Sun et al. 2024.

    Args:
        batches: batches whose tokens, without padding, are the inputs.
        inputs: dense (of the pre-trained model, all matrices scored at once), or pruned (the repeated blocks are pruned
            in turn, each by its inputs after the earlier ones were pruned, as in the paper's code).
        structure: structure to prune: weights, rows, columns, heads, units, heads-and-units or features-and-units;
            groups need --method.scope global or tensor.
        scope: ranking scope; row is the weights of one output.
    """

    batches: int = 32
    inputs: Literal["dense", "pruned"] = "dense"
    structure: Structure = "weights"
    scope: Scope = "row"

    def __post_init__(self) -> None:
        require(self.batches >= 1, "batches", "at least 1", self.batches)
        if self.inputs == "pruned" and (self.structure != "weights" or self.scope in ("global", "erk")):
            raise UserError(
                f"wanda with inputs pruned ranks the weights of one block at a time: scope row, tensor or N:M, and "
                f"structure weights; got {self.scope} and {self.structure}",
                "inputs",
            )

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the scoring and a training with the mask."""
        phases = prune_then_train(self, size, sparsity, (("forward", self.batches),))
        if self.inputs == "dense":
            return phases
        in_turn = replace(phases[0], per_block=True, at_most=True, end=partial(self._prune_blocks, sparsity))
        return [in_turn, *phases[1:]]

    def _prune_blocks(self, sparsity: float, run: ActiveRun) -> None:
        state = run.state

        def prune(targets: Targets, inputs: dict[str, Tensor]) -> None:
            norms = {name: squares.sqrt() for name, squares in inputs.items()}
            masks = self.select_masks(state, sparsity, weigh_by_inputs(state.model, targets, norms))
            state.set_masks_({**state.masks, **masks})

        rows = calibration_batches(run.problem, self.batches)
        for_each_block(run.problem, state.model, rows, False, prune)

    def scores(self, problem: Problem, state: TrainState) -> dict[str, Tensor]:
        """Return the scores of the current weights."""
        return wanda_scores(problem, state.model, calibration_batches(problem, self.batches))
