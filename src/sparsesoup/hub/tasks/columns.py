"""The columns of a text task: named, or found by their types and names."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as compute
from datasets import ClassLabel, Dataset, Features, Value

from sparsesoup.core.errors import UserError
from sparsesoup.hub.tasks.labels import FEW, FLAGS, STRINGS, TextTask, class_names, columns_of, visible_text
from sparsesoup.hub.tasks.metrics import GLUE, default_metrics, glue_task

LABEL_NAMES = (
    "label", "labels", "target", "targets", "class", "category", "sentiment", "intent", "topic", "score", "rating",
)  # fmt: skip
ID_NAMES = ("idx", "id", "guid", "uid", "uuid", "index", "row_id", "pairid", "promptid")


def find_task(train: Dataset, name: str, texts: Sequence[str] | None = None, label: str | None = None) -> TextTask:
    """Infer the task of a dataset from its name (GLUE) or its columns; named columns override what is inferred."""
    features = train.features
    glue = glue_task(name)
    if glue and {*GLUE[glue][0], "label"} <= set(features):
        texts, label = texts or GLUE[glue][0], label or "label"
    label, labels = find_label(train, name, label)
    if texts:
        chosen = [_require_column(text, features, name, "text_columns") for text in texts]
    else:
        candidates = text_candidates(features, label)
        # Short sentences with many repetitions look as if they gave the label away: then there is nothing else to read.
        chosen = [column for column in candidates if not spell_the_label(train, column, label)] or candidates
        if not 1 <= len(chosen) <= 2:
            what = (
                f"{len(chosen)} columns that may be the text ({', '.join(chosen)})" if chosen else "no column of text"
            )
            raise UserError(
                f"{name} has {what}, where one or two are allowed; its columns are {columns_of(features)}; name them",
                "text_columns",
            )
    if len(chosen) > 2 or label in chosen or len(set(chosen)) < len(chosen):
        raise UserError(
            f"{name}: the text columns are {', '.join(chosen)} and the label column is {label}, where one or two text "
            f"columns and another one for the label are allowed; {FLAGS}"
        )
    return TextTask(tuple(chosen), label, labels, default_metrics(labels, glue))


def text_candidates(features: Features, label: str) -> list[str]:
    """Return the columns that may be texts: strings whose name is neither an identifier nor that of label words."""
    found = [column for column, kind in features.items() if isinstance(kind, Value) and kind.dtype in STRINGS]
    # `label_text` beside `label` holds the answer: reading it as a text would make the task trivial.
    return [c for c in found if c != label and c.lower() not in ID_NAMES and not c.lower().startswith("label")]


def spell_the_label(train: Dataset, column: str, label: str) -> bool:
    """Return True for a column of strings that are the names of labels, or few values that each determine the label."""
    table: pa.Table = train.select_columns([column, label]).with_format("arrow")[:]
    values, labels = (compute.unique(table[name].drop_null()).to_pylist() for name in (column, label))
    kind = train.features[label]
    names = {str(name).strip().lower() for name in (kind.names if isinstance(kind, ClassLabel) else labels)}
    # One row per value proves nothing: at least two rows on average.
    if not 1 < len(values) <= max(FEW, 2 * len(names)) or 2 * len(values) > len(table):
        return False
    if {value.strip().lower() for value in values} <= names:
        return True
    pairs = table.filter(compute.is_valid(table[column])).group_by([column, label]).aggregate([])
    return pairs.num_rows == len(values) and compute.count_distinct(table[label]).as_py() > 1


def _require_column(column: str, features: Features, name: str, field: str) -> str:
    if column not in features:
        raise UserError(f"{name} has no column {column!r}; its columns are {columns_of(features)}; name one", field)
    return column


def find_label(train: Dataset, name: str, label: str | None = None) -> tuple[str, tuple[str, ...]]:
    """Return (label column, its class names, none for numbers): the named column, or one that looks like a label."""
    features = train.features
    named = [_require_column(label, features, name, "label_column")] if label else []
    named = named or [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
    named = named or [column for column in features if column.lower() in LABEL_NAMES]
    if len(named) != 1:
        several = f"{len(named)} columns that may be the label ({', '.join(named)})"
        what = several if named else "no column that looks like a label"
        data = any(column.strip().lstrip("+-").replace(".", "", 1).isdigit() for column in features)
        head = " (the first line of a file is read as the names of its columns)" if data else ""
        raise UserError(f"{name} has {what}; its columns are {columns_of(features)}{head}; name it", "label_column")
    labels, known = class_names(train, named[0], name), dict[str, str]()
    for text in labels:
        if (other := known.setdefault(visible_text(text), text)) != text:
            raise UserError(
                f"{name}: the label column {named[0]} has the classes {other!a} and {text!a}, which look the "
                f"same: they differ by spaces, invisible signs or in how signs are encoded; write them alike"
            )
    return named[0], labels
