"""SparseGPT: prune a matrix, and let the weights that stay make up for those that go."""

import torch
from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.core.masking import Scope, fixed_sparsity, topk_masks
from sparsesoup.core.topk import topk_exact

BLOCK = 128  # columns whose weights compete with each other


@torch.no_grad()
def sparsegpt(
    weight: Tensor, hessian: Tensor, sparsity: float, scope: Scope = "global", block: int = BLOCK, damp: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Return (new weights, mask) of a linear layer. Frantar & Alistarh 2023, alg. 1.

    Columns are visited from the left. What is pruned is made up for, as well as possible in the least squares sense,
    by the columns to its right (optimal brain surgeon with one Hessian for all rows).

    Args:
        weight: [out, in].
        hessian: sum of x x^T over the inputs of the layer, [in, in], in any scale.
        sparsity: share of the weights to remove: exactly round(sparsity * out * in) of them.
        scope: global (all weights of a block of columns compete), or N:M along each row.
        block: columns of a block.
        damp: share of the mean of the Hessian's diagonal that is added to the diagonal.
    Raises: UserError if the Hessian is not finite.

    >>> new, mask = sparsegpt(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), torch.eye(4), 0.5)
    >>> mask.tolist(), new.tolist()
    ([[True, False, False, True]], [[3.0, 0.0, 0.0, 4.0]])
    """
    if not bool(hessian.isfinite().all()):
        raise UserError("the inputs of a layer have NaN or infinite values; check the checkpoint and the batches")
    rows, columns = weight.shape
    new, mask = weight.float().clone(), torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    factor = _inverse_factor(new, hessian.float().clone(), damp)
    group = 0 if fixed_sparsity(scope) is None else int(scope.partition(":")[2])
    gone = 0
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        errors = torch.zeros(rows, end - begin, device=new.device)
        if not group:
            count = round(sparsity * rows * end) - gone
            mask[:, begin:end] = _best_of_block(new, factor, begin, end, count)
            gone += count
        for j in range(begin, end):
            if group and j % group == 0:
                score = _saliency(new, factor, j, min(j + group, columns))
                mask[:, j : j + group] = topk_masks({"": score}, fixed_sparsity(scope) or 0.0, scope=scope)[""]
            error = (new[:, j] * ~mask[:, j]) / factor[j, j]
            new[:, j:end] -= error[:, None] * factor[j, j:end]
            errors[:, j - begin] = error
        new[:, end:] -= errors @ factor[begin:end, end:]
    return new.masked_fill(~mask, 0.0).to(weight.dtype), mask


def _saliency(new: Tensor, factor: Tensor, begin: int, end: int) -> Tensor:
    """Return the growth of the squared error for each weight of some columns if it is removed."""
    return (new[:, begin:end] / factor.diagonal()[begin:end]).square()


def _best_of_block(new: Tensor, factor: Tensor, begin: int, end: int, gone: int) -> Tensor:
    score = _saliency(new, factor, begin, end).contiguous()
    return topk_exact([score], score.numel() - gone)[0]


def _inverse_factor(new: Tensor, hessian: Tensor, damp: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse Hessian; weights of inputs that are always 0 are set to 0."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    new[:, dead] = 0.0
    diagonal += damp * diagonal.mean()
    lower = torch.linalg.cholesky(hessian)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
