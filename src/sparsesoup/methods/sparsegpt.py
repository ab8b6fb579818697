"""SparseGPT: one-shot pruning that updates the weights that stay, block by block."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.masking import check_rows, fixed_sparsity, topk_masks
from sparsesoup.core.targets import Targets, target_parameters
from sparsesoup.methods.base import Method
from sparsesoup.methods.scores import magnitude
from sparsesoup.methods.scores.activation import for_each_block
from sparsesoup.methods.scores.calibration import calibration_batches
from sparsesoup.methods.scores.sparsegpt import BLOCK, sparsegpt
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize


@dataclass(frozen=True, kw_only=True)
class SparseGpt(Method):
    """Prune each matrix once and update its other weights to compensate. SparseGPT, Frantar & Alistarh 2023.

    The repeated blocks are pruned in turn, each by its inputs after the earlier blocks were pruned. With --steps 0
    that is all, as in the paper; otherwise training with the masks follows.

    Args:
        batches: batches whose tokens, without padding, are the inputs.
        columns: columns of a matrix whose weights compete with each other.
        damp: share of the mean of the Hessian's diagonal that is added to the diagonal.
        scope: ranking scope: tensor, every matrix at the same sparsity; or N:M.
    """

    batches: int = 32
    columns: int = BLOCK
    damp: float = 0.01
    scope: Literal["tensor", "1:4", "2:4", "4:8"] = "tensor"

    def __post_init__(self) -> None:
        require(self.batches >= 1, "batches", "at least 1", self.batches)
        require(self.columns >= 1, "columns", "at least 1", self.columns)
        require(0.0 < self.damp < 1.0, "damp", "in (0, 1)", self.damp)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the pruning and a training with the masks."""
        end = partial(self._prune_blocks, sparsity)
        score = Phase(name="score", scores=(("inputs", self.batches),), per_block=True, at_most=True, end=end)
        return [score, Phase(name="train", steps=size.steps)]

    def check(self, problem: Problem, sparsity: float) -> None:
        """Raise a UserError if a target is a stack of matrices, or does not fit N:M."""
        for name, target in problem.targets.items():
            if len(target.shape) != 2:
                raise UserError(f"sparsegpt prunes matrices, {name} is a stack of them {target.shape}; use magnitude")
            check_rows(self.scope, target.shape[::-1] if target.transposed else target.shape, name)

    def _prune_blocks(self, sparsity: float, run: ActiveRun) -> None:
        problem, state = run.problem, run.state
        if fixed_sparsity(self.scope) is None:
            plain = topk_masks(magnitude(state.prunable_parameters()), sparsity, scope="tensor")
            shares = {name: 1 - float(mask.sum()) / mask.numel() for name, mask in plain.items()}
        else:
            shares = dict.fromkeys(problem.targets, sparsity)

        def prune(targets: Targets, inputs: dict[str, Tensor]) -> None:
            weights, masks = {}, {}
            for name, parameter in target_parameters(state.model, targets).items():
                turned = targets[name].transposed
                matrix = parameter.detach().T if turned else parameter.detach()
                scope = "global" if self.scope == "tensor" else self.scope
                new, kept = sparsegpt(matrix, inputs[name], shares[name], scope, self.columns, self.damp)
                weights[name], masks[name] = (new.T, kept.T.contiguous()) if turned else (new, kept)
            state.prune_and_update_(masks, weights)

        rows = calibration_batches(problem, self.batches)
        for_each_block(problem, state.model, rows, True, prune)
