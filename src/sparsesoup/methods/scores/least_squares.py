"""Least squares: new values of the weights that stay, so that a layer's outputs change little."""

import torch
from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.core.targets import Targets


@torch.no_grad()
def fit_kept_weights(weight: Tensor, gram: Tensor, mask: Tensor, iterations: int, damp: float = 0.01) -> Tensor:
    """Return the kept weights of a linear layer that best reproduce its outputs before pruning.

    Minimizes trace((V - W) H (V - W)^T) over the matrices V with this mask, H the Gram matrix of the inputs: the
    layer's squared error, row by row (Hassibi & Stork 1993, for a given mask). Conjugate gradients from the pruned W,
    preconditioned with the diagonal of H; every iteration lowers the error, and needs one product with H.

    Args:
        weight: W [out, in].
        gram: H [in, in], sum of x x^T over the inputs, in any scale.
        mask: the kept weights [out, in], True = kept.
        iterations: steps of conjugate gradients; 0 returns the kept weights as they are.
        damp: share of the mean of H's diagonal that is added to the diagonal.
    Returns: V [out, in], 0 where pruned.
    Raises: UserError if H is not finite.

    >>> V = fit_kept_weights(torch.tensor([[1.0, 2.0]]), torch.ones(2, 2), torch.tensor([[True, False]]), 1, damp=0.0)
    >>> V.tolist()
    [[3.0, 0.0]]
    """
    if not bool(gram.isfinite().all()):
        raise UserError("the inputs of a layer have NaN or infinite values; check the checkpoint and the batches")
    with torch.autocast(weight.device.type, enabled=False):
        return _conjugate_gradients(weight.float(), gram.float().clone(), mask.float(), iterations, damp)


def _conjugate_gradients(weight: Tensor, gram: Tensor, mask: Tensor, iterations: int, damp: float) -> Tensor:
    diagonal = gram.diagonal()
    scale = diagonal.mean()
    diagonal += damp * scale if scale > 0 else 1.0
    found = weight * mask
    residual = ((weight - found) @ gram) * mask
    scaled = residual / diagonal.clamp_min(torch.finfo(gram.dtype).tiny)
    direction, size = scaled, (residual * scaled).sum(1, keepdim=True)
    for _ in range(iterations):
        image = (direction @ gram) * mask
        step = _ratio(size, (direction * image).sum(1, keepdim=True))
        found = found + step * direction
        residual = residual - step * image
        scaled = residual / diagonal.clamp_min(torch.finfo(gram.dtype).tiny)
        before, size = size, (residual * scaled).sum(1, keepdim=True)
        direction = scaled + _ratio(size, before) * direction
    return found


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return the ratio of two numbers that are at least 0; 0 where a row has converged."""
    return torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 0.0)


def fit_flops(targets: Targets, iterations: int) -> int:
    """Return the FLOPs of `fit_kept_weights` on all targets: a product with H for the residual, and one an iteration.

    >>> from sparsesoup.core.targets import Target
    >>> fit_flops({"w": Target("other", (3, 5))}, 1)
    300
    """
    sides = [t.shape[::-1] if t.transposed else t.shape for t in targets.values()]
    return sum(2 * rows * columns * columns * (iterations + 1) for rows, columns in sides)
