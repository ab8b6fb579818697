"""Passes of the exact top-k over tensors on the CPU, in chunks that fit the cache.

NumPy compares floats into bytes twice as fast as PyTorch does on a CPU, and needs no barrier between two chunks.
"""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsesoup.core import topk_passes
from sparsesoup.core.errors import UserError
from sparsesoup.core.topk_passes import Bracket, Result, Window, common_precision, map_in_threads, sample_stride

Chunk = tuple[int, int, int]  # tensor, first score, score behind the last
RUN = 16  # neighbouring scores that are sampled together: they are read together anyway


class ArrayPasses:
    """Passes over tensors on the CPU, chunk by chunk, in as many threads as PyTorch has."""

    def __init__(self, scores: Sequence[Tensor], alive: Sequence[Tensor] | None) -> None:
        self._precision = common_precision(scores)
        self._shapes = [s.shape for s in scores]
        self._flat = [s.detach().reshape(-1) for s in scores]
        self._own = threading.local()
        self._alive = None if alive is None else [a.reshape(-1).numpy() for a in alive]

    def count_alive(self) -> int:
        if self._alive is None:
            return sum(s.numel() for s in self._flat)
        return sum(int(np.count_nonzero(a)) for a in self._alive)

    def window_above(self, window: Window | None, value: Any) -> Window:
        above = value + 1 if value.dtype == np.uint8 else np.nextafter(value, value.dtype.type(np.inf))
        return above, window[1] if window else self._ends()[1]

    def window_below(self, window: Window | None, value: Any) -> Window:
        below = value - 1 if value.dtype == np.uint8 else np.nextafter(value, value.dtype.type(-np.inf))
        return window[0] if window else self._ends()[0], below

    def bracket(self, window: Window | None, share: float, inside: int, narrow: bool) -> Window:
        sample = self._sample(window, inside)
        last = len(sample) - 1
        position = last - min(int(share * len(sample)), last)
        slack = int(topk_passes.SLACK * math.sqrt(len(sample) * share * (1 - share))) + 1 if narrow else 0
        low, high = max(position - slack, 0), min(position + slack, last)
        ordered = np.partition(sample, sorted({low, high}))
        return ordered[low], ordered[high]

    def split(self, low: Any, high: Any, most: int) -> Bracket:
        masks = [torch.empty(shape, dtype=torch.bool) for shape in self._shapes]
        out, seen, nothing = [m.view(-1).numpy() for m in masks], [0], np.empty(0, np.int64)
        gather = bool(low < high)

        def work(chunk: Chunk) -> tuple[int, int, Any, Any]:
            (i, begin, end), scores = chunk, self._values_of(chunk)
            larger, within = out[i][begin:end], self._scratch()[: end - begin]
            np.greater(scores, high, out=larger)
            np.greater_equal(scores, low, out=within)
            np.not_equal(within, larger, out=within)
            if self._alive is not None:
                larger &= self._alive[i][begin:end]
                within &= self._alive[i][begin:end]
            few = np.flatnonzero(within) if gather and seen[0] <= most else nothing
            inside = int(np.count_nonzero(within)) if few is nothing else len(few)
            seen[0] += inside
            return int(np.count_nonzero(larger)), inside, few + begin, scores[few]

        found = self._map_chunks(work)
        above, inside = sum(row[0] for row in found), sum(row[1] for row in found)
        level = torch.tensor(low)
        if not gather or inside > most:
            return Bracket(masks, above, inside, not gather, level, None, [])
        parts: list[list[tuple[Any, Any]]] = [[] for _ in masks]
        for (i, _, _), row in zip(self._chunks(), found, strict=True):
            parts[i].append(row[2:])
        empty = (nothing, np.empty(0, level.numpy().dtype))
        columns = [
            [torch.from_numpy(np.concatenate(c)) for c in zip(*(part or [empty]), strict=True)] for part in parts
        ]
        return Bracket(masks, above, inside, False, level, [c[0] for c in columns], [c[1] for c in columns])

    def equal_to(self, level: Tensor) -> list[Tensor]:
        masks = [torch.empty(shape, dtype=torch.bool) for shape in self._shapes]
        out, value = [m.view(-1).numpy() for m in masks], level.numpy()[()]

        def work(chunk: Chunk) -> None:
            i, begin, end = chunk
            equal = out[i][begin:end]
            np.equal(self._values_of(chunk), value, out=equal)
            if self._alive is not None:
                equal &= self._alive[i][begin:end]

        self._map_chunks(work)
        return masks

    def keep_first_(self, masks: Sequence[Tensor], count: int) -> None:
        flat = [m.view(-1).numpy() for m in masks]
        for i, begin, end in self._chunks():
            mask = flat[i][begin:end]
            here = int(np.count_nonzero(mask))
            if here > count:
                mask[np.flatnonzero(mask)[count:]] = False
            count -= min(here, count)

    def _scratch(self) -> Any:
        if not hasattr(self._own, "scratch"):  # fresh memory for each chunk would cost more than the comparison
            self._own.scratch = np.empty(topk_passes.CHUNK, dtype=bool)
        return self._own.scratch

    def _ends(self) -> Window:
        kind = torch.empty(0, dtype=self._precision).numpy().dtype.type
        return (kind(0), kind(255)) if kind is np.uint8 else (kind(-np.inf), kind(np.inf))

    def _sample(self, window: Window | None, inside: int) -> Any:
        stride = max(1, inside // topk_passes.SAMPLE)
        if window is None:
            stride = sample_stride(inside)
            parts = [_some(s, stride).to(self._precision).numpy() for s in self._flat]
            if self._alive is not None:
                parts = [part[_some(a, stride)] for part, a in zip(parts, self._alive, strict=True)]
            if sum(len(part) for part in parts):
                return np.concatenate(parts)
        low, high = window or self._ends()

        def work(chunk: Chunk) -> Any:
            (i, begin, end), scores = chunk, self._values_of(chunk)
            inner = (scores >= low) & (scores <= high)
            return scores[inner if self._alive is None else inner & self._alive[i][begin:end]][::stride]

        sample = np.concatenate(self._map_chunks(work))
        if not len(sample):
            raise UserError("scores have NaN")
        return sample

    def _values_of(self, chunk: Chunk) -> Any:
        i, begin, end = chunk
        return self._flat[i][begin:end].to(self._precision).numpy()

    def _chunks(self) -> list[Chunk]:
        sizes = [s.numel() for s in self._flat]
        return [
            (i, b, min(b + topk_passes.CHUNK, size))
            for i, size in enumerate(sizes)
            for b in range(0, size, topk_passes.CHUNK)
        ]

    def _map_chunks(self, work: Callable[[Chunk], Result]) -> list[Result]:
        return map_in_threads(work, self._chunks())


def _some(flat: Any, stride: int) -> Any:
    """Return one in `stride` runs of a tensor or an array; of a short one, one in `stride` of its entries."""
    runs = len(flat) // RUN
    if runs < stride:
        return flat[::stride]
    return flat[: runs * RUN].reshape(runs, RUN)[::stride].reshape(-1)
