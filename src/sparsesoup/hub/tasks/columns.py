"""Text tasks: the columns to read, and the meaning of labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value

from sparsesoup.core.errors import UserError
from sparsesoup.hub.tasks.glue import GLUE, glue_task
from sparsesoup.hub.tasks.label_checks import need_apart, spell_the_label

LABEL_NAMES = (
    "label", "labels", "target", "targets", "class", "category", "sentiment", "intent", "topic", "score", "rating",
)  # fmt: skip
ID_NAMES = ("idx", "id", "guid", "uid", "uuid", "index", "row_id", "pairid", "promptid")
FLAGS = "name them with `--text-columns` and `--label-column`"
DROP = "drop rows without a label with `--drop-unlabelled true`"
FEW = 20  # a label with more distinct numbers is unlikely to be a class


@dataclass(frozen=True)
class TextTask:
    """A text-classification or regression task.

    Args:
        texts: the one or two text columns.
        label: the label column.
        labels: class names, in the order of the model's outputs; empty means regression.
        metrics: metrics to report; the first one is used for selection.
    """

    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]


def describe_text_task(task: TextTask) -> str:
    """Describe a text task.

    >>> describe_text_task(TextTask(("text",), "label", ("bad", "good"), ("accuracy",)))
    '2 classes (bad, good) in column label from column text'
    """
    shown = ", ".join(task.labels[:6]) + (", ..." if len(task.labels) > 6 else "")
    what = f"{len(task.labels)} classes ({shown})" if task.labels else "numbers (regression)"
    columns = f"columns {' and '.join(task.texts)}" if len(task.texts) > 1 else f"column {task.texts[0]}"
    return f"{what} in column {task.label} from {columns}"


def find_task(train: Dataset, name: str, texts: Sequence[str] | None = None, label: str | None = None) -> TextTask:
    """Infer the task of a dataset from its name (GLUE) or from its columns.

    Args:
        train: the training split; if labels have no names, its values give the classes.
        name: the dataset's name, as in `LoadedDataset.name`.
        texts: the text columns, to override the inference.
        label: the label column, likewise.
    Raises: UserError if the columns are ambiguous or unsuitable.
    """
    features = train.features
    glue = glue_task(name)
    if glue and {*GLUE[glue][0], "label"} <= set(features):
        texts, label = texts or GLUE[glue][0], label or "label"
    label, labels = find_label(train, name, label)
    chosen = (
        tuple(_require_column(text, features, name) for text in texts) if texts else _text_columns(train, label, name)
    )
    if len(chosen) > 2 or label in chosen or len(set(chosen)) < len(chosen):
        raise UserError(
            f"{name}: the text columns are {', '.join(chosen)} and the label column is {label}, where one or two text "
            f"columns and another one for the label are allowed; {FLAGS}"
        )
    task = TextTask(chosen, label, labels, ())
    return replace(task, metrics=default_metrics(task, glue))


def find_label(train: Dataset, name: str, label: str | None = None) -> tuple[str, tuple[str, ...]]:
    """Return (label column, its class names): the named column, or one that looks like a label; no names for numbers.

    Raises: UserError if there is no such column or several, or its values are not labels.
    """
    column = _require_column(label, train.features, name) if label else _label_column(train.features, name)
    labels = _class_names(train, column, name)
    need_apart(labels, column, name)
    return column, labels


def label_values(rows: Dataset, task: TextTask, split: str) -> list[int] | list[float]:
    """Return the labels of a split for the model: class indices, or numbers for regression.

    Raises: UserError that names split, first row, value and range of a missing or invalid label.
    """
    values, written = _labels_of(rows, task)
    classes = {name: i for i, name in enumerate(task.labels)}
    for i, value in enumerate(values):
        known = _is_number(value) if not task.labels else _is_class(value, classes, written)
        if not known:
            remedy = f"complete it, or {DROP}" if is_missing(value, task.labels) else "correct or drop such rows"
            raise UserError(
                f"{split}: row {i} has the label {value!r} in column {task.label}, where "
                f"{_allowed_labels(task, written)} is "
                f"allowed; {remedy}, or name another column with `--label-column`"
            )
    if not task.labels:
        return [float(value) for value in values]
    return [classes[value] if written else int(value) for value in values]


def has_labels(rows: Dataset, task: TextTask) -> bool:
    """Return True if any row has a label: competitions publish test rows with labels that are all -1 or missing."""
    if task.label not in rows.column_names:
        return False
    return any(value != -1 and not is_missing(value, task.labels) for value in rows.unique(task.label))


def is_missing(value: object, labels: Sequence[str]) -> bool:
    """Return True for a missing label: nothing, NaN, an empty text, or among classes the -1 of the Hub.

    >>> [is_missing(value, ("no", "yes")) for value in (None, float("nan"), " ", -1, 0, "no")]
    [True, True, True, True, False, False]
    """
    empty = value is None or value != value or (isinstance(value, str) and not value.strip())
    return empty or bool(labels and value == -1)


def columns_of(features: Features) -> str:
    """Describe the columns of a table: names and types."""
    kinds = (f"{name} ({getattr(kind, 'dtype', type(kind).__name__)})" for name, kind in features.items())
    return ", ".join(kinds)


STRINGS = ("string", "large_string", "string_view")
WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
MISSING = ("na", "n/a", "nan", "null", "?")  # spellings of a missing number in tables
REAL = ("float16", "float32", "float64", "double", "float")


def _require_column(column: str, features: Features, name: str) -> str:
    if column not in features:
        raise UserError(f"{name} has no column {column!r}; its columns are {columns_of(features)}; {FLAGS}")
    return column


def _label_column(features: Features, name: str) -> str:
    named = [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
    named = named or [column for column in features if column.lower() in LABEL_NAMES]
    if len(named) != 1:
        what = (
            f"{len(named)} columns that may be the label ({', '.join(named)})"
            if named
            else "no column that looks like a label"
        )
        raise UserError(f"{name} has {what}; its columns are {columns_of(features)}; {FLAGS}")
    return named[0]


def text_candidates(features: Features, label: str) -> list[str]:
    """Return the columns that may be texts: strings whose name is neither an identifier nor that of label words."""
    found = [column for column, kind in features.items() if isinstance(kind, Value) and kind.dtype in STRINGS]
    # `label_text` beside `label` holds the answer: reading it as a text would make the task trivial.
    return [c for c in found if c != label and c.lower() not in ID_NAMES and not c.lower().startswith("label")]


def _text_columns(train: Dataset, label: str, name: str) -> tuple[str, ...]:
    candidates = text_candidates(train.features, label)
    found = [column for column in candidates if not spell_the_label(train, column, label)]
    found = found or candidates  # short sentences with many repetitions: there is nothing else to read
    if not 1 <= len(found) <= 2:
        what = f"{len(found)} columns that may be the text ({', '.join(found)})" if found else "no column of text"
        raise UserError(
            f"{name} has {what}, where one or two are allowed; its columns are {columns_of(train.features)}; {FLAGS}"
        )
    return tuple(found)


def _class_names(train: Dataset, label: str, name: str) -> tuple[str, ...]:
    kind = train.features[label]
    if isinstance(kind, ClassLabel):
        return _published_class_names(kind, label, name)
    if not isinstance(kind, Value) and getattr(kind, "feature", None) is not None:  # a list per row
        raise UserError(
            f"{name}: the label column {label} holds a list a row (several labels at once), where one class or number "
            f"a row is allowed; make a dataset of each label, or name another column with `--label-column`"
        )
    dtype = kind.dtype if isinstance(kind, Value) else type(kind).__name__
    values = train.unique(label) if isinstance(kind, Value) else []
    present = [value for value in values if not is_missing(value, ())]
    if dtype in REAL:
        # pandas converts integers to floats if one of them is missing.
        whole = len(present) < len(values) and all(value >= 0 and float(value).is_integer() for value in present)
        few = whole and present and max(present) < min(FEW, 2 * len(present) + 10)
        return _numbered_class_names([int(value) for value in present], label, name) if few else ()
    if len(present) == 1 < len(train) and dtype in (*STRINGS, *WHOLE):
        raise UserError(
            f"{name}: every row has the label {present[0]!r} in column {label}, where at least two classes are needed; "
            f"add rows of others, or name another column with `--label-column`"
        )
    if present and dtype in STRINGS:
        return _worded_class_names(present, label, name)
    if present and dtype in WHOLE:
        return _numbered_class_names(present, label, name)
    raise UserError(
        f"{name}: the label column {label} is of type {dtype}{'' if present else ' without values of its own'}, where "
        f"classes, numbers or strings are allowed; its columns are {columns_of(train.features)}; {FLAGS}"
    )


def _published_class_names(kind: ClassLabel, label: str, name: str) -> tuple[str, ...]:
    """Return the class names published with the dataset."""
    if len(kind.names) < 2:
        raise UserError(
            f"{name}: the label column {label} knows the one class {', '.join(kind.names)}, where at least two "
            f"classes are needed; add rows of others, or name another dataset"
        )
    return tuple(kind.names)


def _numbered_class_names(present: Sequence[int], label: str, name: str) -> tuple[str, ...]:
    """Return names for integer classes; raise a UserError if the numbers are not classes."""
    count = int(max(present)) + 1
    # A head of that width would be built. A -1 beside classes is a missing label, whose row is reported later.
    if count > 2 * len(present) + 10 or count < 1 or min(present) < -1:
        raise UserError(
            f"{name}: the label column {label} has {len(present)} different numbers from {min(present)} to "
            f"{count - 1}, where classes 0, 1, 2, ... are allowed; number them anew or write them as strings, drop "
            f"rows without a label, or name another column with `--label-column`"
        )
    return tuple(str(i) for i in range(count))


def _worded_class_names(present: Sequence[str], label: str, name: str) -> tuple[str, ...]:
    """Return names for classes given as words; raise a UserError for numbers with a few that say "missing"."""
    missing = [word for word in present if word.strip().lower() in MISSING]
    if missing and len(missing) < len(present) and all(map(_is_written_number, {*present} - {*missing})):
        raise UserError(
            f"{name}: the label column {label} holds numbers and {missing[0]!r}, which would be a class of its own; "
            f"leave out these rows, or write all labels as words"
        )
    return tuple(sorted(present))


def _is_written_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def default_metrics(task: TextTask, glue: str | None) -> tuple[str, ...]:
    """Return the default metrics of a task; `glue` is its GLUE task, if any."""
    if not task.labels:
        return ("pearson", "spearman")
    # Another label column than GLUE's own may not fit GLUE's metric: F1 of one class needs two classes.
    fits = glue and glue != "stsb" and (len(task.labels) == 2 or glue == "mnli")
    return GLUE[glue][1] if glue and fits else ("accuracy", "macro_f1")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_class(value: object, classes: dict[str, int], written: bool) -> bool:
    if written:
        return value in classes
    # Integers are floats if a value is missing.
    return isinstance(value, int | float) and value % 1 == 0 and 0 <= value < len(classes)


def _labels_of(rows: Dataset, task: TextTask) -> tuple[list[Any], bool]:
    """Return the labels of a split, and True if they are written as class names."""
    kind, values = rows.features[task.label], rows[task.label][:]
    if isinstance(kind, ClassLabel) and _are_others(kind.names, task.labels):
        return [kind.names[value] if value in range(len(kind.names)) else value for value in values], True
    if isinstance(kind, Value) and kind.dtype in WHOLE and _are_names(task.labels):
        return [None if value is None else str(value) for value in values], True
    return values, isinstance(kind, Value) and kind.dtype in STRINGS


def _are_names(labels: Sequence[str]) -> bool:
    """Return True if numbers are class names: a file in which no class is a word is read as numbers."""
    return any(label.isdigit() for label in labels) and not _are_numbers(labels)


def _are_numbers(labels: Sequence[str]) -> bool:
    return [*labels] == [str(i) for i in range(len(labels))]


def _are_others(names: Sequence[str], labels: Sequence[str]) -> bool:
    """Return True if a split numbers its classes by its own names: each file of a dataset has its list."""
    return bool(labels) and [*names] != [*labels] and ({*names} <= {*labels} or not _are_numbers(labels))


def _allowed_labels(task: TextTask, written: bool) -> str:
    if not task.labels:
        return "a finite number"
    shown = ", ".join(task.labels[:10]) + (", ..." if len(task.labels) > 10 else "")
    return f"one of the training split's classes ({shown})" if written else f"0 to {len(task.labels) - 1} ({shown})"
