"""Runtime options that do not affect a run's result: console, autosave, cache, workers."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import make_folder
from sparsesoup.hub.place_cache import PlaceCache
from sparsesoup.training.observer import Observer
from sparsesoup.training.snapshots import SnapshotStore


@dataclass(frozen=True)
class RuntimeOptions:
    """Runtime options that do not affect a run's result.

    Args:
        console: console for progress output.
        save_every: minimum seconds between saves.
        cache: training cache folder, shared by several runs; None disables it.
        cache_size: GiB that it may hold; the trainings used least recently are removed.
        patient: wait for another process that works on the same run, instead of refusing.
        workers: processes for the weak masks of a run; 1 computes them in this process.
        page: write report.html at the end; a study leaves it to `test`, which has to write it anyway.
        observer: sees the progress too; None: nobody else does.
        snapshots: where forks and rewinding points are kept; see `sparsesoup.training.snapshots.SnapshotStore`.
        places: keeps model and data of the last run for the next one of the same place.
    """

    console: Console
    save_every: float = 30.0
    cache: Path | None = None
    patient: bool = False
    workers: int = 1
    page: bool = True
    observer: Observer | None = None
    snapshots: str = "device"
    places: PlaceCache = field(default_factory=PlaceCache)
    cache_size: float = 32.0

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"at least 1 is needed, got {self.workers}", "workers")
        SnapshotStore(self.snapshots)
        if not 0 <= self.cache_size < math.inf:
            raise UserError(f"a number of GiB, 0 or more, is needed, got {self.cache_size:g}", "cache_size")
        if not 0 <= self.save_every < math.inf:
            raise UserError(f"a number of seconds, 0 or more, is needed, got {self.save_every}", "save_every")
        if self.cache is not None:
            make_folder(self.cache, "--cache-dir")
            if not os.access(self.cache, os.W_OK):
                raise UserError(f"the cache {self.cache} cannot be written to; give another", "cache_dir")
