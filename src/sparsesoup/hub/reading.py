"""How files and the Hub's repositories become rows, quietly: no bars, no logs and no tracebacks of the libraries."""

import csv
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from datasets import Dataset, Features, Value
from huggingface_hub import constants

from sparsesoup.errors import UserError
from sparsesoup.files import from_json
from sparsesoup.hub.online import PATIENCE, answers

READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json"}
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "package.json")
SQUAD = re.compile(r'\s*\{.*"data"\s*:\s*\[.*"paragraphs"', re.DOTALL)  # how a file of SQuAD's own format begins


def find_files(place: Path) -> dict[str, list[Path]]:
    """Split name -> its files, told from names such as train.csv, dev.tsv or data/test-00000-of-00001.parquet.

    A single file, and files of which none is named after a split, are the training split.
    Raises: UserError where a split mixes file formats, or the file's format is unknown.
    """
    if place.is_file():
        if place.suffix.lower() not in READERS:
            raise UserError(
                f"cannot read {place}: its ending {place.suffix!r} is none of {', '.join(READERS)}; convert the file"
            )
        return {"train": [place]}
    files = [file for folder in _folders(place) for file in sorted(folder.iterdir()) if _is_data(file)]
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(split_of(file, place), []).append(file)
    unnamed = found.pop("", [])
    found = found or ({"train": unnamed} if unnamed else {})
    for name, paths in found.items():
        formats = sorted({path.suffix.lower() for path in paths})
        if len(formats) > 1:
            raise UserError(
                f"{place} holds its {name} split as {' and '.join(formats)}, where one is allowed; remove one"
            )
    return found


def split_of(file: Path, place: Path) -> str:
    """The split that a file is part of, from its name, else from its folder below `place`; "" where none is named."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", file.stem).lower()
    words = re.split(r"[^a-z0-9]+", stem)
    named = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
    if named:
        kind = next((word for word in words if word in ("matched", "mismatched")), None)
        return f"{named[0]}_{kind}" if kind else named[0]
    return SPLIT_WORDS.get(file.parent.name.lower(), "") if file.parent != place else ""


def read_files(name: str, paths: list[Path]) -> Dataset:
    """The rows of these files of one format, in the files' order; `name` says in errors which split they are."""
    for path in paths:
        if not path.stat().st_size:
            raise UserError(f"{path} is empty, where the rows of the {name} split are needed; check the file")
    suffix = paths[0].suffix.lower()
    files = {"train": [str(path.resolve()) for path in paths]}
    try:
        with quiet():
            if suffix == ".json" and all(SQUAD.match(_head(path)) for path in paths):
                return _squad(paths)
            return datasets.load_dataset(READERS[suffix], data_files=files, split="train", **_options(suffix, paths))
    except Exception as error:
        if "corresponds to no data" in str(error):  # what datasets says of a table with a head and no rows
            raise UserError(
                f"{name} is empty: {paths[0]} has no rows, where at least one is needed; check it"
            ) from error
        raise UserError(
            f"cannot read {paths[0]} ({len(paths)} files of the {name} split) as {suffix[1:]}: {one_line(error)}; "
            "check that the file is whole and that all rows have the same columns"
        ) from error


def _head(path: Path) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read(2000)


def _squad(paths: list[Path]) -> Dataset:
    """Articles with paragraphs with questions, as SQuAD publishes them, as the table that the Hub has."""
    articles = [article for path in paths for article in from_json(path.read_text(encoding="utf-8"))["data"]]
    rows = [
        (str(asked.get("id", "")), article.get("title"), paragraph["context"], asked["question"], asked["answers"])
        for article in articles
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]
    answers = [{key: [answer[key] for answer in row[-1]] for key in ("text", "answer_start")} for row in rows]
    texts = {name: [row[i] for row in rows] for i, name in enumerate(("id", "title", "context", "question"))}
    kinds = {"text": datasets.List(Value("string")), "answer_start": datasets.List(Value("int32"))}
    features = Features({**dict.fromkeys(texts, Value("string")), "answers": kinds})
    return Dataset.from_dict({**texts, "answers": answers}, features=features)


def open_hub(repository: str, config: str | None) -> Mapping[str, Dataset]:
    """All splits of a repository on the Hub, or of its copy in the cache where the Hub is out of reach."""
    there, offline = answers(huggingface_hub.HfApi().dataset_info, repository), constants.HF_HUB_OFFLINE
    with quiet(), _offline_if(not there):
        try:
            return dict(datasets.load_dataset(repository, config))
        except Exception as error:
            if there:
                raise
            why = "offline mode is set" if offline else f"no answer within {PATIENCE:g} s"
            raise ConnectionError(f"{why}, and no copy in the cache") from error


def one_line(error: BaseException) -> str:
    """The first cause of an error on one line."""
    while error.__cause__ is not None and not isinstance(error, ConnectionError):
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars, warnings and logs of the libraries off the terminal; the caller's settings come back."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub", "fsspec")]
    levels = [logger.level for logger in loggers]
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def _offline_if(offline: bool) -> Iterator[None]:
    """Both libraries read HF_HUB_OFFLINE once, at import; these are the places where they look it up afterwards."""
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if offline:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _folders(place: Path) -> list[Path]:
    """Where data may lie: the folder, its `data`, and folders in these that are named after a split; nothing deeper."""
    tops = [folder for folder in (place, place / "data") if folder.is_dir()]
    below = [
        each for top in tops for each in sorted(top.iterdir()) if each.is_dir() and each.name.lower() in SPLIT_WORDS
    ]
    return [*tops, *below]


def _is_data(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in READERS and file.name not in NO_DATA and file.name[0] not in "._"


def _options(suffix: str, paths: list[Path]) -> dict[str, Any]:
    if READERS[suffix] != "csv":
        return {}
    # pandas would read the texts "None", "null" and "NA" as missing.
    options: dict[str, Any] = {"sep": ",", "keep_default_na": False, "na_values": [""]}
    if suffix == ".tsv":
        options |= {"sep": "\t", "quoting": csv.QUOTE_MINIMAL if all(map(_quoted, paths)) else csv.QUOTE_NONE}
    return options


def _quoted(path: Path) -> bool:
    """Whether quotes in a table with tabs stand around fields; in GLUE's own files they are part of the text."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.reader(file, delimiter="\t", strict=True)
            width = len(next(rows, []))
            return all(len(row) in (0, width) and not any({"\n", "\t"} <= {*field} for field in row) for row in rows)
    except (csv.Error, UnicodeDecodeError):
        return False
