"""Dataset, model and rows that a process used last, for its next run of the same model and dataset."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sparsesoup.hub.build import LoadedModelAndData, ModelAndDataConfig, OpenedTask, load_model_and_data, open_task
from sparsesoup.hub.models.checkpoint import model_files_digest
from sparsesoup.hub.tasks.overview import DataOverview, data_overview
from sparsesoup.hub.tasks.splits import LoadedDataset, open_splits

T = TypeVar("T")


class ModelDataCache:
    """Keep the last loaded model and data, until others are needed or one of their files changes on disk.

    A run that finds them here begins with the same bits as one that loads them: what is kept is never modified.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, Any]] = {}

    def open_source(self, model_data: ModelAndDataConfig) -> LoadedDataset:
        """Return the dataset, as `open_splits` does."""
        where = (model_data.dataset, model_data.data_root, model_data.dataset_config, model_data.drop_unlabelled)
        known, source = self._kept.get("source", (None, None))
        if source is None or known != (where, _file_stamps(source.paths)):
            self._kept.clear()
            source = open_splits(model_data.dataset, data_root=model_data.data_root, config=model_data.dataset_config)
            source = replace(source, drop_unlabelled=model_data.drop_unlabelled)
            self._kept["source"] = (where, _file_stamps(source.paths)), source
        return source

    def open_task(self, model_data: ModelAndDataConfig) -> OpenedTask:
        """Return the dataset with its task, as `sparsesoup.hub.build.open_task` does."""
        source = self.open_source(model_data)
        return self._keep("task", _task_key(model_data), lambda: open_task(model_data, source))

    def overview(self, model_data: ModelAndDataConfig, opened: OpenedTask) -> DataOverview:
        """Return the overview of the data, as `data_overview` does."""
        key = (model_data, _task_key(model_data), _Same(opened))
        return self._keep("overview", key, lambda: data_overview(opened, model_data.seed))

    def load_model_and_data(
        self, model_data: ModelAndDataConfig, opened: OpenedTask, precision: str
    ) -> LoadedModelAndData:
        """Return model and rows, as `sparsesoup.hub.build.load_model_and_data` does."""
        key = (model_data, precision, _task_key(model_data), _Same(opened))
        return self._keep("loaded", key, lambda: load_model_and_data(model_data, opened, precision))

    def cached_model_and_data(self, model_data: ModelAndDataConfig, precision: str) -> LoadedModelAndData | None:
        """Return model and rows if they are kept, else None."""
        key, loaded = self._kept.get("loaded", (None, None))
        return loaded if isinstance(key, tuple) and key[:2] == (model_data, precision) else None

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


def _task_key(model_data: ModelAndDataConfig) -> tuple[Any, ...]:
    """Return what a task depends on besides its rows: the settings without the seed, and files as they are now."""
    words = [Path(name) for name in (model_data.prompts, model_data.class_names) if name and Path(name).is_file()]
    return replace(model_data, seed=0), model_files_digest(model_data.model), _file_stamps(words)


def _file_stamps(paths: Iterable[Path]) -> tuple[tuple[int, int], ...]:
    """Return size and time of change of each file; of one that is gone, -1."""
    stats = [path.stat() if path.exists() else None for path in paths]
    return tuple((stat.st_size, stat.st_mtime_ns) if stat else (-1, -1) for stat in stats)
