"""Dataset rows, and random, reproducible, length-grouped batches of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from sparsesoup.core.rng import cpu_generator, derive_seed

Batch = dict[str, Tensor]  # the model's inputs, and "labels"; a Trainer's collator may add plain values

POOL = 64  # batches sorted by length together: more means less padding and less random batches


def shapes_of(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the tensors of a batch."""
    return tuple(tuple(t.shape) for t in batch.values() if isinstance(t, Tensor))


@dataclass(frozen=True)
class RowBatches:
    """Rows, a collate function, and the number of tokens in each row.

    Args:
        rows: the examples, in any form that `collate` takes.
        collate: rows -> batch; the batch holds `labels`.
        lengths: tokens per row; empty if all rows are equally long (images, vectors).
        vary: (rows, seed) -> batch of randomly augmented rows, the same for the same seed; None for no augmentation.
    """

    rows: Sequence[Any]
    collate: Callable[[Sequence[Any]], Batch]
    lengths: tuple[int, ...] = ()
    vary: Callable[[Sequence[Any], int], Batch] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> Batch:
        return self.collate([self.rows[i] for i in indices])

    def augmented_view(self, seed: int, *path: object) -> "RowBatches":
        """Return the rows augmented at random, the same for the same seed and path."""
        if self.vary is None:
            return self
        vary, look = self.vary, derive_seed(seed, *path)
        return replace(self, collate=lambda rows: vary(rows, look))

    def count_tokens(self, indices: Sequence[int]) -> tuple[int, int]:
        """Return (tokens computed, of which padding) in a batch of these rows; a row without a length is one token."""
        if not self.lengths:
            return len(indices), 0
        lengths = [self.lengths[i] for i in indices]
        computed = len(lengths) * max(lengths)
        return computed, computed - sum(lengths)

    def random_subset(self, part: float, seed: int, *path: object) -> "RowBatches":
        """Return a random share of the rows, at least one; the same rows for the same seed and path."""
        if part == 1.0:
            return self
        order = torch.randperm(len(self), generator=cpu_generator(seed, "share", *path))
        return self.select_rows(sorted(order[: max(1, round(part * len(self)))].tolist()))

    def select_rows(self, indices: Sequence[int]) -> "RowBatches":
        """Return only these rows."""
        lengths = tuple(self.lengths[i] for i in indices) if self.lengths else ()
        return replace(self, rows=[self.rows[i] for i in indices], lengths=lengths)

    def eval_batches(self, size: int) -> list[list[int]]:
        """Return batches of all rows once, sorted by length to minimise padding: for evaluation."""
        order = sorted(range(len(self)), key=self.lengths.__getitem__) if self.lengths else list(range(len(self)))
        return [order[i : i + size] for i in range(0, len(order), size)]

    def train_batches(self, size: int, start: int, seed: int, *path: object) -> Iterator[list[int]]:
        """Yield endless batches of row indices from the `start`-th on, in a new order every epoch.

        The order is a function of seed, path and epoch only, so training can resume at any step. Batches are grouped by
        length: each epoch is shuffled, cut into pools of 64 batches, sorted by length within a pool, and its batches
        are shuffled again. Rows that do not fill the last batch are dropped, different ones each epoch.
        """
        size = min(size, len(self))
        each = len(self) // size
        for epoch in count(start // each):
            first = start % each if epoch == start // each else 0
            yield from self._epoch_batches(size, cpu_generator(seed, "order", *path, epoch))[first:]

    def _epoch_batches(self, size: int, draw: torch.Generator) -> list[list[int]]:
        order = torch.randperm(len(self), generator=draw)[: len(self) // size * size].tolist()
        if self.lengths:
            pools = [order[i : i + POOL * size] for i in range(0, len(order), POOL * size)]
            order = [i for pool in pools for i in sorted(pool, key=self.lengths.__getitem__)]
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]
