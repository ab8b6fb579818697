"""Penalised gates in groups: what many small matrices would each do in a step is done once for all of them."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors  # one operation for a whole group

from sparsesoup.core.granularity import Block, Element

SAMPLE = 1 << 14  # scores sampled for the value of a penalty; its gradient is exact
SMALL = 1 << 14  # scores of a gate that joins a group; larger ones are not copied
REGISTERS = 64  # a multiple of the floats that a vectorized loop takes at once, on every CPU
TOTAL = 1 << 18  # scores of a group, which fit the cache


class PenalisedGate(Protocol):
    """A gate with a penalty on the mean of sigmoid(score - shift)."""

    score: Any
    shift: float | None
    block: Block
    group: "ScoreGroup | None"
    index: int
    opened: "GatePass | None"

    @staticmethod
    def task_gradient(*kept: Tensor) -> Tensor:
        """Return dL/dscore, in a tensor of its own, from what the gate keeps in the backward pass."""


class GatePass:
    """A forward pass of a group, open until its backward pass begins or the penalty is taken.

    Args:
        kept: filled by the gates in the backward pass.
        anchor: each gate depends on it, so that the group's gradients are computed after those of its gates.
        shares: mean probability of an open gate, [gates], for the penalty.
    """

    def __init__(self, kept: "KeptTensors", anchor: Tensor, shares: Tensor) -> None:
        self.kept, self.anchor, self.shares = kept, anchor, shares

    def __deepcopy__(self, memo: Any) -> None:
        """Leave it out of copies: it belongs to the graph of one pass."""


class ScoreGroup:
    """Gates whose penalty and gradients of scores are computed in one tensor.

    Args:
        gates: the gates, in the order of the model, of one kind and with one shift.
    """

    def __init__(self, gates: Sequence[PenalisedGate]) -> None:
        self.gates = list(gates)
        self._open: GatePass | None = None
        for index, gate in enumerate(self.gates):
            gate.group, gate.index = self, index

    def join(self, gate: PenalisedGate) -> GatePass:
        """Return the pass that the gate takes part in: the open one, or a new one if that has begun another use."""
        now = self._open
        in_graph = torch.is_grad_enabled() and gate.score.requires_grad
        if now is None or now.anchor.requires_grad != in_graph or not now.kept.takes(gate):
            scores = [one.score for one in self.gates]
            kept = KeptTensors(scores, float(gate.shift or 0.0), gate.task_gradient)
            now = self._open = GatePass(kept, *GroupedScores.apply(kept, *scores))
        now.kept.used.add(gate.index)
        gate.opened = now
        return now


class KeptTensors:
    """Tensors that the gates of a pass keep for its backward pass, and the gradients computed from them.

    Args:
        scores: scores of all gates of the group.
        shift: of the penalty.
        task_gradient: returns dL/dscore, in a tensor of its own, from what gates keep.
    """

    def __init__(self, scores: Sequence[Tensor], shift: float, task_gradient: Callable[..., Tensor]) -> None:
        self.scores, self.shift, self.task_gradient = scores, shift, task_gradient
        self.alone = len(scores) == 1
        self._order = sorted(range(len(scores)), key=lambda index: scores[index].numel())
        self.used: set[int] = set()
        self._versions = [score._version for score in scores]
        self._parts: dict[int, tuple[Tensor, ...]] = {}
        self._begun = False

    def takes(self, gate: PenalisedGate) -> bool:
        """Return False if the gate is in the pass, its scores have changed since, or the backward pass has begun."""
        index = gate.index
        same = self.scores[index] is gate.score and self._versions[index] == gate.score._version
        return same and index not in self.used and not self._begun

    def keep(self, index: int, *parts: Tensor) -> None:
        """Keep tensors of a gate, each of the shape of its scores; of a gate alone, the gradient at once."""
        self._begun = True
        self._parts[index] = (self.task_gradient(*parts),) if self.alone else parts

    def shares(self) -> Tensor:
        """Return the mean probability of an open gate for each gate."""
        if self.alone:
            self._flat = self.scores[0]
            return mean_gate_probability(self._flat, self.shift)[None]
        self._flat = _join([self.scores[index] for index in self._order])
        open_ = (self._flat - self.shift).sigmoid_()
        means, begin = [], 0
        for size, run in groupby(self._order, key=lambda index: self.scores[index].numel()):
            count = len(list(run))
            means.append(open_[begin : begin + count * size].view(count, size).mean(1))
            begin += count * size
        ranks = sorted(range(len(self.scores)), key=self._order.__getitem__)
        return torch.cat(means)[torch.tensor(ranks, device=open_.device)]

    def gradients(self, pulls: Tensor | None) -> list[Tensor | None]:
        """Return the gradient of the scores of each gate of the pass, that of the penalty included; None for others.

        Args:
            pulls: dL/dshare of each gate.
        """
        parts, self._parts = self._parts, {}
        due = parts.keys() if pulls is None else parts.keys() | self.used
        indices = [index for index in self._order if index in due]
        found: list[Tensor | None] = [None] * len(self.scores)
        if not indices:
            return found
        some = [self.scores[index] for index in indices]
        slope = self._task_gradients(parts, indices)
        if pulls is not None:
            each = pulls[0] / some[0].numel() if self.alone else _spread(pulls, indices, some)
            flat = self._flat if len(indices) == len(self.scores) else _join(some)
            add_penalty_gradient_(slope, flat, self.shift, each)
        if self.alone:
            return [slope]
        for index, part in zip(indices, _unflatten_dense_tensors(slope, some), strict=True):
            found[index] = part
        return found

    def _task_gradients(self, parts: dict[int, tuple[Tensor, ...]], indices: Sequence[int]) -> Tensor:
        """Return the gradients of the loss at these indices; 0 at those whose weights did not reach it."""
        if not parts:
            return torch.zeros_like(_join([self.scores[index] for index in indices]))
        count = len(next(iter(parts.values())))
        table = [parts.get(index) or (torch.zeros_like(self.scores[index]),) * count for index in indices]
        flat = [_join(column) for column in zip(*table, strict=True)]
        return flat[0] if self.alone else self.task_gradient(*flat)


class GroupedScores(torch.autograd.Function):
    """The scores of a group in the graph: returns an anchor for its gates, and their shares."""

    @staticmethod
    def forward(ctx: Any, kept: KeptTensors, *scores: Tensor) -> tuple[Tensor, Tensor]:
        ctx.kept = kept
        ctx.set_materialize_grads(False)
        return scores[0].new_zeros(()), kept.shares()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, *ctx.kept.gradients(grads[1])


def group_gates(gates: Iterable[PenalisedGate]) -> None:
    """Put penalised gates into groups: runs of small ones on single weights; each of the others has its own."""
    run: list[PenalisedGate] = []
    for gate in gates:
        if gate.shift is None:
            continue
        alike = bool(run) and type(gate) is type(run[0]) and gate.shift == run[0].shift
        if not alike or not _is_small(gate) or sum(one.score.numel() for one in (*run, gate)) > TOTAL:
            run = []
        run = [*run, gate] if _is_small(gate) else [gate]
        ScoreGroup(run)
        if not _is_small(gate):
            run = []


def _is_small(gate: PenalisedGate) -> bool:
    # Torch rounds the last entries of a tensor, those that do not fill its vector registers, in another way. A gate
    # whose length is a multiple of REGISTERS has none of them, so its bits do not depend on its index in the group.
    return gate.block == Element and gate.score.numel() <= SMALL and gate.score.numel() % REGISTERS == 0


def shares_of(gates: Sequence[PenalisedGate]) -> Tensor:
    """Return the mean probability of an open gate for each of these gates of one pass."""
    assert gates[0].opened is not None
    shares = gates[0].opened.shares
    every = len(gates) == len(shares)
    return shares if every else shares[torch.tensor([gate.index for gate in gates], device=shares.device)]


def mean_gate_probability(score: Tensor, shift: float | None) -> Tensor:
    """Return the mean sigmoid(score - shift), on a sample of many scores; only the log uses its value."""
    if shift is None:
        return score.new_zeros(())
    stride = max(1, score.numel() // SAMPLE)
    some = score.detach().flatten()[::stride] if stride > 1 else score.detach()
    return (some - shift).sigmoid_().mean()


def add_penalty_gradient_(slope: Tensor, score: Tensor, shift: float, pull: Tensor) -> None:
    """Add the gradient of pull * sum of sigmoid(score - shift) to the task's gradient.

    Done while the task's gradient is in the cache: a separate loss term would need another tensor of the scores' size.
    """
    open_ = (score - shift).sigmoid_()
    slope.add_(open_.addcmul_(open_, open_, value=-1).mul_(pull))


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors one behind the other; a single one as it is."""
    return tensors[0] if len(tensors) == 1 else _flatten_dense_tensors(tensors)


def _spread(pulls: Tensor, indices: Sequence[int], scores: Sequence[Tensor]) -> Tensor:
    """Return the pull on each score of these gates."""
    sizes = torch.tensor([score.numel() for score in scores], device=pulls.device)
    return (pulls[torch.tensor(indices, device=pulls.device)] / sizes).repeat_interleave(sizes)
