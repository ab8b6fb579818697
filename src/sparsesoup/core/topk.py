"""Exact top-k of many scores without sorting or joining them: sampled pivots, then one pass over the scores.

After Floyd & Rivest 1975, "Expected time bounds for selection": two values of a sample bracket the k-th largest score,
one pass counts the scores above the bracket and gathers those inside, and only these are ranked. Exact for any sample.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsesoup.core import topk_passes
from sparsesoup.core.topk_arrays import ArrayPasses
from sparsesoup.core.topk_passes import Bracket, Passes, Window, common_precision
from sparsesoup.core.topk_tensors import TensorPasses

FEW = 1 << 14  # scores that are ranked faster than they are sampled


def topk_exact(
    scores: Sequence[Tensor],
    count: int,
    *,
    then: Sequence[Tensor] | None = None,
    alive: Sequence[Tensor] | None = None,
    available: int | None = None,
) -> list[Tensor]:
    """Return masks that keep exactly the `count` best scores of all tensors together.

    Ties go to the higher `then`, then the earlier tensor, then the lower index. `alive` restricts the choice to
    `available` scores, counted here if it is not given.
    """
    passes = _passes_over(scores, alive)
    available = passes.count_alive() if available is None else available
    if count <= 0 or available == 0:
        return [torch.zeros_like(s, dtype=torch.bool, memory_format=torch.contiguous_format) for s in scores]
    if count >= available:
        every = alive or [torch.ones((), dtype=torch.bool, device=s.device).expand(s.shape) for s in scores]
        return [mask.clone(memory_format=torch.contiguous_format) for mask in every]
    found = _bracket_kth_largest(passes, count, available)
    if found.positions is not None:
        seconds = None if then is None else _take(then, found.positions)
        chosen = _best_first(torch.cat(found.values), seconds, count - found.above)
        sizes = [len(p) for p in found.positions]
        for mask, position, some in zip(found.masks, found.positions, chosen.split(sizes), strict=True):
            mask.view(-1)[position] = some
        return found.masks
    spare = count - found.above
    tied = passes.equal_to(found.level)
    if spare < found.inside and then is None:
        passes.keep_first_(tied, spare)
    elif spare < found.inside and then is not None:
        tied = topk_exact(then, spare, alive=tied, available=found.inside)
    for mask, more in zip(found.masks, tied, strict=True):
        mask |= more
    return found.masks


def kth_largest(scores: Sequence[Tensor], count: int) -> Tensor:
    """Return the count-th largest of all scores, a scalar; at least the first, at most the last."""
    available = sum(s.numel() for s in scores)
    count = min(max(count, 1), available)
    if len(scores) == 1 and available <= FEW:
        return scores[0].detach().flatten().to(common_precision(scores)).kthvalue(available + 1 - count).values
    passes = _passes_over(scores, None)
    found = _bracket_kth_largest(passes, count, available)
    if found.positions is None:
        return found.level
    values = torch.cat(found.values)
    return values.kthvalue(len(values) + 1 - (count - found.above)).values


def _passes_over(scores: Sequence[Tensor], alive: Sequence[Tensor] | None) -> Passes:
    return (ArrayPasses if all(s.device.type == "cpu" for s in scores) else TensorPasses)(scores, alive)


def _bracket_kth_largest(passes: Passes, count: int, available: int) -> Bracket:
    """Return a bracket around the k-th largest score with few scores inside, or with one value inside."""
    window: Window | None = None
    above, inside, narrow = 0, available, True
    while True:
        low, high = passes.bracket(window, (count - above) / inside, inside, narrow)
        found = passes.split(low, high, available // 16 + topk_passes.SAMPLE // 4)
        if count <= found.above:
            window, inside = passes.window_above(window, high), found.above - above
        elif count > found.above + found.inside:
            window = passes.window_below(window, low)
            above, inside = found.above + found.inside, inside - (found.above - above) - found.inside
        elif found.positions is not None or found.one_value:
            return found
        else:
            # A bracket that did not shrink is full of ties: use one value for both ends next time.
            narrow = found.inside < inside
            window, above, inside = (low, high), found.above, found.inside


def _take(table: Sequence[Tensor], positions: Sequence[Tensor]) -> Tensor:
    kind = common_precision(table)
    return torch.cat([t.reshape(-1).take(p).to(kind) for t, p in zip(table, positions, strict=True)])


def _best_first(values: Tensor, seconds: Tensor | None, count: int) -> Tensor:
    """Return a mask of the `count` largest values; ties go to the larger second value, then the lower index."""
    if seconds is None:
        level = values.kthvalue(len(values) + 1 - count).values
        larger, equal = values > level, values == level
        return larger | (equal & (equal.cumsum(0) <= count - torch.count_nonzero(larger)))
    order = seconds.sort(descending=True, stable=True).indices
    order = order[values[order].sort(descending=True, stable=True).indices]
    return torch.zeros_like(values, dtype=torch.bool).index_fill_(0, order[:count], True)
