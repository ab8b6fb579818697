"""Exact top-k of many scores without sorting or joining them: sampled pivots, then one pass over the scores.

After Floyd & Rivest 1975, "Expected time bounds for selection": a sorted sample brackets the k-th largest value, one
pass counts the scores above the bracket and gathers those inside, and only these are sorted. Exact for any sample.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

PIECE = 1 << 18  # weights per chunk: they and their temporaries fit into the cache
SAMPLE = 1 << 16


def topk_exact(
    scores: Sequence[Tensor],
    count: int,
    *,
    then: Sequence[Tensor] | None = None,
    alive: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return masks that keep exactly the `count` best scores of all tensors together.

    Ties go to the higher `then`, then the earlier tensor, then the lower index. `alive` restricts the choice.
    """
    masks = [torch.zeros_like(s, dtype=torch.bool, memory_format=torch.contiguous_format) for s in scores]
    room = sum(int(torch.count_nonzero(a)) for a in alive) if alive else sum(s.numel() for s in scores)
    if count <= 0 or room == 0:
        return masks
    bound, above = kth_largest(scores, alive, count, room)
    spare = count - above
    if then is not None and _count_equal(scores, alive, bound) > spare:
        tied = [s.to(bound.dtype) == bound for s in scores]
        tied = tied if alive is None else [t & a for t, a in zip(tied, alive, strict=True)]
        masks = topk_exact(then, spare, alive=tied)
        spare = 0
    for mask, (score, live) in zip(_flat_pieces(masks), _pair_with_alive(scores, alive), strict=True):
        larger = score > bound
        mask |= larger if live is None else larger & live
        if spare > 0:
            equal = score == bound
            first = (equal if live is None else equal & live).nonzero().flatten()[:spare]
            mask[first] = True
            spare -= len(first)
    return masks


def kth_largest(scores: Sequence[Tensor], alive: Sequence[Tensor] | None, count: int, room: int) -> tuple[Tensor, int]:
    """Return (the count-th largest score, the number of larger scores)."""
    low, high = (
        torch.tensor(v, dtype=_common_precision(scores), device=scores[0].device) for v in (-torch.inf, torch.inf)
    )
    above, inside = 0, room  # above: larger than high; inside: from low to high, the bracket of the k-th largest
    narrow = True
    while bool(low < high):
        a, b = _bracket_threshold(_sample_scores(scores, alive, low, high, inside), (count - above) / inside, narrow)
        over, among, gathered = _count_between(scores, alive, high, a, b, room)
        if count <= above + over:
            low, inside = torch.nextafter(b, high), over
        elif count > above + over + among:
            high, above, inside = torch.nextafter(a, low), above + over + among, inside - over - among
        elif gathered is not None:
            value = gathered.sort(descending=True).values[count - above - over - 1]
            return value, above + over + int(torch.count_nonzero(gathered > value))
        else:
            # A bracket that did not shrink is full of ties: use one value for both ends next time.
            narrow = among < inside
            low, high, above, inside = a, b, above + over, among
    return low, above


def _bracket_threshold(sample: Tensor, share: float, narrow: bool) -> tuple[Tensor, Tensor]:
    """Return two sample values that almost surely bracket the k-th largest; the same value twice if not `narrow`."""
    ordered = sample.sort(descending=True).values
    slack = 2 * int(len(ordered) ** 0.5) if narrow else 0
    place = min(int(share * len(ordered)), len(ordered) - 1)
    return ordered[min(place + slack, len(ordered) - 1)], ordered[max(place - slack, 0)]


def _sample_scores(
    scores: Sequence[Tensor], alive: Sequence[Tensor] | None, low: Tensor, high: Tensor, inside: int
) -> Tensor:
    stride = max(1, inside // SAMPLE)
    parts = []
    for score, live in _pair_with_alive(scores, alive):
        if live is None and bool(low == -torch.inf) and bool(high == torch.inf):
            parts.append(score[::stride].to(low.dtype))
            continue
        some = (score >= low) & (score <= high)
        parts.append(score[some if live is None else some & live][::stride].to(low.dtype))
    return torch.cat(parts)


def _count_between(
    scores: Sequence[Tensor], alive: Sequence[Tensor] | None, high: Tensor, a: Tensor, b: Tensor, room: int
) -> tuple[int, int, Tensor | None]:
    """Return (count above b up to high, count from a to b, the scores from a to b unless there are too many)."""
    over, among, bounded = 0, 0, bool(high < torch.inf)
    parts: list[Tensor] = []
    for score, live in _pair_with_alive(scores, alive):
        larger, within = score > b, score >= a
        within ^= larger
        if bounded:
            larger &= score <= high
        if live is not None:
            larger, within = larger & live, within & live
        over += int(torch.count_nonzero(larger))
        some = int(torch.count_nonzero(within))
        if among <= room // 16 + SAMPLE and some:
            parts.append(score[within].to(a.dtype))
        among += some
    few = among <= room // 16 + SAMPLE
    return over, among, torch.cat(parts) if few and parts else None


def _count_equal(scores: Sequence[Tensor], alive: Sequence[Tensor] | None, level: Tensor) -> int:
    return sum(
        int(torch.count_nonzero((score == level) if live is None else (score == level) & live))
        for score, live in _pair_with_alive(scores, alive)
    )


def _flat_pieces(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    for t in tensors:
        yield from t.reshape(-1).split(PIECE)


def _pair_with_alive(
    scores: Sequence[Tensor], alive: Sequence[Tensor] | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield flat chunks of the scores, in one precision so that comparing rounds nothing, with their `alive` masks."""
    masks = _flat_pieces(alive) if alive else None
    precision = _common_precision(scores)
    for score in _flat_pieces(scores):
        yield score.to(precision), next(masks) if masks else None


def _common_precision(scores: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(s.dtype == torch.float64 for s in scores) else torch.float32
