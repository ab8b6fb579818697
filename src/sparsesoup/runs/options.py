"""Runtime options that do not affect a run's result: console, autosave, cache, workers."""

import contextlib
import math
import os
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path

from rich.console import Console

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.files import make_folder
from sparsesoup.hub.model_data_cache import ModelDataCache
from sparsesoup.runs.config import RunConfig
from sparsesoup.training.observer import Observer
from sparsesoup.training.plan import Phase, count_evaluations, first_steps, takes_snapshots
from sparsesoup.training.size import RunSize
from sparsesoup.training.snapshots import SnapshotStore

CACHE_SIZE = 32.0  # GiB


def check_cache_size(size: float) -> None:
    """Raise a UserError unless a size of a cache is one of GiB."""
    require(isinstance(size, Real), "cache_size", "a number", repr(size))
    if not 0 <= size < math.inf:
        raise UserError(f"a number of GiB, 0 or more, is needed, got {size:g}", "cache_size")


def unused_settings(settings: RunConfig, size: RunSize, snapshots: str) -> list[str]:
    """Return a note on each setting that was given and has no effect on a run of that size."""
    phases, found, every = list[Phase](), list[str](), settings.train.eval_steps
    with contextlib.suppress(UserError):  # what does not fit is reported when it runs
        phases = settings.method.plan(size, float(settings.budget.sparsity or 0.0))
    if phases and snapshots != "device" and not takes_snapshots(phases):
        found.append(f"--snapshots {snapshots} has no effect: {settings.name} takes no snapshots")
    if phases and every and not any(count_evaluations(p, begin, settings.train) for p, begin in first_steps(phases)):
        found.append(
            f"--train.eval-steps {every} has no effect: the main training ends before step {every}; lower it, or leave "
            f"it out"
        )
    return found


@dataclass(frozen=True)
class RuntimeOptions:
    """Runtime options that do not affect a run's result.

    Args:
        console: console for progress output.
        save_every: minimum seconds between saves.
        cache: training cache folder, shared by several runs; None disables it.
        cache_size: GiB that it may hold; the trainings used least recently are removed.
        wait: wait for another process that works on the same run, instead of refusing.
        workers: processes for the weak masks of a run; 1 computes them in this process.
        page: write report.html at the end; a study leaves it to `test`, which has to write it anyway.
        observer: sees the progress too; None: nobody else does.
        snapshots: where forks and rewinding points are kept; see `sparsesoup.training.snapshots.SnapshotStore`.
        load_cache: keeps model and data of the last run for the next run that needs the same.
    """

    console: Console
    save_every: float = 30.0
    cache: Path | None = None
    wait: bool = False
    workers: int = 1
    page: bool = True
    observer: Observer | None = None
    snapshots: str = "device"
    load_cache: ModelDataCache = field(default_factory=ModelDataCache)
    cache_size: float = CACHE_SIZE

    def __post_init__(self) -> None:
        require(isinstance(self.workers, Integral), "workers", "a whole number", repr(self.workers))
        require(isinstance(self.save_every, Real), "save_every", "a number", repr(self.save_every))
        if self.workers < 1:
            raise UserError(f"at least 1 is needed, got {self.workers}", "workers")
        SnapshotStore(self.snapshots)
        check_cache_size(self.cache_size)
        if self.cache is None and self.cache_size != CACHE_SIZE:
            raise UserError("there is no folder of shared trainings to limit; set {} too", "cache_size",
                            named=["cache_dir"])  # fmt: skip
        if not 0 <= self.save_every < math.inf:
            raise UserError(f"a number of seconds, 0 or more, is needed, got {self.save_every}", "save_every")
        if self.cache is not None:
            make_folder(self.cache, "--cache-dir")
            if not os.access(self.cache, os.W_OK):
                raise UserError(f"the cache {self.cache} cannot be written to; use another", "cache_dir")
