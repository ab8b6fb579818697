"""Check tables that pandas would misread: rows of another width than the header, duplicate columns."""

import csv
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from sparsesoup.core.errors import UserError


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
        elif len(row) != len(head):
            fields = f"{len(row)} field{'s'[: len(row) != 1]}, where the head has {len(head)} ({', '.join(head)[:200]})"
            raise UserError(f"{path}, line {line} has {fields}; {_quoting_remedy(row, head, form['delimiter'])}")


def _quoting_remedy(row: Sequence[str], head: Sequence[str], separator: str) -> str:
    other = next((sign for sign in ";\t|," if len(head) == 1 and sign in head[0] and sign != separator), "")
    if other:
        return f"fields are separated by {separator!r} here and not by {other!r}; write the table so"
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
