"""How long things take beside each other: warmed up, in one process, by turns: what disturbs one disturbs all."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LEAST = 0.02  # seconds of one measurement: shorter calls are repeated within it


@dataclass(frozen=True)
class MedianAndQuartiles:
    """The middle of several measurements, and their quartiles."""

    middle: float
    low: float
    high: float


def median_and_quartiles(values: Sequence[float]) -> MedianAndQuartiles:
    """Median and quartiles of at least two values.

    >>> median_and_quartiles([1.0, 2.0, 3.0])
    MedianAndQuartiles(middle=2.0, low=1.0, high=3.0)
    """
    low, middle, high = statistics.quantiles(values, n=4)
    return MedianAndQuartiles(middle, low, high)


def time_interleaved(works: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of a call of each work, round by round.

    In every round each has its turn, the order is turned around from one round to the next (A B, B A, ...): what
    changes slowly, such as the clock of a warm processor, is the same for all.

    Args:
        works: what is measured.
        rounds: how often.
    Returns: work by work the seconds of every round.
    """
    counts = [_calls_per_sample(work) for work in works]
    found: list[list[float]] = [[] for _ in works]
    for number in range(rounds):
        order = range(len(works)) if number % 2 == 0 else reversed(range(len(works)))
        for i in order:
            found[i].append(_time_calls(works[i], counts[i]))
    return found


def speedup_ratios(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """How many times as fast the other is, round by round."""
    return [one / two for one, two in zip(base, other, strict=True)]


def _calls_per_sample(work: Callable[[], Any]) -> int:
    """Calls of which one measurement is made; the first two warm up and are not looked at."""
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
    if torch.cuda.is_initialized():  # a GPU is given its work and not waited for
        torch.cuda.synchronize()
