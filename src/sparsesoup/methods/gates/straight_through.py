"""Straight-through gate: a hard mask in the forward pass, a soft gradient in the backward pass."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparsesoup.core.granularity import Block, Element
from sparsesoup.methods.gates.score_groups import SMALL, GatePass, KeptTensors, ScoreGroup


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
        self.group: ScoreGroup | None = None
        self.index = 0
        self.opened: GatePass | None = None
        self.level: Tensor
        self.register_buffer("level", torch.tensor(-torch.inf))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight where its group is open, 0 elsewhere; in training, `share` is its term of the penalty."""
        if self.score is None:
            return weight * (weight.detach().abs() >= self.level).view(torch.int8)
        if self.shift is None or not self.training:
            return MaskStraightThrough.apply(weight, self.score, self.level, self)
        now = self.join_pass()
        return PenalisedMask.apply(weight, now.anchor, self, now.kept)

    def join_pass(self) -> GatePass:
        """Return the forward pass of the gate's group that the gate takes part in."""
        return (self.group or ScoreGroup([self])).join(self)

    @property
    def share(self) -> Tensor | None:
        """The mean of sigmoid(score - shift), for the penalty; None if the gate was not used in training."""
        return None if self.opened is None else self.opened.shares[self.index]

    @staticmethod
    def task_gradient(*kept: Tensor) -> Tensor:
        """Return dL/dscore from what the gate keeps in the backward pass: itself."""
        return kept[0]

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
        return masked_and_saved(ctx, weight, score, level)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return *masked_gradients(ctx, grads[0]), None, None


class PenalisedMask(torch.autograd.Function):
    """The same in a group of gates, which adds the gradient of the penalty."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, anchor: Tensor, gate: StraightThroughGate, kept: KeptTensors) -> Any:
        ctx.gate, ctx.kept = gate, kept
        return masked_and_saved(ctx, weight, kept.scores[gate.index], gate.level)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        of_weight, of_score = masked_gradients(ctx, grads[0])
        ctx.kept.keep(ctx.gate.index, of_score)
        return of_weight, None, None, None


def masked_and_saved(ctx: Any, weight: Tensor, score: Tensor, level: Tensor) -> Tensor:
    """Return W * M; save what the backward pass needs: a large mask is computed again there, which saves memory."""
    mask = open_groups(score, level, ctx.gate.block)
    ctx.save_for_backward(weight, score, mask if mask.numel() <= SMALL else level)
    return mask_weight(weight, mask, ctx.gate.block)


def masked_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dL/dW = dL/dW' * M, dL/dS: the sum of dL/dW' * W over each group)."""
    (weight, score, saved), gate = ctx.saved_tensors, ctx.gate
    product = grad * weight
    if gate.block != Element:
        product = gate.block.sum_over_tiles(product).flatten()
    if product.shape != score.shape:  # its own row of the shared scores
        whole = product.new_zeros(score.shape)
        whole[gate.member] = product
        product = whole
    mask = saved if saved.dtype == torch.bool else open_groups(score, saved, gate.block)
    return mask_weight(grad, mask, gate.block), product


def floor_count(count: int, floor: float) -> int:
    """Return the number of groups that stay whatever the threshold, counted as in nn_pruning; 0 without a floor."""
    return int(floor * count) + 1 if floor else 0


def open_groups(score: Tensor, level: Tensor, block: Block) -> Tensor:
    """Return a bool per group; if members have their own scores, a group is open if any member opens it."""
    mask = score >= level
    return mask.any(0) if block != Element and score.dim() == 2 else mask


def mask_weight(weight: Tensor, mask: Tensor, block: Block) -> Tensor:
    """Return the weight where the mask of its group is True, 0 elsewhere."""
    if mask.shape == weight.shape:
        return weight * mask.view(torch.int8)
    rows, cols = block.tile_shape(weight.shape)
    # Whole rows at a time: a product over tiles has strides as short as a tile is wide and takes four times as long.
    lines = mask.to(weight.dtype).view(weight.shape[0] // rows, -1).repeat_interleave(cols, 1)
    return (weight.view(len(lines), rows, -1) * lines[:, None]).view(weight.shape)
