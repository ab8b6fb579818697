"""Where a dataset comes from, and which of its rows a method may see.

A dataset is looked for on the disk, below the data root, among the embedded sets and on the Hub, in this order.
Methods get `training_splits`; the test rows are opened by `open_test` alone.
"""

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset

from sparsesoup.errors import UserError
from sparsesoup.hub.embedded import embedded_dataset
from sparsesoup.hub.folders import find_classes, read_classes, with_images
from sparsesoup.hub.kinds import AnyTask, kind_of
from sparsesoup.hub.reading import find_files, one_line, open_hub, read_files
from sparsesoup.hub.tasks import glue_task
from sparsesoup.rng import generator

DATA_ROOT = "SPARSESOUP_DATA"
EMBEDDED = "docstrings"
SHORT = {  # names of old that a cache does not know
    "squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2", "mnist": "ylecun/mnist",
    "cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100",
}  # fmt: skip
HELD_OUT, HELD_OUT_ROWS = 0.1, 2000
TEST_SEED = 0
TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "valid", "dev", "val")


class Splits(Mapping[str, Dataset]):
    """Named splits, each read when first asked for."""

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
class Source:
    """A dataset that was found.

    Args:
        name: short, and safe as a folder name: `glue/sst2`, `imdb`.
        splits: name -> rows, opened when asked for.
    """

    name: str
    splits: Mapping[str, Dataset]

    @functools.cached_property
    def train(self) -> Dataset:
        """The training split as published: a test slice that `open_test` carves is still in it."""
        return self.splits[_train_name(self)]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the training split's columns and rows; the same for the same rows in any place and file format."""
        digest = hashlib.sha256(repr((sorted(self.train.column_names), len(self.train))).encode())
        columns = self.train.select_columns(sorted(self.train.column_names)).with_format("arrow")
        for table in columns.iter(batch_size=1000):
            for row in table.to_pylist():
                digest.update(repr([_contents(value) for value in row.values()]).encode())
        return digest.hexdigest()


def open_splits(dataset: str, *, data_root: str | None = None, config: str | None = None) -> Source:
    """The dataset of that name: a path, a folder below the data root, the embedded set, or one of the Hub's.

    Args:
        dataset: `path/to/folder`, `path/to/file.csv`, `glue/sst2`, `docstrings`, `owner/name` or `owner/name:config`.
        data_root: where named datasets lie; default the environment variable SPARSESOUP_DATA.
        config: the configuration on the Hub, or the subfolder on the disk.
    Raises: UserError where it is not found, not readable or empty.
    """
    if not dataset.strip():
        raise UserError("the dataset's name is empty, where a path or a name is needed; give one, such as glue/sst2")
    looked = []
    for place in _places(dataset, data_root):
        if _exists(place):
            return _open_local(place, config)
        looked.append(str(place))
    if dataset == EMBEDDED:
        return Source(EMBEDDED, embedded_dataset())
    if dataset.startswith((".", "/", "~")) or Path(dataset).suffix in (".csv", ".tsv", ".jsonl", ".json", ".parquet"):
        raise UserError(
            f"no dataset {dataset!r}: there is no such file or folder (looked at {', '.join(looked)}); correct the path"
        )
    return _open_on_hub(dataset, config, looked)


def training_splits(source: Source, task: AnyTask, seed: int) -> tuple[Dataset, Dataset]:
    """(train, validation), both from the training split alone: a seeded 10 %, at most 2,000 rows, is held out."""
    name = _train_name(source)
    rows = _labelled(source.splits[name], task, f"{source.name} {name}")
    if _needs_carving(source, task):
        rows = _carve(rows, TEST_SEED, "test")[0]
    if len(rows) < 2:
        raise UserError(
            f"{source.name} has too few rows to train on ({len(rows)}); at least 2 are needed, one for validation"
        )
    return _carve(rows, seed, "validation")


def open_test(source: Source, task: AnyTask) -> dict[str, Dataset]:
    """The test rows by name (`test`; MNLI's are `matched` and `mismatched`); no method may call this.

    GLUE's official validation split is the test split; elsewhere a labelled `test`, else `validation`; a dataset with a
    training split alone has a tenth of it carved out, which `training_splits` leaves out.
    """
    names = test_splits(source, task)
    parts = {key: _labelled(source.splits[name], task, f"{source.name} {name}") for key, name in names.items()}
    if _needs_carving(source, task):
        # Not the run's seed: runs of different seeds have to be compared on the same test rows.
        parts = {key: _carve(rows, TEST_SEED, "test")[1] for key, rows in parts.items()}
    return parts


def test_splits(source: Source, task: AnyTask) -> dict[str, str]:
    """What `open_test` calls its rows -> the split of the dataset that they are, or are carved out of."""
    return {"test": _train_name(source)} if _needs_carving(source, task) else _test_names(source, task)


def _places(dataset: str, data_root: str | None) -> list[Path]:
    root = data_root if data_root is not None else os.environ.get(DATA_ROOT)
    places = [Path(dataset).expanduser()]
    if root:
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise UserError(
                f"the data root {root} is no folder, where one that holds datasets is needed; "
                f"correct `--data-root` or {DATA_ROOT}"
            )
        places.append(folder / dataset)
    return places


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except OSError:  # a name too long for a file, a folder that may not be entered
        return False


def _open_local(place: Path, config: str | None) -> Source:
    if config is not None:
        if not (place / config).is_dir():
            raise UserError(
                f"{place} has no subfolder {config!r}; it has {_folders(place)}; "
                "name one of them or leave the configuration out"
            )
        place = place / config
    try:
        files = find_files(place)
    except OSError as error:
        raise UserError(f"cannot look into {place}: {one_line(error)}; correct its permissions") from error
    openers = {name: _opener(name, paths) for name, paths in files.items()} or _image_openers(place)
    if not openers:
        raise UserError(
            f"no data in {place}: no parquet, csv, tsv, jsonl or json file there or in its data folder, and no folders "
            f"of images (subfolders: {_folders(place)}); name a folder with train.csv or the like"
        )
    return Source(_local_name(place), Splits(openers))


def _opener(name: str, paths: list[Path]) -> Callable[[], Dataset]:
    return lambda: with_images(read_files(name, paths), paths)


def _image_openers(place: Path) -> dict[str, Callable[[], Dataset]]:
    splits = find_classes(place)
    names = sorted({name for classes in splits.values() for name in classes})
    return {split: functools.partial(read_classes, classes, names) for split, classes in splits.items()}


def _contents(value: object) -> object:
    """An image's bytes, wherever they lie and whatever their file is called; any other value itself."""
    if not isinstance(value, dict) or value.keys() != {"bytes", "path"} or value["path"] is None:
        return value
    try:
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
    except OSError as error:
        raise UserError(
            f"{value['path']}, which a row of the training split names, cannot be read: {one_line(error)}; put it back "
            f"or drop such rows"
        ) from error


def _folders(place: Path) -> str:
    names = sorted(each.name for each in place.iterdir() if each.is_dir()) if place.is_dir() else []
    return ", ".join(names[:12]) or "none"


def _local_name(place: Path) -> str:
    whole = place.resolve()
    own = _safe(whole.stem if whole.is_file() else whole.name)
    return f"glue/{own}" if whole.parent.name == "glue" else own


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "dataset"


def _open_on_hub(dataset: str, config: str | None, looked: list[str]) -> Source:
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
            f"{config or 'default'}) says {one_line(error)}; correct the name, set {DATA_ROOT}, or use `{EMBEDDED}`"
        ) from error
    if repository == "nyu-mll/glue" and config:
        return Source(f"glue/{_safe(config)}", splits)
    parts = [_safe(part) for part in dataset.partition(":")[0].split("/")]
    return Source("/".join(parts) + (f"-{_safe(config)}" if config else ""), splits)


def _train_name(source: Source) -> str:
    named = [name for name in source.splits if name.lower() in TRAIN_NAMES]
    others = (*VALIDATION_NAMES, "test")
    if not named and len(source.splits) == 1 and not next(iter(source.splits)).lower().startswith(others):
        named = list(source.splits)
    if not named:
        raise UserError(
            f"{source.name} has no training split: its splits are {', '.join(source.splits)}, where one named train is "
            "needed; rename the file or name another dataset"
        )
    return named[0]


def _needs_carving(source: Source, task: AnyTask) -> bool:
    """Whether no other split can be the test split; looks into `test` only where it is the sole candidate."""
    if any(name.startswith(VALIDATION_NAMES) for name in source.splits):
        return False
    return "test" not in source.splits or not kind_of(task).labelled(source.splits["test"], task)


def _test_names(source: Source, task: AnyTask) -> dict[str, str]:
    """What `open_test` calls each test split -> the split's own name."""
    candidates = [name for name in source.splits if name.startswith(VALIDATION_NAMES)]
    plain = [name for name in VALIDATION_NAMES if name in candidates] or candidates[:1]
    if glue_task(source.name) and candidates:
        both = {key: f"validation_{key}" for key in ("matched", "mismatched")}
        return {key: name for key, name in both.items() if name in candidates} or {"test": plain[0]}
    labelled = "test" in source.splits and kind_of(task).labelled(source.splits["test"], task)
    return {"test": "test" if labelled else plain[0]}


def _labelled(rows: Dataset, task: AnyTask, split: str) -> Dataset:
    missing = [column for column in (*task.texts, task.label) if column not in rows.column_names]
    if missing:
        raise UserError(
            f"{split} has no column {missing[0]!r}; its columns are {', '.join(rows.column_names)}; "
            "name columns that all splits have with `--text-columns` and `--label-column`"
        )
    if not len(rows):
        raise UserError(f"{split} is empty, where at least one row is needed; check the file")
    kind_of(task).check(rows, task, split)
    return rows


def _carve(rows: Dataset, seed: int, purpose: str) -> tuple[Dataset, Dataset]:
    """(what stays, what is carved out): 10 %, at most 2,000 rows, at least one; both in the dataset's order."""
    size = min(max(1, round(HELD_OUT * len(rows))), HELD_OUT_ROWS)
    order = torch.randperm(len(rows), generator=generator(seed, purpose)).tolist()
    return rows.select(sorted(order[size:])), rows.select(sorted(order[:size]))
