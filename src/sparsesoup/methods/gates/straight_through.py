"""Straight-through gate: a hard mask in the forward pass, a soft gradient in the backward pass."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparsesoup.core.granularity import Block, Element

SAMPLE = 1 << 14  # scores sampled for the value of a penalty; its gradient is exact


class StraightThroughGate(nn.Module):
    """A parametrization that keeps groups with a score of at least a threshold. Sanh et al. 2020, eq. 4.

    Args:
        score: score of each group, shared by the coupled members: as the weight [out, in] for single weights, else
            [groups]; [members, groups] if each member has its own and any of them opens the group. None: |w|.
        block: tile of weights masked together in this member.
        coupled, member: index of the coupled groups in the model, and of this member in them.
        shift: the penalty on this gate is the mean of sigmoid(score - shift); None: no penalty.
    """

    def __init__(
        self, score: Parameter | None, block: Block, coupled: int, member: int, shift: float | None = None
    ) -> None:
        super().__init__()
        self.score, self.block, self.coupled, self.member = score, block, coupled, member
        self.shift = shift if member == 0 else None  # once per coupled groups
        self.share: Tensor | None = None
        self.level: Tensor
        self.register_buffer("level", torch.tensor(-torch.inf))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight where its group is open, 0 elsewhere; in training, store the penalty in `share`."""
        if self.score is None:
            return weight * (weight.detach().abs() >= self.level).view(torch.int8)
        if self.shift is None:
            return MaskStraightThrough.apply(weight, self.score, self.level, self)
        product, share = PenalisedMask.apply(weight, self.score, self.level, self)
        if self.training:
            self.share = share
        return product

    def group_scores(self, weight: Tensor) -> Tensor:
        """Return the score of each group, higher = keep."""
        if self.score is None:
            return weight.detach().abs()
        own = self.score.detach()
        return own if self.block == Element else own.amax(0) if own.dim() == 2 else own

    def open_groups(self) -> Tensor:
        """Return a bool per group, True = open; not for gates on |w|."""
        assert self.score is not None
        return open_groups(self.score, self.level, self.block)

    def floored_threshold(self, level: Tensor, floor: float) -> Tensor:
        """Return the threshold, lowered if needed so that just over a share `floor` of the groups is open."""
        assert self.score is not None
        worth = self.group_scores(self.score).flatten()
        least = floor_count(len(worth), floor)
        return worth.topk(least).values[-1] if int((worth >= level).sum()) < least else level

    def mean_gate(self, weight: Tensor) -> Tensor:
        """Return the deterministic gate of each weight: 1 where it is open, else 0."""
        return self.expand_to_weights((self.group_scores(weight) >= self.level).to(weight.dtype), weight.shape)

    def expand_to_weights(self, groups: Tensor, shape: torch.Size) -> Tensor:
        """Return the value of each group at all of its weights."""
        return self.block.expand_to_weights(groups, shape)


class MaskStraightThrough(torch.autograd.Function):
    """W' = W * M; backward: dL/dS = the sum of dL/dW' * W over a group, everywhere; dL/dW = dL/dW' * M.

    Masks are multiplied as bytes: half the time of a product with booleans, and no float copy of them.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, score: Tensor, level: Tensor, gate: StraightThroughGate) -> Any:
        ctx.gate = gate
        ctx.save_for_backward(weight, score, level)  # the mask is recomputed in the backward pass to save memory
        return mask_weight(weight, open_groups(score, level, gate.block), gate.block)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad, (weight, score, level), gate = grads[0], ctx.saved_tensors, ctx.gate
        product = grad * weight
        if gate.block != Element:
            product = gate.block.sum_over_tiles(product).flatten()
        if product.shape != score.shape:  # its own row of the shared scores
            whole = product.new_zeros(score.shape)
            whole[gate.member] = product
            product = whole
        return (
            mask_weight(grad, open_groups(score, level, gate.block), gate.block),
            product if gate.shift is None else add_penalty_gradient_(product, score, gate.shift, grads[1]),
            None,
            None,
        )


class PenalisedMask(MaskStraightThrough):
    """The same, with the mean probability of an open gate as a second output, for the penalty."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, score: Tensor, level: Tensor, gate: StraightThroughGate) -> Any:
        return MaskStraightThrough.forward(ctx, weight, score, level, gate), mean_gate_probability(score, gate.shift)


def floor_count(count: int, floor: float) -> int:
    """Return the number of groups that stay whatever the threshold, counted as in nn_pruning; 0 without a floor."""
    return int(floor * count) + 1 if floor else 0


def open_groups(score: Tensor, level: Tensor, block: Block) -> Tensor:
    """Return a bool per group; if members have their own scores, a group is open if any member opens it."""
    mask = score >= level
    return mask.any(0) if block != Element and score.dim() == 2 else mask


def mean_gate_probability(score: Tensor, shift: float | None) -> Tensor:
    """Return the mean sigmoid(score - shift), on a sample of many scores; only the log uses its value."""
    if shift is None:
        return score.new_zeros(())
    stride = max(1, score.numel() // SAMPLE)
    some = score.detach().flatten()[::stride] if stride > 1 else score.detach()
    return (some - shift).sigmoid_().mean()


def add_penalty_gradient_(slope: Tensor, score: Tensor, shift: float | None, pull: Tensor) -> Tensor:
    """Add the gradient of pull * mean sigmoid(score - shift) to the task's gradient.

    Done while the task's gradient is in the cache: a separate loss term would need another tensor of the scores' size.
    """
    if shift is not None:
        open_ = (score - shift).sigmoid_()
        slope.add_(open_.addcmul_(open_, open_, value=-1).mul_(pull / score.numel()))
    return slope


def mask_weight(weight: Tensor, mask: Tensor, block: Block) -> Tensor:
    """Return the weight where the mask of its group is True, 0 elsewhere."""
    if mask.shape == weight.shape:
        return weight * mask.view(torch.int8)
    rows, cols = block.tile_shape(weight.shape)
    # Whole rows at a time: a product over tiles has strides as short as a tile is wide and takes four times as long.
    lines = mask.to(weight.dtype).view(weight.shape[0] // rows, -1).repeat_interleave(cols, 1)
    return (weight.view(len(lines), rows, -1) * lines[:, None]).view(weight.shape)
