"""Read files and Hub repositories as rows, without progress bars, logs and tracebacks of the libraries."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import datasets
import huggingface_hub
from datasets import Dataset, Features, Value
from huggingface_hub import constants

from sparsesoup.core.errors import UserError, cause_line, root_cause
from sparsesoup.core.files import from_json, is_disk_full
from sparsesoup.hub.connectivity import PATIENCE, hub_is_reachable
from sparsesoup.hub.data.layout import READERS
from sparsesoup.hub.data.table_checks import csv_options, rows_of_parquet

SQUAD = re.compile(r'\s*\{.*"data"\s*:\s*\[.*"paragraphs"', re.DOTALL)  # the start of a file in SQuAD's own format


def read_files(name: str, paths: list[Path]) -> Dataset:
    """Read files of one format in order; `name` is the split's name in errors."""
    for path in paths:
        if not path.stat().st_size:
            raise UserError(f"{path} is empty, where the rows of the {name} split are needed; check the file")
    suffix = paths[0].suffix.lower()
    try:
        with quiet_datasets():
            if suffix == ".json" and all(SQUAD.match(_first_bytes(path)) for path in paths):
                return _read_squad(paths)
            if suffix == ".parquet":
                paths = [path for path in paths if rows_of_parquet(path)] or _refuse_empty(name, paths)
            options = csv_options(paths) if READERS[suffix] == "csv" else {}
            files = {"train": [str(path.resolve()) for path in paths]}
            rows = datasets.load_dataset(READERS[suffix], data_files=files, split="train", **options)
            return rows.rename_columns({name: name.strip() for name in rows.column_names})
    except UserError:
        raise
    except Exception as error:
        if "corresponds to no data" in str(error):  # the error of datasets for a table with a header and no rows
            _refuse_empty(name, paths)
        cause = root_cause(error)
        if isinstance(cause, OSError) and is_disk_full(cause):  # datasets writes a cache of the file
            raise OSError(cause.errno, cause.strerror, str(datasets.config.HF_DATASETS_CACHE)) from error
        raise UserError(
            f"cannot read {paths[0]} ({len(paths)} files of the {name} split) as {suffix[1:]}: {cause_line(error)}; "
            "check that the file is whole and that all rows have the same columns"
        ) from error


def _refuse_empty(name: str, paths: list[Path]) -> NoReturn:
    raise UserError(f"{name} is empty: {paths[0]} has no rows, where at least one is needed; check it")


def _first_bytes(path: Path) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read(2000)


def _read_squad(paths: list[Path]) -> Dataset:
    """Read SQuAD's published JSON (articles, paragraphs, questions) as the table on the Hub."""
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
    """Open all splits of a repository on the Hub, or of its cached copy if the Hub is not reachable."""
    there, offline = hub_is_reachable(huggingface_hub.HfApi().dataset_info, repository), constants.HF_HUB_OFFLINE
    with quiet_datasets(), _offline_if(not there):
        try:
            return dict(datasets.load_dataset(repository, config))
        except Exception as error:
            if there:
                raise
            why = "offline mode is set" if offline else f"no answer within {PATIENCE:g} s"
            raise ConnectionError(f"{why}, and no copy in the cache") from error


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Disable progress bars, warnings and logs of the libraries in this block; the caller's settings are restored."""
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
    """Switch to offline mode; both libraries read HF_HUB_OFFLINE only at import, so set their copies of it."""
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if offline:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
