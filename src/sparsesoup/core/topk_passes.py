"""The passes over many scores that the exact top-k is made of: their contract, and what both kinds share."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

CHUNK = 1 << 18  # scores per chunk: they and their temporaries fit into the cache
SAMPLE = 1 << 18
SLACK = 4  # standard errors of a rank in the sample, on either side
_THREAD = threading.local()
Window = tuple[Any, Any]  # the least and the largest score that may be the k-th largest
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Bracket:
    """The scores split by two values.

    Args:
        masks: per tensor, the scores above the bracket.
        above, inside: numbers of scores above and inside the bracket.
        one_value: True if both ends of the bracket are the same.
        level: the lower end of the bracket.
        positions, values: per tensor, the indices and values of the scores inside, in order; None if too many.
    """

    masks: list[Tensor]
    above: int
    inside: int
    one_value: bool
    level: Tensor
    positions: list[Tensor] | None
    values: list[Tensor]


class Passes(Protocol):
    """The passes over the scores of several tensors, restricted to those that are alive."""

    def count_alive(self) -> int:
        """Return the number of scores that are alive."""

    def window_above(self, window: Window | None, value: Any) -> Window:
        """Return the part of a window above a value."""

    def window_below(self, window: Window | None, value: Any) -> Window:
        """Return the part of a window below a value."""

    def bracket(self, window: Window | None, share: float, inside: int, narrow: bool) -> Window:
        """Return two values that almost surely bracket a rank, given as the share of scores above it in the window.

        The same value twice unless `narrow`. No window: all scores.
        """

    def split(self, low: Any, high: Any, most: int) -> Bracket:
        """Split the scores by a bracket; gather those inside unless there are more than `most`, or of one value."""

    def equal_to(self, level: Tensor) -> list[Tensor]:
        """Return masks of the scores that equal the level."""

    def keep_first_(self, masks: Sequence[Tensor], count: int) -> None:
        """Keep the first `count` of the masks, in place."""


def map_in_threads(work: Callable[[Item], Result], items: Sequence[Item], least: int = 16) -> list[Result]:
    """Return the results for many items, in order, computed in as many threads as PyTorch has.

    A call from such a thread starts no others.

    Args:
        least: number of items that are worth a thread.
    """
    threads = 1 if getattr(_THREAD, "is_ours", False) else min(torch.get_num_threads(), len(items) // least)
    if threads < 2:
        return [work(item) for item in items]

    def work_on(some: Sequence[Item]) -> list[Result]:
        _THREAD.is_ours = True
        return [work(item) for item in some]

    step = -(-len(items) // (4 * threads))
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(work_on, [items[i : i + step] for i in range(0, len(items), step)])
        return [result for part in parts for result in part]


def common_precision(scores: Sequence[Tensor]) -> torch.dtype:
    """Return the precision in which comparing the scores rounds nothing."""
    if any(s.dtype == torch.float64 for s in scores):
        return torch.float64
    return torch.uint8 if all(s.dtype == torch.uint8 for s in scores) else torch.float32


def sample_stride(inside: int) -> int:
    """Return a stride that gives about SAMPLE scores and visits all columns of a matrix."""
    return next(stride for stride in range(max(1, inside // SAMPLE), 0, -1) if stride % 6 in (1, 5))
