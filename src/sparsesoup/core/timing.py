"""Benchmark timing: warmed up, in one process, interleaved, so that disturbances affect all candidates."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LEAST = 0.02  # seconds per measurement; shorter calls are repeated


@dataclass(frozen=True)
class MedianAndQuartiles:
    """Median and quartiles of several measurements."""

    middle: float
    low: float
    high: float


def median_and_quartiles(values: Sequence[float]) -> MedianAndQuartiles:
    """Return the median and quartiles of at least two values.

    >>> median_and_quartiles([1.0, 2.0, 3.0])
    MedianAndQuartiles(middle=2.0, low=1.0, high=3.0)
    """
    low, middle, high = statistics.quantiles(values, n=4)
    return MedianAndQuartiles(middle, low, high)


def time_interleaved(works: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Time calls of several functions in alternating order.

    Every round calls each of them, in reversed order every second round (A B, B A, ...), so that slow drifts, such as
    the clock of a warm processor, affect all of them alike.

    Returns: for each function the seconds per call of every round.
    """
    counts = [_calls_per_sample(work) for work in works]
    found: list[list[float]] = [[] for _ in works]
    for number in range(rounds):
        order = range(len(works)) if number % 2 == 0 else reversed(range(len(works)))
        for i in order:
            found[i].append(_time_calls(works[i], counts[i]))
    return found


def speedup_ratios(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """Return the speed-up of `other` over `base` in each round."""
    return [one / two for one, two in zip(base, other, strict=True)]


def _calls_per_sample(work: Callable[[], Any]) -> int:
    """Return the number of calls per measurement; the first two calls are a warm-up and not timed."""
    work()
    work()
    return max(1, round(LEAST / max(_time_calls(work, 1), 1e-9)))


def _time_calls(work: Callable[[], Any], count: int) -> float:
    _synchronise()
    began = time.perf_counter()
    for _ in range(count):
        work()
    _synchronise()
    return (time.perf_counter() - began) / count


def _synchronise() -> None:
    if torch.cuda.is_initialized():  # GPU kernels run asynchronously
        torch.cuda.synchronize()
