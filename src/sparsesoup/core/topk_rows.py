"""Exact top-k within each row, or within each few consecutive weights of a row."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsesoup.core import topk_passes
from sparsesoup.core.topk_passes import map_in_threads

SAMPLE = 256  # columns of a row that bracket its threshold
SLACK = 1.75  # standard errors of a rank in the sample
MOST = 8  # a bracket holds at most one in so many scores of a row; rows with more are partitioned
TO_BYTES = {np.ndarray: np.uint8, Tensor: torch.uint8}


def best_of_groups(score: Tensor, kept: int, then: Tensor | None = None, alive: Tensor | None = None) -> Tensor:
    """Return a mask of the `kept` best weights of each row [groups, width], by comparing all pairs.

    Ties go to the higher `then`, then the lower index; `alive` first.
    """
    present = [_comparable(key).detach() for key in (alive, score, then) if key is not None]
    if score.device.type != "cpu":
        return torch.stack(_pairwise_winners([key.unbind(1) for key in present], kept), 1)
    mask, arrays = torch.empty(score.shape, dtype=torch.bool), [key.numpy() for key in present]
    out, step = mask.numpy(), max(1, topk_passes.CHUNK // score.shape[1])

    def work(begin: int) -> None:
        columns = [[c.copy() for c in array[begin : begin + step].T] for array in arrays]
        for i, winner in enumerate(_pairwise_winners(columns, kept)):
            out[begin : begin + step, i] = winner

    map_in_threads(work, range(0, len(out), step))
    return mask


def best_of_rows(score: Tensor, counts: Tensor, then: Tensor | None = None, alive: Tensor | None = None) -> Tensor:
    """Return a mask of the best weights of each row [rows, width], `counts` of them.

    Ties go to the higher `then`, then the lower index; `alive` first.
    """
    if score.device.type != "cpu":
        return _sorted_winners(score, counts, then, alive)
    rows, width = score.shape
    floats = _comparable(score).detach()
    values: Any = (floats if floats.is_floating_point() else floats.double()).numpy()
    mask, wanted = torch.empty(rows, width, dtype=torch.bool), counts.numpy()
    out, step, live = mask.numpy(), max(1, 2 * topk_passes.CHUNK // width), None if alive is None else alive.numpy()

    def work(begin: int) -> None:
        part = slice(begin, begin + step)
        few = values[part] if live is None else np.where(live[part], values[part], values.dtype.type(-np.inf))
        open_ = begin + _separate(few, wanted[part], out[part])
        if len(open_):
            out[open_], tied = _partitioned(few[open_ - begin], wanted[open_], None if live is None else live[open_])
            if then is not None and tied.any():
                index = torch.from_numpy(open_[tied])
                some = None if alive is None else alive[index]
                mask[index] = _sorted_winners(score[index], counts[index], then[index], some)

    map_in_threads(work, range(0, rows, step))
    return mask


def rank_order(score: Tensor, then: Tensor | None, alive: Tensor | None) -> Tensor:
    """Return the indices along the last axis, best first and pruned weights last."""
    order = torch.arange(score.shape[-1], device=score.device).expand_as(score)
    for key in (then, score, alive):  # stable sorts, the least important key first
        if key is not None:
            key = key.to(torch.uint8) if key.dtype == torch.bool else key
            order = order.gather(-1, key.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)
    return order


def _comparable(score: Tensor) -> Tensor:
    return score.float() if score.dtype in (torch.float16, torch.bfloat16) else score


def _sorted_winners(score: Tensor, counts: Tensor, then: Tensor | None, alive: Tensor | None) -> Tensor:
    order = rank_order(score, then, alive)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(score.shape[1], device=score.device).expand_as(order)
    )
    return rank < counts[:, None]


def _pairwise_winners(keys: Sequence[Sequence[Any]], kept: int) -> list[Any]:
    """Return for each column whether it is among the best; keys are lists of columns, the most important first."""
    width, kind = len(keys[0]), TO_BYTES[type(keys[0][0])]
    wins: list[Any] = [0] * width
    for i, j in combinations(range(width), 2):
        first = keys[-1][i] >= keys[-1][j]  # equals go to the lower index
        for key in keys[-2::-1]:
            first = (key[i] > key[j]) | ((key[i] == key[j]) & first)
        wins[i], wins[j] = wins[i] + first.view(kind), wins[j] + (~first).view(kind)
    return [w >= width - kept for w in wins]


def _separate(values: Any, counts: Any, out: Any) -> Any:
    """Write the mask of the best `counts` of each row; return the rows for which that failed.

    A sorted sample of each row and one count bracket its threshold; the scores inside are sorted.
    """
    goal, scratch = counts[:, None], np.empty_like(out)
    other, above_level, below = _bracket_rows(values, goal, out)
    np.greater(values, other, out=scratch)
    scratch ^= out
    np.greater(out, scratch, out=out)  # above both ends
    inside = _count_rows(scratch)[:, None]
    short = goal - np.where(below, above_level - inside, above_level)  # so many of those inside are kept
    known = (short > 0) & (short <= inside) & (inside <= values.shape[1] // MOST)
    if not known.all():
        scratch[~known[:, 0]] = False
    number = np.where(known, inside, 0).ravel()
    if not (size := number.max(initial=0)):
        return np.flatnonzero(~known)
    position = np.flatnonzero(scratch)
    begin = np.arange(0, len(values) * size, size) - (np.cumsum(number) - number)
    table, gathered = np.full((len(values), size), -np.inf, dtype=values.dtype), values.reshape(-1).take(position)
    table.reshape(-1)[np.arange(len(position)) + np.repeat(begin, number)] = gathered
    level = np.take_along_axis(np.sort(table, axis=1), size - np.where(known, short, 1), 1)
    out.reshape(-1)[position] = gathered >= np.repeat(level[:, 0], number)
    return np.flatnonzero(~known | (np.count_nonzero(table >= level, axis=1)[:, None] != short))


def _bracket_rows(values: Any, goal: Any, out: Any) -> tuple[Any, Any, Any]:
    """Return (the other end, scores above the level, whether the level is the low end) per row, [rows, 1].

    The level is the sampled score of the wanted rank; what is above it is written to `out` and counted, which tells how
    far away in the sample the other end of the bracket is.
    """
    width = values.shape[1]
    sample = np.sort(values[:, :: width // SAMPLE | 1], axis=1)
    size = sample.shape[1]
    position = np.clip(((1 - goal / width) * size).astype(np.int64), 0, size - 1)
    level = np.take_along_axis(sample, position, 1)
    np.greater(values, level, out=out)
    above_level = _count_rows(out)[:, None]
    below, away = above_level >= goal, np.abs(above_level - goal) * (size / width)
    far = (away + SLACK * np.sqrt(away) + 1).astype(np.int64)
    end = np.where(below, position + far, position - far)
    other = np.take_along_axis(sample, np.clip(end, 0, size - 1), 1)
    other[end < 0], other[end >= size] = -np.inf, np.inf
    return other, above_level, below


def _count_rows(mask: Any) -> Any:
    """Return the number of True in each row, eight bytes at a time where that is possible."""
    rows, width = mask.shape
    if width % 8:
        return np.count_nonzero(mask, axis=1)
    words = next(n for n in range(min(width // 8, 255), 0, -1) if width // 8 % n == 0)  # no byte overflows
    return mask.view(np.int64).reshape(rows, -1, words).sum(2).view(np.uint8).reshape(rows, -1).sum(1, dtype=np.int64)


def _partitioned(values: Any, counts: Any, alive: Any) -> tuple[Any, Any]:
    """Return the mask of the best of each row, ties to the lower index, and the rows with ties that matter."""
    width = values.shape[1]
    position = np.clip(width - counts, 0, width - 1)
    level = np.take_along_axis(np.partition(values, np.unique(position), axis=1), position[:, None], 1)
    larger, equal = values > level, values == level
    if alive is not None:
        equal &= alive
    spare = counts - np.count_nonzero(larger, axis=1)
    first = equal & (np.cumsum(equal, axis=1) <= spare[:, None])
    return larger | first, np.count_nonzero(equal, axis=1) > spare
