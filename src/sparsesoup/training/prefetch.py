"""Batches prepared ahead by threads: the same ones, in the same order, as without."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, tee
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsesoup.training.batching import Batch, RowBatches
from sparsesoup.training.config import TrainingConfig

AHEAD = 2  # batches prepared ahead for each thread

Item = TypeVar("Item")


def prepare_batches(
    prepare: Callable[[Item], Batch], items: Iterable[Item], workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Yield `prepare(item)` for each item in order, up to two batches a worker ahead.

    The threads gain what decoding, resizing and torch do without Python's lock. The order of rows and every random
    choice is in the items, so the batches are those of one thread, whenever the run is stopped and resumed. On a CUDA
    device the batches are in pinned memory.

    Args:
        workers: number of threads; 0: each batch is prepared when it is needed.
        device: device of the model.
    Raises: what `prepare` raises, at its batch.

    >>> batches = prepare_batches(lambda i: {"labels": torch.tensor([i])}, range(3), 2, torch.device("cpu"))
    >>> [int(batch["labels"]) for batch in batches]
    [0, 1, 2]
    """
    if workers == 0:
        yield from map(prepare, items)
        return

    def prepare_pinned(item: Item) -> Batch:
        batch = prepare(item)
        pinned = device.type == "cuda"
        return {n: t.pin_memory() if pinned and isinstance(t, Tensor) else t for n, t in batch.items()}

    waiting: deque[Future[Batch]] = deque()
    pool = ThreadPoolExecutor(workers, "prepare")
    try:
        for item in items:
            waiting.append(pool.submit(prepare_pinned, item))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def micro_batches(indices: list[int], size: int) -> Iterator[list[int]]:
    """Yield the rows of a step in parts of at most `size`."""
    for i in range(0, len(indices), size):
        yield indices[i : i + size]


class StepBatches:
    """The batches of each step of a training, maybe prepared ahead.

    Args:
        data: the training rows.
        order: the rows of each step.
        first: number of the first step.
        look: seed and path of the random stream of the augmentation.
        training: has the rows of a forward pass and the number of threads.
        device: device of the model.
    """

    def __init__(
        self,
        data: RowBatches,
        order: Iterable[list[int]],
        first: int,
        look: tuple[Any, ...],
        training: TrainingConfig,
        device: torch.device,
    ) -> None:
        self._data, self._first, self._look, self._size = data, first, look, training.batch_size
        self.steps, ahead = tee(order)
        workers = training.dataloader_num_workers
        self._prepared = prepare_batches(self._prepare, self._parts_of(ahead), workers, device) if workers else None

    def view_of(self, step: int, indices: list[int]) -> RowBatches:
        """Return the rows as they are seen in a step, whose batches of these rows are ready."""
        if self._prepared is None:
            return self._view(step)
        parts = [tuple(part) for part in micro_batches(indices, self._size)]
        ready = dict(zip(parts, islice(self._prepared, len(parts)), strict=True))
        return RowBatches(range(len(self._data)), lambda numbers: ready[tuple(numbers)], self._data.lengths)

    def close(self) -> None:
        """End the threads."""
        if self._prepared is not None:
            self._prepared.close()

    def _parts_of(self, order: Iterator[list[int]]) -> Iterator[tuple[int, list[int]]]:
        for step, indices in enumerate(order, self._first):
            for part in micro_batches(indices, self._size):
                yield step, part

    def _prepare(self, item: tuple[int, list[int]]) -> Batch:
        step, part = item
        return self._view(step).batch(part)

    def _view(self, step: int) -> RowBatches:
        return self._data.augmented_view(*self._look, step)
