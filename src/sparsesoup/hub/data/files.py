"""Read tables, SQuAD's files and Hub repositories as rows; tables that pandas would misread are refused."""

import csv
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow.parquet as parquet
from datasets import Dataset, Features, List, Value
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from sparsesoup.core.errors import UserError, cause_line, root_cause
from sparsesoup.core.files import from_json, is_disk_full
from sparsesoup.hub.data.folders import READERS, with_images
from sparsesoup.hub.quiet import quiet_libraries

PATIENCE = 5.0  # seconds to wait for the Hub; its own clients try for half a minute
TAB = "\t"
SQUAD = re.compile(r'\s*\{.*"data"\s*:\s*\[.*"paragraphs"', re.DOTALL)  # the start of a file in SQuAD's own format


def csv_options(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the pandas options for reading these tables.

    Raises: UserError that names file and line of a row with more or fewer fields than the header: pandas would use the
        first field of longer rows as an index, which shifts all names, and fill up shorter rows.
    """
    # By default pandas would read the texts "None", "null" and "NA" as missing.
    options: dict[str, Any] = {"sep": ",", "keep_default_na": False, "na_values": [""]}
    if paths[0].suffix.lower() == ".tsv":
        options |= {
            "sep": "\t",
            "quoting": csv.QUOTE_MINIMAL if all(map(_has_quoted_fields, paths)) else csv.QUOTE_NONE,
        }
    form = {"delimiter": options["sep"], "quoting": options.get("quoting", csv.QUOTE_MINIMAL)}
    if any(name.startswith(" ") for path in paths for name in next(_read_records(path, **form), (0, []))[1]):
        form["skipinitialspace"] = options["skipinitialspace"] = True  # a head such as "text, label"
    for path in paths:
        _check_rows(path, **form)
    return options


def rows_of_parquet(path: Path) -> int:
    """Return the number of rows of a parquet file, from its footer; refuse two columns of one name."""
    found = parquet.read_metadata(path)
    _check_head(path, found.schema.to_arrow_schema().names)
    return int(found.num_rows)


def _check_rows(path: Path, **form: Any) -> None:
    """Check the widths of all rows, and that nothing stands between a closing quote and the end of its field.

    A stray quote opens a field that ends at the next quote, perhaps rows later: what follows that one betrays it.
    """
    try:
        _check_widths(path, strict=True, **form)
    except csv.Error as error:
        _check_widths(path, **form)  # a row that is too long or short says more
        raise UserError(
            f"{path}: {error}: a quote stands where no field begins or ends; double the quotes inside fields, and put "
            f"these fields in quotes"
        ) from error


def _check_widths(path: Path, **form: Any) -> None:
    head: list[str] = []
    for line, row in _read_records(path, **form):
        if not head:
            head = row
            _check_head(path, head)
            if other := _other_separator(head, form["delimiter"]):
                name = {"\t": "tabs", ",": "commas"}
                raise UserError(
                    f"{path}: the first line has one column ({head[0][:80]}), whose names seem to be separated by "
                    f"{name.get(other, repr(other))}; fields of a {path.suffix.lower()} file are separated by "
                    f"{name[form['delimiter']]}; {'name it .tsv' if other == TAB else 'write the table so'}"
                )
        elif len(row) != len(head):
            fields = f"{len(row)} field{'s'[: len(row) != 1]}, where the head has {len(head)} ({', '.join(head)[:200]})"
            raise UserError(f"{path}, line {line} has {fields}; {_quoting_remedy(row, head, form['delimiter'])}")
    if not head:
        raise UserError(f"{path} holds nothing but blank lines, where the first names the columns; check the file")


def _other_separator(head: Sequence[str], separator: str) -> str:
    """Return the sign that seems to separate the names of a head; empty if it is the expected one."""
    return next((sign for sign in ";\t|," if len(head) == 1 and sign in head[0] and sign != separator), "")


def _quoting_remedy(row: Sequence[str], head: Sequence[str], separator: str) -> str:
    if len(row) < len(head):
        quotes = ", or close its quotes" if any("\n" in field for field in row) else ""
        return f"complete the row{quotes}; the file may be cut off"
    if not row[-1]:
        return f"remove the {separator!r} at its end"
    return f"put fields that hold a {separator!r} in quotes, or name all columns in the head"


def _check_head(path: Path, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(name.strip() for name in names).items() if name and count > 1]
    if twice:
        raise UserError(f"{path} has the column {twice[0]!r} twice, where each name is allowed once; rename one")


def _has_quoted_fields(path: Path) -> bool:
    """Return True if quotes in a tab-separated table enclose fields; in GLUE's files they are part of the text."""
    width = 0
    try:
        for _, row in _read_records(path, delimiter="\t", strict=True):
            width = width or len(row)
            if len(row) != width or any({"\n", "\t"} <= {*field} for field in row):
                return False
    except (csv.Error, UnicodeDecodeError):
        return False
    return True


def _read_records(path: Path, **form: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, fields) of every row except blank ones, which pandas skips."""
    before = csv.field_size_limit(sys.maxsize)  # the module's default of 128 kB is less than a long text
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows, line = csv.reader(file, **form), 1
            for row in rows:
                if len(row) > 1 or "".join(row).strip():
                    yield line, row
                line = rows.line_num + 1
    finally:
        csv.field_size_limit(before)


def read_files(name: str, paths: list[Path]) -> Dataset:
    """Read files of one format in order; `name` is the split's name in errors."""
    for path in paths:
        if not path.stat().st_size:
            raise UserError(f"{path} is empty, where the rows of the {name} split are needed; check the file")
    suffix = paths[0].suffix.lower()
    try:
        with quiet_libraries():
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
        if isinstance(cause, UnicodeDecodeError):
            raise UserError(
                f"cannot read {paths[0]}: it is no text in UTF-8, which is needed ({cause.reason}); save it in UTF-8"
            ) from error
        count = f"{len(paths)} file{'s'[: len(paths) != 1]}"
        raise UserError(
            f"cannot read {paths[0]} ({count} of the {name} split) as {suffix[1:]}: {cause_line(error)}; "
            "check that the file is whole and that all rows have the same columns"
        ) from error


def _first_characters(path: Path) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read(2000)


def _read_squad(paths: list[Path]) -> Dataset:
    """Read SQuAD's published JSON (articles, paragraphs, questions) as the table on the Hub."""
    articles = [article for path in paths for article in from_json(path.read_text(encoding="utf-8"))["data"]]
    rows = [
        {"id": str(question.get("id", "")), "title": article.get("title"), "context": paragraph["context"],
         "question": question["question"],
         "answers": {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")}}
        for article in articles for paragraph in article["paragraphs"] for question in paragraph["qas"]
    ]  # fmt: skip
    text, answers = Value("string"), {"text": List(Value("string")), "answer_start": List(Value("int32"))}
    kinds = {"id": text, "title": text, "context": text, "question": text, "answers": answers}
    return Dataset.from_list(rows, features=Features(kinds))


def hub_is_reachable(request: Callable[..., object], name: str) -> bool:
    """Return True if the Hub answers `HfApi().model_info` or the like within seconds; a refusal is an answer too."""
    try:
        request(name, timeout=PATIENCE)
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
    with quiet_libraries():
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
