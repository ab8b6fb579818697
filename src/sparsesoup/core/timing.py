"""How long things take beside each other: warmed up, in one process, by turns: what disturbs one disturbs all."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LEAST = 0.02  # seconds of one measurement: shorter calls are repeated within it


@dataclass(frozen=True)
class Spread:
    """The middle of several measurements, and their quartiles."""

    middle: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least two values.

    >>> spread([1.0, 2.0, 3.0])
    Spread(middle=2.0, low=1.0, high=3.0)
    """
    low, middle, high = statistics.quantiles(values, n=4)
    return Spread(middle, low, high)


def in_turns(works: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of a call of each work, round by round.

    In every round each has its turn, the order is turned around from one round to the next (A B, B A, ...): what
    changes slowly, such as the clock of a warm processor, is the same for all.

    Args:
        works: what is measured.
        rounds: how often.
    Returns: work by work the seconds of every round.
    """
    counts = [_repeats(work) for work in works]
    found: list[list[float]] = [[] for _ in works]
    for number in range(rounds):
        order = range(len(works)) if number % 2 == 0 else reversed(range(len(works)))
        for i in order:
            found[i].append(_seconds(works[i], counts[i]))
    return found


def ratios(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """How many times as fast the other is, round by round."""
    return [one / two for one, two in zip(base, other, strict=True)]


def _repeats(work: Callable[[], Any]) -> int:
    """Calls of which one measurement is made; the first two warm up and are not looked at."""
    work()
    work()
    return max(1, round(LEAST / max(_seconds(work, 1), 1e-9)))


def _seconds(work: Callable[[], Any], count: int) -> float:
    _wait()
    began = time.perf_counter()
    for _ in range(count):
        work()
    _wait()
    return (time.perf_counter() - began) / count


def _wait() -> None:
    if torch.cuda.is_initialized():  # a GPU is given its work and not waited for
        torch.cuda.synchronize()
