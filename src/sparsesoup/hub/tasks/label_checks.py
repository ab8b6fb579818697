"""Check for columns that reveal the label, and for class names that are spelled in two ways."""

import unicodedata
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as compute
from datasets import ClassLabel, Dataset

from sparsesoup.core.errors import UserError

FEWEST = 20  # largest number of distinct values of a categorical column
REPEATS = 2  # minimum mean number of rows per value: one row per value proves nothing


def spell_the_label(train: Dataset, column: str, label: str) -> bool:
    """Return True for a column of few values that each determine the label, or that are the label names.

    Args:
        train: the training split.
        column: a string column.
        label: the label column.
    """
    table: pa.Table = train.select_columns([column, label]).with_format("arrow")[:]
    values = compute.unique(table[column].drop_null())
    names = _class_names(train, table, label)
    if not 1 < len(values) <= max(FEWEST, 2 * len(names)) or len(values) * REPEATS > len(table):
        return False
    if {value.strip().lower() for value in values.to_pylist()} <= names:
        return True
    pairs = table.filter(compute.is_valid(table[column])).group_by([column, label]).aggregate([])
    return pairs.num_rows == len(values) and compute.count_distinct(table[label]).as_py() > 1


def need_apart(labels: Sequence[str], column: str, name: str) -> None:
    """Raise a UserError if two class names differ only by spaces, or look the same."""
    known: dict[str, str] = {}
    for label in labels:
        other = known.setdefault(" ".join(unicodedata.normalize("NFKC", label).split()), label)
        if other != label:
            raise UserError(
                f"{name}: the label column {column} has the classes {other!r} and {label!r}, which differ by spaces or "
                f"in how signs are encoded; write them alike"
            )


def _class_names(train: Dataset, table: pa.Table, label: str) -> set[str]:
    kind = train.features[label]
    if isinstance(kind, ClassLabel):
        return {name.strip().lower() for name in kind.names}
    return {str(value).strip().lower() for value in compute.unique(table[label].drop_null()).to_pylist()}
