"""Dataset, model and rows of the place that a process used last, for its next run of the same place."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sparsesoup.hub.build import LoadedPlace, ModelAndDataConfig, OpenedTask, load_place, open_task
from sparsesoup.hub.models.checkpoint import model_files_digest
from sparsesoup.hub.tasks.overview import DataOverview, data_overview
from sparsesoup.hub.tasks.splits import LoadedDataset, open_splits

T = TypeVar("T")


class PlaceCache:
    """Keeps what was loaded for one place, until another place is asked for or a file of it changes on disk.

    A run that finds its place here begins with the same bits as one that loads it: what is kept is never modified.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, Any]] = {}

    def open_source(self, place: ModelAndDataConfig) -> LoadedDataset:
        """Return the dataset, as `open_splits` does."""
        where = (place.dataset, place.data_root, place.dataset_config, place.drop_unlabelled)
        known, source = self._kept.get("source", (None, None))
        if source is None or known != (where, _file_stamps(source.paths)):
            self._kept.clear()
            source = open_splits(place.dataset, data_root=place.data_root, config=place.dataset_config)
            source = replace(source, drop_unlabelled=place.drop_unlabelled)
            self._kept["source"] = (where, _file_stamps(source.paths)), source
        return source

    def open_task(self, place: ModelAndDataConfig) -> OpenedTask:
        """Return the dataset with its task, as `sparsesoup.hub.build.open_task` does."""
        source = self.open_source(place)
        return self._keep("task", _task_key(place), lambda: open_task(place, source))

    def overview(self, place: ModelAndDataConfig, opened: OpenedTask) -> DataOverview:
        """Return the overview of the data, as `data_overview` does."""
        key = (place, _task_key(place), _Same(opened))
        return self._keep("overview", key, lambda: data_overview(opened, place.seed))

    def load_place(self, place: ModelAndDataConfig, opened: OpenedTask, precision: str) -> LoadedPlace:
        """Return model and rows, as `sparsesoup.hub.build.load_place` does."""
        key = (place, precision, _task_key(place), _Same(opened))
        return self._keep("place", key, lambda: load_place(place, opened, precision))

    def kept_place(self, place: ModelAndDataConfig, precision: str) -> LoadedPlace | None:
        """Return model and rows if they are kept, else None."""
        key, loaded = self._kept.get("place", (None, None))
        return loaded if isinstance(key, tuple) and key[:2] == (place, precision) else None

    def _keep(self, what: str, key: object, load: Callable[[], T]) -> T:
        if what not in self._kept or self._kept[what][0] != key:
            self._kept.pop(what, None)  # first, so that two models are never held
            self._kept[what] = key, load()
        found: T = self._kept[what][1]
        return found


class _Same:
    """A value that equals itself alone."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._value is self._value

    __hash__ = None  # type: ignore[assignment]  # equal to itself alone, so never a key; mypy knows a method only


def _task_key(place: ModelAndDataConfig) -> tuple[Any, ...]:
    """Return what a task depends on beside its rows: the settings without the seed, and files as they are now."""
    words = [Path(name) for name in (place.prompts, place.class_names) if name and Path(name).is_file()]
    return replace(place, seed=0), model_files_digest(place.model), _file_stamps(words)


def _file_stamps(paths: Iterable[Path]) -> tuple[tuple[int, int], ...]:
    """Return size and time of change of each file; of one that is gone, -1."""
    stats = [path.stat() if path.exists() else None for path in paths]
    return tuple((stat.st_size, stat.st_mtime_ns) if stat else (-1, -1) for stat in stats)
