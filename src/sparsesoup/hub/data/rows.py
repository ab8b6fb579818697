"""A loaded dataset: its splits, their files, and its rows without a label."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from sparsesoup.core.errors import UserError, cause_line

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "valid", "dev", "val")


class LazySplits(Mapping[str, Dataset]):
    """Named splits, each read on first access."""

    def __init__(self, openers: Mapping[str, Callable[[], Dataset]]) -> None:
        self._openers = dict(openers)
        self._opened: dict[str, Dataset] = {}

    def __getitem__(self, name: str) -> Dataset:
        if name not in self._opened:
            self._opened[name] = self._openers[name]()
        return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._openers)

    def __len__(self) -> int:
        return len(self._openers)


@dataclass(frozen=True)
class LoadedDataset:
    """A loaded dataset.

    Args:
        name: short and valid as a folder name: `glue/sst2`, `imdb`.
        splits: name -> rows, read on access.
        files: split name -> its file names; empty if it is not made of files.
        notes: sentences on files that are not read.
        drop_unlabelled: drop rows without a label, which are otherwise refused.
    """

    name: str
    splits: Mapping[str, Dataset]
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    drop_unlabelled: bool = False

    @functools.cached_property
    def train_name(self) -> str:
        """The name of the training split."""
        named = [name for name in self.splits if name.lower() in TRAIN_NAMES]
        others = (*VALIDATION_NAMES, "test")
        if not named and len(self.splits) == 1 and not next(iter(self.splits)).lower().startswith(others):
            named = list(self.splits)
        if not named:
            raise UserError(
                f"{self.name} has no training split: its splits are {', '.join(self.splits)}, where one named train is "
                "needed; rename the file or name another dataset"
            )
        return named[0]

    @functools.cached_property
    def train_split(self) -> Dataset:
        """The training split as published, including a test slice that `open_test` may carve out."""
        return self.splits[self.train_name]

    @functools.cached_property
    def train_fingerprint(self) -> str:
        """SHA-256 of the training split's columns and rows; the same for any location and file format."""
        digest = hashlib.sha256(repr((sorted(self.train_split.column_names), len(self.train_split))).encode())
        columns = self.train_split.select_columns(sorted(self.train_split.column_names)).with_format("arrow")
        for table in columns.iter(batch_size=1000):
            for row in table.to_pylist():
                digest.update(repr([image_bytes(value) for value in row.values()]).encode())
        return digest.hexdigest()


def image_bytes(value: object) -> object:
    """Return an image's bytes, whatever its location and file name; any other value is returned unchanged."""
    if not isinstance(value, dict) or value.keys() != {"bytes", "path"} or value["path"] is None:
        return value
    try:
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
    except OSError as error:
        raise UserError(
            f"{value['path']}, which a row of the dataset names, cannot be read: {cause_line(error)}; put it back "
            f"or drop such rows"
        ) from error
