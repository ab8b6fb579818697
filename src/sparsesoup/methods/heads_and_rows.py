"""Heads and rows as groups, the share of the weights that they leave, and masks trimmed to it. Yao et al. 2021."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsesoup.core.granularity import Column, CoupledGroups, Row
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import Masks
from sparsesoup.core.masks import sparsity as sparsity_of
from sparsesoup.core.schedules import CubicSchedule
from sparsesoup.core.targets import Targets, attention_head_groups, feed_forward_groups
from sparsesoup.methods.gates.attach import gates_of, weight_scores
from sparsesoup.methods.gates.density import first_gate_per_group, group_scores
from sparsesoup.methods.gates.kept_share import KeptShareGate, MatrixShare, ShareController, shift_logits_
from sparsesoup.methods.live_features import OUT_OF, close_dead_inputs
from sparsesoup.training.state import TrainState

FIRST = 1e6  # above any finite score of a tile: logits and log-odds
Ranking = Callable[[TrainState, float], tuple[Tensor, int]]  # share of the way -> ranked scores, how many fit


def head_and_row_groups(targets: Targets) -> tuple[CoupledGroups, ...]:
    """Return coupled groups: heads of query, key and value, and rows of each other matrix, gated ones together."""
    found = [_without_outputs(coupled, targets) for coupled in attention_head_groups(targets)]
    for coupled in feed_forward_groups(targets):
        found.append(_without_outputs(coupled, targets))
    taken = {name for coupled in found for name, _ in coupled.members}
    rows = {name: Column if target.transposed else Row for name, target in targets.items() if name not in taken}
    return (*found, *(CoupledGroups(((name, row),)) for name, row in rows.items()))


def _without_outputs(coupled: CoupledGroups, targets: Targets) -> CoupledGroups:
    return CoupledGroups(tuple(member for member in coupled.members if targets[member[0]].role not in OUT_OF))


def matrix_shares(groups: tuple[CoupledGroups, ...], targets: Targets) -> list[MatrixShare]:
    """Return where the kept share of each matrix comes from."""
    owner = {name: number for number, coupled in enumerate(groups) for name, _ in coupled.members}
    feeds = dict[str, int]()
    for coupled in [*attention_head_groups(targets), *feed_forward_groups(targets)]:
        into = next(owner[name] for name, _ in coupled.members if targets[name].role not in OUT_OF)
        feeds |= {name: into for name, _ in coupled.members if targets[name].role in OUT_OF}
    return [MatrixShare(math.prod(target.shape), owner[n], feeds.get(n)) for n, target in targets.items()]


def kept_weights(matrices: Sequence[MatrixShare], counts: Sequence[int], left: Sequence[int]) -> int:
    """Return the number of weights left where `left` of `counts` groups are, for each of the coupled groups."""
    return sum(
        m.size * left[m.rows] // counts[m.rows]
        if m.columns is None
        else m.size * left[m.rows] * left[m.columns] // (counts[m.rows] * counts[m.columns])
        for m in matrices
    )


def rank_heads_and_rows(
    groups: tuple[CoupledGroups, ...],
    matrices: Sequence[MatrixShare],
    sparsity: float,
    state: TrainState,
    progress: float,
) -> tuple[Tensor, int]:
    """Return (scores of all groups in descending order, how many of the best fit at a share of the sparsity)."""
    flat, order, fit = _best_heads_and_rows(groups, matrices, sparsity * progress, state)
    return flat[order], fit


def _best_heads_and_rows(
    groups: tuple[CoupledGroups, ...], matrices: Sequence[MatrixShare], sparsity: float, state: TrainState
) -> tuple[Tensor, Tensor, int]:
    """Return (scores of all groups, their descending order, how many of the best fit)."""
    scores = group_scores(state)
    flat = torch.cat([scores[coupled] for coupled in range(len(groups))])
    counts = [len(scores[coupled]) for coupled in range(len(groups))]
    order = flat.argsort(descending=True, stable=True)
    owner = torch.arange(len(groups)).repeat_interleave(torch.tensor(counts))[order.cpu()]
    budget = round((1.0 - sparsity) * sum(m.size for m in matrices))
    low, high = len(groups), len(flat) + 1  # the first of each come first, and are known to fit
    while high - low > 1:
        middle = (low + high) // 2
        left = torch.bincount(owner[:middle], minlength=len(groups)).tolist()
        low, high = (middle, high) if kept_weights(matrices, counts, left) <= budget else (low, middle)
    return flat, order, low


def trim_heads_and_rows(
    groups: tuple[CoupledGroups, ...], matrices: Sequence[MatrixShare], sparsity: float, state: TrainState
) -> Masks:
    """Return the masks of the best heads and rows that fit, as if all logits were raised or lowered alike."""
    flat, order, fit = _best_heads_and_rows(groups, matrices, sparsity, state)
    kept = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    kept[order[:fit]] = True
    shapes = {name: target.shape for name, target in state.targets.items()}
    counts = [coupled.num_groups(shapes) for coupled in groups]
    masks: Masks = {}
    for coupled, part in zip(groups, kept.split(counts), strict=True):
        masks |= coupled.expand_to_weights(part, shapes)
    return close_dead_inputs({name: masks[name] for name in state.targets}, state.targets)


class TileSizes:
    """Weights in each tile of the matrices, among what is left, and the best tiles that fit.

    Args:
        groups: tiles of each matrix, in the order of the gates.
        sparsity: share of all weights to remove.
    """

    def __init__(self, groups: tuple[CoupledGroups, ...], sparsity: float) -> None:
        self.groups, self.sparsity = groups, sparsity
        self._masks: Masks | None = None
        self._sizes = torch.zeros(0)

    def rank(self, state: TrainState, progress: float) -> tuple[Tensor, int]:
        """Return (scores of all tiles in descending order, how many of the best fit at a share of the way)."""
        scores, sizes = group_scores(state), self._sizes_of(state)
        ranked, order = torch.cat([scores[coupled] for coupled in range(len(self.groups))]).sort(
            descending=True, stable=True
        )
        left, total = sizes.sum(), sum(mask.numel() for mask in state.masks.values())
        budget = left - progress * (left - round((1.0 - self.sparsity) * total)).clamp_min(0.0)
        return ranked, int((sizes[order].cumsum(0) <= budget).sum())

    def masked(self, state: TrainState) -> float:
        """Return the share of all weights that masks and closed gates remove."""
        gates, sizes = first_gate_per_group(state.model), self._sizes_of(state)
        opened = torch.cat([gates[coupled][1].open_groups() for coupled in range(len(self.groups))])
        return 1.0 - float(sizes[opened].sum()) / sum(mask.numel() for mask in state.masks.values())

    def _sizes_of(self, state: TrainState) -> Tensor:
        if self._masks is not state.masks:
            whole = {name: mask.double() for name, mask in state.masks.items()}
            sizes = [
                coupled.sum_over_groups({name: whole[name] for name, _ in coupled.members}) for coupled in self.groups
            ]
            self._masks, self._sizes = state.masks, torch.cat([size.flatten() for size in sizes])
        return self._sizes


def block_penalty(strength: float, sparsity: float, state: TrainState) -> Tensor:
    """Return the penalty of the second stage: shares are those of what the first one left."""
    matrices = [
        MatrixShare(int(torch.count_nonzero(mask)), coupled) for coupled, mask in enumerate(state.masks.values())
    ]
    left = sum(m.size for m in matrices) / sum(mask.numel() for mask in state.masks.values())
    rest = max(0.0, 1.0 - (1.0 - sparsity) / left)
    return ShareController(sparsity=rest, strength=strength, matrices=matrices).penalty_term(state)


def trim_blocks(groups: tuple[CoupledGroups, ...], sparsity: float, state: TrainState) -> Masks:
    """Return the masks of the best tiles that fit, among what the first stage left."""
    scores = {name: score.double() for name, score in weight_scores(state).items()}
    for name, gate in gates_of(state.model):
        if isinstance(gate, KeptShareGate) and name in scores:  # where not even the first tiles of all matrices fit
            scores[name].masked_fill_(scores[name] == torch.inf, FIRST + float(gate.logit.detach()))
    return topk_masks(scores, max(sparsity, sparsity_of(state.masks)), pattern=groups, within=state.masks)


def follow_schedule(
    schedule: CubicSchedule, start: int, rank: Ranking, masked: Callable[[TrainState], float], state: TrainState
) -> None:
    """After a step: raise or lower all logits alike to the share of the schedule, which begins at `start`."""
    if progress := schedule.sparsity_at(state.step - start, 1.0):
        shift_logits_(state, *rank(state, progress))
    state.masked = masked(state)
