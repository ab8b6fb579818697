"""Heads and rows as groups, the share of the weights that they leave, and masks trimmed to it. Yao et al. 2021."""

import math
from collections.abc import Sequence

import torch

from sparsesoup.core.granularity import Column, CoupledGroups, Row
from sparsesoup.core.masks import Masks
from sparsesoup.core.targets import Targets, attention_head_groups, feed_forward_groups
from sparsesoup.methods.gates.density import group_scores
from sparsesoup.methods.gates.kept_share import MatrixShare
from sparsesoup.methods.live_features import OUT_OF, close_dead_inputs
from sparsesoup.training.state import TrainState


def head_and_row_groups(targets: Targets) -> tuple[CoupledGroups, ...]:
    """Return coupled groups: heads of query, key and value, and rows of each other matrix, gated ones together."""
    found = [_without_outputs(tie, targets) for tie in attention_head_groups(targets)]
    for tie in feed_forward_groups(targets):
        found.append(_without_outputs(tie, targets))
    taken = {name for tie in found for name, _ in tie.members}
    rows = {name: Column if target.transposed else Row for name, target in targets.items() if name not in taken}
    return (*found, *(CoupledGroups(((name, row),)) for name, row in rows.items()))


def _without_outputs(tie: CoupledGroups, targets: Targets) -> CoupledGroups:
    return CoupledGroups(tuple(member for member in tie.members if targets[member[0]].role not in OUT_OF))


def matrix_shares(ties: tuple[CoupledGroups, ...], targets: Targets) -> list[MatrixShare]:
    """Return where the kept share of each matrix comes from."""
    owner = {name: number for number, tie in enumerate(ties) for name, _ in tie.members}
    feeds = dict[str, int]()
    for tie in [*attention_head_groups(targets), *feed_forward_groups(targets)]:
        into = next(owner[name] for name, _ in tie.members if targets[name].role not in OUT_OF)
        feeds |= {name: into for name, _ in tie.members if targets[name].role in OUT_OF}
    return [MatrixShare(math.prod(target.shape), owner[n], feeds.get(n)) for n, target in targets.items()]


def kept_weights(matrices: Sequence[MatrixShare], counts: Sequence[int], left: Sequence[int]) -> int:
    """Return the number of weights left where `left` of `counts` groups are, for each of the coupled groups."""
    return sum(
        m.size * left[m.rows] // counts[m.rows]
        if m.columns is None
        else m.size * left[m.rows] * left[m.columns] // (counts[m.rows] * counts[m.columns])
        for m in matrices
    )


def trim_heads_and_rows(
    ties: tuple[CoupledGroups, ...], matrices: Sequence[MatrixShare], sparsity: float, state: TrainState
) -> Masks:
    """Return the masks of the best heads and rows that fit, as if all logits were raised or lowered alike."""
    scores = group_scores(state)
    flat = torch.cat([scores[tie] for tie in range(len(ties))])
    counts = [len(scores[tie]) for tie in range(len(ties))]
    order = flat.argsort(descending=True, stable=True)
    owner = torch.arange(len(ties)).repeat_interleave(torch.tensor(counts))[order.cpu()]
    budget = round((1.0 - sparsity) * sum(m.size for m in matrices))
    low, high = len(ties), len(flat) + 1  # the first of each come first, and are known to fit
    while high - low > 1:
        middle = (low + high) // 2
        left = torch.bincount(owner[:middle], minlength=len(ties)).tolist()
        low, high = (middle, high) if kept_weights(matrices, counts, left) <= budget else (low, middle)
    kept = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    kept[order[:low]] = True
    shapes = {name: target.shape for name, target in state.targets.items()}
    masks: Masks = {}
    for tie, part in zip(ties, kept.split(counts), strict=True):
        masks |= tie.expand_to_weights(part, shapes)
    return close_dead_inputs({name: masks[name] for name in state.targets}, state.targets)
