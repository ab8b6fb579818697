"""Read files and Hub repositories as rows, without progress bars, logs and tracebacks of the libraries."""

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import datasets
import huggingface_hub
from datasets import Dataset, Features, List, Value
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from sparsesoup.core.errors import UserError, cause_line, root_cause
from sparsesoup.core.files import from_json, is_disk_full
from sparsesoup.hub.data.image_folder import with_images
from sparsesoup.hub.data.layout import READERS
from sparsesoup.hub.data.table_checks import csv_options, rows_of_parquet

PATIENCE = 5.0  # seconds to wait for the Hub; its own clients try for half a minute
SQUAD = re.compile(r'\s*\{.*"data"\s*:\s*\[.*"paragraphs"', re.DOTALL)  # the start of a file in SQuAD's own format


def read_files(name: str, paths: list[Path]) -> Dataset:
    """Read files of one format in order; `name` is the split's name in errors."""
    for path in paths:
        if not path.stat().st_size:
            raise UserError(f"{path} is empty, where the rows of the {name} split are needed; check the file")
    suffix = paths[0].suffix.lower()
    try:
        with quiet_datasets():
            if suffix == ".json" and all(SQUAD.match(_first_characters(path)) for path in paths):
                return _read_squad(paths)
            empty = UserError(f"{name} is empty: {paths[0]} has no rows, where at least one is needed; check it")
            if suffix == ".parquet" and not (paths := [path for path in paths if rows_of_parquet(path)]):
                raise empty
            options = csv_options(paths) if READERS[suffix] == "csv" else {}
            files = {"train": [str(path.resolve()) for path in paths]}
            rows = datasets.load_dataset(READERS[suffix], data_files=files, split="train", **options)
            return with_images(rows.rename_columns({name: name.strip() for name in rows.column_names}), paths)
    except UserError:
        raise
    except Exception as error:
        if "corresponds to no data" in str(error):  # the error of datasets for a table with a header and no rows
            raise empty from error
        cause = root_cause(error)
        if isinstance(cause, OSError) and is_disk_full(cause):  # datasets writes a cache of the file
            raise OSError(cause.errno, cause.strerror, str(datasets.config.HF_DATASETS_CACHE)) from error
        raise UserError(
            f"cannot read {paths[0]} ({len(paths)} files of the {name} split) as {suffix[1:]}: {cause_line(error)}; "
            "check that the file is whole and that all rows have the same columns"
        ) from error


def _first_characters(path: Path) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read(2000)


def _read_squad(paths: list[Path]) -> Dataset:
    """Read SQuAD's published JSON (articles, paragraphs, questions) as the table on the Hub."""
    articles = [article for path in paths for article in from_json(path.read_text(encoding="utf-8"))["data"]]
    rows = [
        {"id": str(asked.get("id", "")), "title": article.get("title"), "context": paragraph["context"],
         "question": asked["question"],
         "answers": {key: [answer[key] for answer in asked["answers"]] for key in ("text", "answer_start")}}
        for article in articles for paragraph in article["paragraphs"] for asked in paragraph["qas"]
    ]  # fmt: skip
    text, answers = Value("string"), {"text": List(Value("string")), "answer_start": List(Value("int32"))}
    kinds = {"id": text, "title": text, "context": text, "question": text, "answers": answers}
    return Dataset.from_list(rows, features=Features(kinds))


def hub_is_reachable(ask: Callable[..., object], name: str) -> bool:
    """Return True if the Hub answers `HfApi().model_info` or the like within seconds; a refusal is an answer too."""
    try:
        ask(name, timeout=PATIENCE)
    except HfHubHTTPError:
        return True
    except Exception:
        # No name server, a time-out, offline mode: the exception depends on the version of the HTTP library.
        return False
    return True


def open_hub(repository: str, config: str | None) -> Mapping[str, Dataset]:
    """Open all splits of a repository on the Hub, or of its cached copy if the Hub is not reachable."""
    there = hub_is_reachable(huggingface_hub.HfApi().dataset_info, repository)
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    with quiet_datasets():
        try:
            if not there:  # both libraries read HF_HUB_OFFLINE only at import, so set their copies of it
                datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
            return dict(datasets.load_dataset(repository, config))
        except Exception as error:
            if there:
                raise
            why = "offline mode is set" if before[1] else f"no answer within {PATIENCE:g} s"
            raise ConnectionError(f"{why}, and no copy in the cache") from error
        finally:
            datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


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
