"""Samples of the scores of many gates in one tensor, and their weighted quantiles."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

DIGIT = 13  # bits of a digit: so many bins cost less than the scores
SIGNLESS = 0x7FFFFFFF


def sample_flat(tensor: Tensor, most: int) -> Tensor:
    """Return every k-th entry, flat, so that `most` to twice as many are left of a larger tensor; a view if it can be.

    >>> sample_flat(torch.arange(8.0).view(2, 4), 4).tolist()
    [0.0, 2.0, 4.0, 6.0]
    """
    flat = tensor.flatten()
    stride = max(1, flat.numel() // most)
    return flat[::stride] if stride > 1 else flat


def sample_scores(scores: Iterable[Tensor], most: int) -> tuple[Tensor, list[int]]:
    """Return (the samples of several tensors, concatenated, and the length of each)."""
    parts = [sample_flat(score, most) for score in scores]
    return torch.cat(parts), [len(part) for part in parts]


def weighted_quantiles(scores: Tensor, weights: Sequence[float], lengths: Sequence[int], shares: Any) -> list[float]:
    """Return for each share the least score at or below which that share of the weight lies, in float32.

    A selection by the digits of the scores' bits: a histogram of the weight finds the digit at which the share is
    reached, and only the scores that have it are looked at again. It takes a tenth of the time of a sort.

    Args:
        scores: scores of several tensors, concatenated.
        weights, lengths: for each tensor the weight of one of its scores, and their number.
        shares: shares of the whole weight, from 0 to 1.

    >>> weighted_quantiles(torch.tensor([0.5, -2.0, 3.0]), [1.0, 4.0], [2, 1], [0.1, 0.3, 0.4])
    [-2.0, 0.5, 3.0]
    """
    lead = min(weights)
    each = None if lead == max(weights) else np.repeat(np.array(weights, np.float32).astype(np.float64), lengths)
    unit = float(np.float32(lead)) if each is None else 1.0
    whole = torch.tensor(unit * len(scores) if each is None else each.sum(), dtype=torch.float32)
    return _scores_of(_reach(_keys_of(scores), each, [float(share * whole) for share in shares], unit))


def median_score(scores: Tensor) -> float:
    """Return the median in float32, the lower one of an even number, as torch does in three times the time.

    >>> median_score(torch.tensor([3.0, -1.0, 2.0, -0.5]))
    -0.5
    """
    return _scores_of(_reach(_keys_of(scores), None, [(len(scores) + 1) // 2]))[0]


def _keys_of(scores: Tensor) -> Any:
    """Return whole numbers in the order of the scores."""
    bits = scores.to("cpu", torch.float32).view(torch.int32).numpy()
    return (bits ^ ((bits >> 31) & SIGNLESS)).astype(np.int64)


def _scores_of(keys: Sequence[int]) -> list[float]:
    bits = np.array(keys).astype(np.int32)
    return [float(score) for score in (bits ^ ((bits >> 31) & SIGNLESS)).view(np.float32)]


def _reach(keys: Any, weights: Any, goals: Sequence[float], unit: float = 1.0, below: float = 0.0) -> list[int]:
    """Return for each goal the least key at or below which so much weight lies; without weights each has one unit.

    Sums count from `below`, and are compared in float32. They are exact: a few hundred thousand float32 weights of
    similar size are added in float64.
    """
    least = int(keys.min())
    shift = max(0, (int(keys.max()) - least).bit_length() - DIGIT)
    digits = (keys - least) >> shift
    sums = below + unit * np.cumsum(np.bincount(digits, weights))
    reached = np.searchsorted(sums.astype(np.float32), np.array(goals, np.float32)).clip(0, len(sums) - 1).tolist()
    if not shift:
        return [least + digit for digit in reached]
    found: dict[int, int] = {}  # number of a goal -> key
    for digit in set(reached):
        few, numbers = np.flatnonzero(digits == digit), [i for i, d in enumerate(reached) if d == digit]
        start, some = float(sums[digit - 1]) if digit else below, None if weights is None else weights[few]
        found |= zip(numbers, _reach(keys[few], some, [goals[i] for i in numbers], unit, start), strict=True)
    return [found[number] for number in range(len(goals))]
