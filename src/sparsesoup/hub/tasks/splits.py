"""Find a dataset, and split its rows into those for methods and the test rows.

A dataset is searched on disk, below the data root, among the embedded ones and on the Hub, in this order. Methods get
`training_splits`; only `open_test` opens the test rows.
"""

import functools
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset

from sparsesoup.core.errors import UserError, cause_line
from sparsesoup.core.rng import cpu_generator
from sparsesoup.hub.data.embedded import embedded_dataset
from sparsesoup.hub.data.files import open_hub, read_files
from sparsesoup.hub.data.folders import check_alone, find_classes, find_files, read_classes, relative_name
from sparsesoup.hub.tasks.labels import is_missing
from sparsesoup.hub.tasks.metrics import glue_task
from sparsesoup.hub.tasks.registry import AnyTask, task_type_of

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "valid", "dev", "val")
DATA_ROOT = "SPARSESOUP_DATA"
EMBEDDED = "docstrings"
SHORT = {  # old names that a cache does not know
    "squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2", "mnist": "ylecun/mnist",
    "cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100",
}  # fmt: skip
SELECTION = "selection"
HELD_OUT, HELD_OUT_ROWS = 0.1, 2000
TEST_SEED = 0


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
    """A loaded dataset."""

    name: str  # short and valid as a folder name: `glue/sst2`, `imdb`
    splits: Mapping[str, Dataset]  # name -> rows, read on access
    # split name -> its file names; empty if it is not made of files
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # sentences on files that are not read
    drop_unlabelled: bool = False  # drop rows without a label, which are otherwise refused
    tested: bool = True  # False for rows in memory, which have no test split; a split `selection` is the validation
    paths: tuple[Path, ...] = ()  # the files on disk that it is read from, with their folders

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


def open_splits(dataset: str, *, data_root: str | None = None, config: str | None = None) -> LoadedDataset:
    """Open the dataset of that name: a path, a folder below the data root, an embedded one, or one on the Hub.

    The data root is by default the environment variable SPARSESOUP_DATA. `config` is the configuration on the Hub,
    which `owner/name:config` names too, or the subfolder on disk.
    """
    if not dataset.strip():
        raise UserError("the dataset's name is empty, where a path or a name is needed; give one, such as glue/sst2")
    looked = []
    for location in _candidate_paths(dataset, data_root):
        if os.path.exists(location):  # False also for a name too long for a file
            return _open_local(location, config)
        looked.append(str(location))
    if dataset == EMBEDDED:
        if config is not None:
            raise UserError(f"{EMBEDDED} has one configuration, got {config!r}; leave it out", "dataset_config")
        return LoadedDataset(EMBEDDED, embedded_dataset())
    if dataset.startswith((".", "/", "~")) or Path(dataset).suffix in (".csv", ".tsv", ".jsonl", ".json", ".parquet"):
        raise UserError(
            f"no dataset {dataset!r}: there is no such file or folder (looked at {', '.join(looked)}); correct the path"
        )
    return _open_on_hub(dataset, config, looked)


def training_splits(source: LoadedDataset, task: AnyTask, seed: int) -> tuple[Dataset, Dataset]:
    """Return (train, validation), both from the training split: a seeded 10 %, at most 2,000 rows, is held out."""
    name = source.train_name
    rows = _labelled_rows(source, name, task)
    if not source.tested and SELECTION in source.splits:
        return rows, _labelled_rows(source, SELECTION, task)
    carved = source.tested and _needs_carving(source, task)
    if len(rows) < (least := 3 if carved else 2):
        parts = "training, validation and test" if carved else "training and validation"
        raise UserError(
            f"{source.name} {name} has {len(rows)} row{'s'[: len(rows) != 1]}, where at least {least} are needed, one "
            f"each for {parts}; add rows"
        )
    if carved:
        rows = _split_off(rows, TEST_SEED, "test")[0]
    return _split_off(rows, seed, "validation")


def open_test(source: LoadedDataset, task: AnyTask) -> dict[str, Dataset]:
    """Return the test rows by name (`test`; MNLI's are `matched` and `mismatched`); no method may call this.

    GLUE's official validation split is the test split; elsewhere a labelled `test`, else `validation`; from a dataset
    with only a training split a tenth is carved out, which `training_splits` leaves out.
    """
    names = test_splits(source, task)
    parts = {key: _labelled_rows(source, name, task) for key, name in names.items()}
    if _needs_carving(source, task):
        # Independent of the run's seed: runs with different seeds must be compared on the same test rows.
        parts = {key: _split_off(rows, TEST_SEED, "test")[1] for key, rows in parts.items()}
    return parts


def test_splits(source: LoadedDataset, task: AnyTask) -> dict[str, str]:
    """Return the names of `open_test` -> the dataset's split that they are, or are carved out of."""
    candidates = [name for name in source.splits if name.startswith(VALIDATION_NAMES)]
    plain = [name for name in VALIDATION_NAMES if name in candidates] or candidates[:1] or [source.train_name]
    if glue_task(source.name) and candidates:
        both = {key: f"validation_{key}" for key in ("matched", "mismatched")}
        return {key: name for key, name in both.items() if name in candidates} or {"test": plain[0]}
    return {"test": "test" if _has_labelled_test(source, task) else plain[0]}


def _candidate_paths(dataset: str, data_root: str | None) -> list[Path]:
    root = data_root if data_root is not None else os.environ.get(DATA_ROOT)
    if root and not Path(root).expanduser().is_dir():
        raise UserError(
            f"the data root {root} is no folder, where one that holds datasets is needed; correct it, or the "
            f"variable {DATA_ROOT}",
            "data_root" if data_root is not None else "",
        )
    return [Path(dataset).expanduser(), *([Path(root).expanduser() / dataset] if root else [])]


def _open_local(location: Path, config: str | None) -> LoadedDataset:
    if config is not None:
        if not (location / config).is_dir():
            raise UserError(
                f"{location} has no subfolder {config!r}; it has {_describe_folders(location)}; "
                "name one of them or leave it out",
                "dataset_config",
            )
        location = location / config
    try:
        tables, notes = find_files(location)
        paths = [path for each in tables.values() for path in each]
        if tables:
            check_alone(location, tables)
            found = {name: functools.partial(read_files, name, paths) for name, paths in tables.items()}
        else:
            images, notes = find_classes(location)
            names = sorted({name for classes in images.values() for name in classes})
            paths = [path for classes in images.values() for each in classes.values() for path in each]
            found = {split: functools.partial(read_classes, classes, names) for split, classes in images.items()}
    except OSError as error:
        raise UserError(f"cannot look into {location}: {cause_line(error)}; correct its permissions") from error
    if not found:
        raise UserError(
            f"no data in {location}: no parquet, csv, tsv, jsonl or json file there or in its data folder, and no "
            f"folders of images (subfolders: {_describe_folders(location)}); name a folder with train.csv or the like"
        )
    files = {name: tuple(relative_name(path, location) for path in paths) for name, paths in tables.items()}
    whole = location.resolve()
    own = _safe_name(whole.stem if whole.is_file() else whole.name)
    name = f"glue/{own}" if whole.parent.name == "glue" else own
    return LoadedDataset(name, LazySplits(found), files, tuple(notes), paths=(*paths, *{path.parent for path in paths}))


def _describe_folders(location: Path) -> str:
    names = sorted(each.name for each in location.iterdir() if each.is_dir()) if location.is_dir() else []
    return ", ".join(names[:12]) or "none"


def _safe_name(name: str) -> str:
    """Return a name as one of a folder, with letters of any script; one without any by a digest."""
    plain = unicodedata.normalize("NFC", name)
    digest = hashlib.sha256(plain.encode()).hexdigest()[:8]
    return re.sub(r"[^\w.-]+", "-", plain).strip(".-") or f"dataset-{digest}"


def _open_on_hub(dataset: str, config: str | None, looked: list[str]) -> LoadedDataset:
    repository, _, suffix = dataset.partition(":")
    config = config or suffix or None
    repository = SHORT.get(repository, repository)
    if repository.startswith("glue/") and repository.count("/") == 1:
        repository, config = "nyu-mll/glue", repository.removeprefix("glue/")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository):
        raise UserError(
            f"no dataset {dataset!r}: not at {', '.join(looked)}, and no name that the Hub could have (owner/name); "
            "correct the name"
        )
    try:
        splits = open_hub(repository, config)
    except Exception as error:
        raise UserError(
            f"cannot open dataset {dataset!r}: not at {', '.join(looked)}, and the Hub ({repository}, configuration "
            f"{config or 'default'}) says {cause_line(error)}; correct the name, set {DATA_ROOT}, or use `{EMBEDDED}`"
        ) from error
    if repository == "nyu-mll/glue" and config:
        return LoadedDataset(f"glue/{_safe_name(config)}", splits)
    parts = [_safe_name(part) for part in dataset.partition(":")[0].split("/")]
    return LoadedDataset("/".join(parts) + (f"-{_safe_name(config)}" if config else ""), splits)


def _needs_carving(source: LoadedDataset, task: AnyTask) -> bool:
    """Return True if no other split can be the test split; reads `test` only if it is the sole candidate."""
    if any(name.startswith(VALIDATION_NAMES) for name in source.splits):
        return False
    return not _has_labelled_test(source, task)


def _has_labelled_test(source: LoadedDataset, task: AnyTask) -> bool:
    return "test" in source.splits and task_type_of(task).labelled(source.splits["test"], task)


def _labelled_rows(source: LoadedDataset, name: str, task: AnyTask) -> Dataset:
    rows, split = source.splits[name], f"{source.name} {name}"
    missing = [column for column in (*task.texts, task.label) if column not in rows.column_names]
    if missing:
        raise UserError(
            f"{split} has no column {missing[0]!r}; its columns are {', '.join(rows.column_names)}; "
            "name columns that all splits have by text_columns and label_column"
        )
    if source.drop_unlabelled and (gone := unlabelled_rows(rows, task)):
        rows = rows.select(sorted({*range(len(rows))} - {*gone}))
        split += f" (its {len(gone)} rows without a label left out)"
    if not len(rows):
        raise UserError(f"{split} is empty, where at least one row is needed; check the file")
    task_type_of(task).check(rows, task, split)
    return rows


def unlabelled_rows(rows: Dataset, task: AnyTask) -> list[int]:
    """Return the indices of rows without a label."""
    return [i for i, value in enumerate(rows[task.label][:]) if is_missing(value, getattr(task, "labels", ()))]


def _split_off(rows: Dataset, seed: int, purpose: str) -> tuple[Dataset, Dataset]:
    """Return (remaining rows, split-off rows): 10 %, at most 2,000 rows, at least one; both in the dataset's order."""
    size = min(max(1, round(HELD_OUT * len(rows))), HELD_OUT_ROWS)
    order = torch.randperm(len(rows), generator=cpu_generator(seed, purpose)).tolist()
    return rows.select(sorted(order[size:])), rows.select(sorted(order[:size]))
