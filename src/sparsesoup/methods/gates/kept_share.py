"""Gates with a learned share of groups to keep, and the penalty that moves the shares to a target. Yao et al. 2021."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsesoup.core.granularity import Block
from sparsesoup.methods.gates.density import first_gate_per_group
from sparsesoup.methods.gates.straight_through import StraightThroughGate, mask_weight
from sparsesoup.training.state import TrainState

# The published code's weight of the penalty: a constant close to the target, at least `LEAST` farther away.
NEAR, CONSTANT, LEAST = 3e-4, 10.0, 50.0


class KeptShareGate(StraightThroughGate):
    """A parametrization that keeps the ceil(sigmoid(logit) n) best-scored of n groups. Yao et al. 2021.

    Backward: dL/ds = dL/dM for every group, and dL/dlogit = the sum of dL/dM over the open ones. Groups of equal score
    open together.

    Args:
        score: score of each group, [groups], shared by the coupled members.
        logit: logit of the share to keep, shared too.
        block, coupled, member: as of a StraightThroughGate.
        alive: groups that have weights, bool [groups]; the share is one of these.
    """

    def __init__(
        self, score: Parameter, logit: Parameter, block: Block, coupled: int, member: int, alive: Tensor
    ) -> None:
        super().__init__(score, block, coupled, member)
        self.logit = logit
        self.alive: Tensor
        self.register_buffer("alive", alive)
        self.level.zero_()

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight where its group is open, 0 elsewhere."""
        product: Tensor = KeptShare.apply(weight, self.score, self.logit, self)
        return product

    def group_scores(self, weight: Tensor) -> Tensor:
        """Return logit - log-odds(rank / n) of each group, at least 0 where it is open; higher = keep.

        Shares of several gates are compared that way: raising all logits alike opens groups in this order.
        """
        assert self.score is not None
        own = self.score.detach().masked_fill(~self.alive, -torch.inf)
        count = self.alive.sum()
        rank = len(own) - torch.searchsorted(own.sort().values, own, right=True)  # the number of better groups
        odds = (rank / count.clamp_min(1)).clamp_max(1.0).logit()
        return (self.logit.detach() - odds).masked_fill(~self.alive, -torch.inf)

    def open_groups(self) -> Tensor:
        """Return a bool per group, True = open."""
        assert self.score is not None
        return self.group_scores(self.score) > self.level

    def kept_share(self) -> Tensor:
        """Return sigmoid(logit), at least one group, with its gradient."""
        return self.logit.sigmoid().clamp_min(1.0 / float(self.alive.sum().clamp_min(1)))


class KeptShare(torch.autograd.Function):
    """W' = W * M; backward: dL/ds = sum of dL/dW' * W over a group, dL/dlogit the sum of these over the open groups."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, score: Tensor, logit: Tensor, gate: KeptShareGate) -> Any:
        ctx.gate = gate
        mask = gate.open_groups()
        ctx.save_for_backward(weight, mask)
        return mask_weight(weight, mask, gate.block)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad, (weight, mask), gate = grads[0], ctx.saved_tensors, ctx.gate
        product = gate.block.sum_over_tiles(grad * weight).flatten()
        return mask_weight(grad, mask, gate.block), product, (product * mask).sum(), None


@torch.no_grad()
def shift_logits_(state: TrainState, ranked: Tensor, fit: int) -> None:
    """Raise or lower all logits alike, so that the best groups that fit are open and the others closed.

    Args:
        ranked: scores of all groups, in descending order.
        fit: how many of them fit; the first of each gate stay open even if fewer do.
    """
    finite = ranked[ranked.isfinite()]  # the first of each gate is open at any level, and what has no weights never
    if not len(finite):
        return
    fit = min(max(fit - int(torch.count_nonzero(ranked == torch.inf)), 0), len(finite))
    if fit == len(finite):
        level = finite[-1] - 1.0
    else:
        better = finite[fit - 1] if fit else finite[fit] + 1.0
        level = (finite[fit] + torch.minimum(better, finite[fit] + 1.0)) / 2
    for _, gate in first_gate_per_group(state.model).values():
        assert isinstance(gate, KeptShareGate)
        gate.logit.sub_(level)


@dataclass(frozen=True)
class MatrixShare:
    """Sources of the kept share of a matrix: rows of one gate, and the columns that another leaves to read.

    Args:
        size: weights of the matrix.
        rows: index of the coupled groups that mask it.
        columns: index of those that mask what it reads, if any.
    """

    size: int
    rows: int
    columns: int | None = None


@dataclass(frozen=True, kw_only=True)
class ShareController:
    """Penalty on the kept share above a target, with feedback on its weight: both a hook and the penalty.

    With r the kept share, sum of size * row share * column share over all matrices, and R = max(r - target, 0)^2, the
    penalty is weight * R; the weight is max(strength R / sparsity^2, 50), or 10 where R < 3e-4. Yao et al. 2021, in its
    code. Below the target nothing pulls, since the masks are trimmed at the end.

    Args:
        sparsity: share to remove; the target is the rest.
        strength: strength of the feedback.
        matrices: the matrices.
    """

    sparsity: float
    strength: float
    matrices: Sequence[MatrixShare]

    def __call__(self, state: TrainState) -> None:
        """After a step: log the share that is masked."""
        if not any(m.numel() and not m.all() for m in state.masks.values()):
            state.masked = self.masked(state)

    def masked(self, state: TrainState) -> float:
        """Return the share of the weights behind closed gates."""
        return 1.0 - float(self._kept_share(self._shares(state, hard=True)))

    def penalty_term(self, state: TrainState) -> Tensor:
        """Return the penalty for the gates as they are."""
        shares = self._shares(state, hard=False)
        excess = (self._kept_share(shares) - (1.0 - self.sparsity)).clamp_min(0.0).square()
        if not self.sparsity:
            return excess * 0.0
        far = float(excess.detach())
        weight = CONSTANT if far < NEAR else max(self.strength * far / self.sparsity**2, LEAST)
        return weight * excess

    def _shares(self, state: TrainState, hard: bool) -> dict[int, Tensor]:
        found = {}
        for coupled, (_, gate) in first_gate_per_group(state.model).items():
            assert isinstance(gate, KeptShareGate)
            found[coupled] = gate.open_groups().sum() / gate.alive.sum().clamp_min(1) if hard else gate.kept_share()
        return found

    def _kept_share(self, shares: dict[int, Tensor]) -> Tensor:
        parts = [shares[m.rows] * m.size * (1.0 if m.columns is None else shares[m.columns]) for m in self.matrices]
        return torch.stack(parts).sum() / sum(m.size for m in self.matrices)
