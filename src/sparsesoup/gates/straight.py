"""The straight-through gate: a hard mask in the forward pass, a gradient as if it were soft."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparsesoup.patterns import Block, Element


class Gate(nn.Module):
    """A parametrization that lets through the groups whose score is at least a level. Sanh et al. 2020, eq. 4.

    Args:
        score: what each group is worth, shared by the members of a tie: as the weight [out, in] for single weights,
            else [groups]; [members, groups] where each member has its own and any of them opens the group. None: |w|.
        block: what falls together in this member; on a bias, one entry each.
        tie, member: which of the model's ties this is, and which place it has there.
    """

    def __init__(self, score: Parameter | None, block: Block, tie: int, member: int) -> None:
        super().__init__()
        self.score, self.block, self.tie, self.member = score, block, tie, member
        self.level: Tensor
        self.register_buffer("level", torch.tensor(-torch.inf))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight where its group is open, 0 elsewhere."""
        if self.score is None:
            return weight * (weight.detach().abs() >= self.level).view(torch.int8)
        product: Tensor = Through.apply(weight, self.score, self.level, self)
        return product

    def worth(self, weight: Tensor) -> Tensor:
        """What each group is worth, higher = keep."""
        if self.score is None:
            return weight.detach().abs()
        own = self.score.detach()
        return own if self.block == Element else own.amax(0) if own.dim() == 2 else own

    def scale(self, weight: Tensor) -> Tensor:
        """What the gate lets through of each weight when nothing is random: 1 where it is open, else 0."""
        return self.spread((self.worth(weight) >= self.level).to(weight.dtype), weight.shape)

    def spread(self, groups: Tensor, shape: torch.Size) -> Tensor:
        """The value of each group at all of its weights."""
        if self.block == Element or len(shape) == 1:
            return groups.view(shape)
        rows, cols = self.block.tile(shape)
        return self.block.spread(groups.view(shape[0] // rows, shape[1] // cols), shape)


class Through(torch.autograd.Function):
    """W' = W * M; back: dL/dS = the sum of dL/dW' * W over a group, everywhere; dL/dW = dL/dW' * M.

    Masks are multiplied as bytes: half the time of a product with booleans, and no copy of them as floats.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, score: Tensor, level: Tensor, gate: Gate) -> Tensor:
        mask = score.detach() >= level
        if gate.block != Element and score.dim() == 2:
            mask = mask.any(0)
        ctx.gate, ctx.shape = gate, score.shape
        ctx.save_for_backward(weight, mask)
        return masked(weight, mask, gate.block)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (weight, mask), gate = grads, ctx.saved_tensors, ctx.gate
        product = grad * weight
        if gate.block != Element and weight.dim() == 2:
            product = gate.block.total(product).flatten()
        if product.shape != ctx.shape:  # its own row of the tie's scores
            whole = product.new_zeros(ctx.shape)
            whole[gate.member] = product
            product = whole
        return masked(grad, mask, gate.block), product, None, None


def masked(weight: Tensor, mask: Tensor, block: Block) -> Tensor:
    """The weight where the mask of its group is True, 0 elsewhere."""
    if mask.shape == weight.shape:
        return weight * mask.view(torch.int8)
    rows, cols = block.tile(weight.shape)
    grid = (weight.shape[0] // rows, rows, weight.shape[1] // cols, cols)
    return (weight.view(grid) * mask.to(weight.dtype).view(grid[0], 1, grid[2], 1)).view(weight.shape)
