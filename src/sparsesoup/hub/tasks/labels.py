"""A text task and its labels: which classes there are, and what the labels of rows mean."""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value

from sparsesoup.core.errors import UserError, list_names

FLAGS = "name them by text_columns and label_column"
OTHER = "or name another column"
DROP = "drop rows without a label by --drop-unlabelled"
STRINGS = ("string", "large_string", "string_view")
WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
REAL = ("float16", "float32", "float64", "double", "float")
MISSING = ("na", "n/a", "nan", "null", "?")  # spellings of a missing number in tables
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
FEW = 20  # a label with more distinct numbers is unlikely to be a class, and a column with more values is a text
RARE = 0.1  # largest share of rows whose label is no number in a column of numbers
# Controls that are no spaces, and Default_Ignorable_Code_Point of Unicode's DerivedCoreProperties.txt up to U+FFFF.
INVISIBLE = re.compile(
    "[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\ufe00-\ufe0f\ufeff]"
)


@dataclass(frozen=True)
class TextTask:
    """A text-classification or regression task."""

    texts: tuple[str, ...]  # the one or two text columns
    label: str  # the label column
    labels: tuple[str, ...]  # class names, in the order of the model's outputs; empty means regression
    metrics: tuple[str, ...]  # metrics to report; the first one is used for selection


def describe_text_task(task: TextTask) -> str:
    """Describe a text task.

    >>> describe_text_task(TextTask(("text",), "label", ("bad", "good"), ("accuracy",)))
    '2 classes (bad, good) in column label from column text'
    """
    what = f"{len(task.labels)} classes ({list_names(task.labels)})" if task.labels else "numbers (regression)"
    return f"{what} in column {task.label} from column{'s'[: len(task.texts) - 1]} {' and '.join(task.texts)}"


def columns_of(features: Features) -> str:
    """Describe the columns of a table: names and types."""
    return ", ".join(f"{name} ({getattr(kind, 'dtype', type(kind).__name__)})" for name, kind in features.items())


def visible_text(text: str) -> str:
    r"""Return what a reader sees of a text: its signs in one encoding, without invisible ones, single spaces.

    >>> visible_text(" cafe\u0301\u200b  au lait") == "caf\u00e9 au lait"
    True
    """
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(INVISIBLE.sub("", plain).split())


def odd_label(train: Dataset, label: str) -> tuple[str, str] | None:
    """Return (the first label that is no number, its row in words) of a column of strings with few such rows.

    None for another column. Words for a missing number count, however many rows have them.
    """
    kind, values = train.features[label], train[label][:]
    if not isinstance(kind, Value) or kind.dtype not in STRINGS:
        return None
    written = {value: _is_written_number(value) for value in {*values} if not is_missing(value, ())}
    rows = [i for i, value in enumerate(values) if value in written]
    odd = [i for i in rows if not written[values[i]]]
    if not 0 < len(odd) < len(rows):
        return None
    if len(odd) > RARE * len(rows) and not all(values[i].strip().lower() in MISSING for i in odd):
        return None
    numbers = len(rows) - len(odd)
    return (
        values[odd[0]],
        f"row {odd[0]} has {values[odd[0]]!r} in column {label}, where {numbers} of {len(rows)} rows have a number",
    )


def class_names(train: Dataset, label: str, name: str) -> tuple[str, ...]:
    """Return the names of the classes in a label column; none for numbers."""
    kind = train.features[label]
    if isinstance(kind, ClassLabel):
        if len(kind.names) < 2:
            raise UserError(
                f"{name}: the label column {label} knows the one class {', '.join(kind.names)}, where at least two "
                f"classes are needed; add rows of others, or name another dataset"
            )
        return tuple(kind.names)
    if not isinstance(kind, Value) and getattr(kind, "feature", None) is not None:  # a list per row
        raise UserError(
            f"{name}: the label column {label} holds a list a row (several labels at once), where one class or number "
            f"a row is allowed; make a dataset of each label, {OTHER}",
            "label_column",
        )
    dtype = kind.dtype if isinstance(kind, Value) else type(kind).__name__
    values = train.unique(label) if isinstance(kind, Value) else []
    present = [value for value in values if not is_missing(value, ())]
    if dtype in REAL:
        # pandas converts integers to floats if one of them is missing.
        whole = len(present) < len(values) and all(value >= 0 and float(value).is_integer() for value in present)
        few = whole and present and max(present) < min(FEW, 2 * len(present) + 10)
        return _numbered_class_names([int(value) for value in present], label, name) if few else ()
    if not present or dtype not in (*STRINGS, *WHOLE):
        raise UserError(
            f"{name}: the label column {label} is of type {dtype}{'' if present else ' without values of its own'}, "
            f"where classes, numbers or strings are allowed; its columns are {columns_of(train.features)}; {FLAGS}"
        )
    if len(present) == 1 < len(train):
        raise UserError(
            f"{name}: every row has the label {present[0]!r} in column {label}, where at least two classes are needed; "
            f"add rows of others, {OTHER}",
            "label_column",
        )
    if dtype in WHOLE:
        return _numbered_class_names(present, label, name)
    if odd := odd_label(train, label):
        numbers = [float(value) for value in present if _is_written_number(value)]
        if odd[0].strip().lower() in MISSING or len(numbers) > FEW or not all(map(float.is_integer, numbers)):
            raise UserError(f"{name}: {odd[1]}; correct or drop such rows, or, if all are classes, write them as words")
    if all(DECIMAL_COMMA.fullmatch(value.strip()) for value in present):
        raise UserError(
            f"{name}: the label column {label} has numbers with a comma, such as {present[0]!r}, where a point is "
            f"allowed; write them with a point, or, if all are classes, as words",
            "label_column",
        )
    return tuple(sorted(present))


def _numbered_class_names(present: Sequence[int], label: str, name: str) -> tuple[str, ...]:
    """Return names for integer classes; raise a UserError if the numbers are not classes."""
    count = int(max(present)) + 1
    # A head of that width would be built. A -1 beside classes is a missing label, whose row is reported later.
    if count > 2 * len(present) + 10 or count < 1 or min(present) < -1:
        raise UserError(
            f"{name}: the label column {label} has {len(present)} different numbers from {min(present)} to "
            f"{count - 1}, where classes 0, 1, 2, ... are allowed; number them anew or write them as strings, drop "
            f"rows without a label, {OTHER}",
            "label_column",
        )
    return tuple(str(i) for i in range(count))


def label_values(rows: Dataset, task: TextTask, split: str) -> list[int] | list[float]:
    """Return the labels of a split for the model: class indices, or numbers for regression."""
    values, written = _labels_of(rows, task)
    classes = {name: i for i, name in enumerate(task.labels)}
    for i, value in enumerate(values):
        if not (value in classes if written else _is_valid(value, len(classes))):
            shown = list_names(task.labels, 10)
            of_names = f"one of the training split's classes ({shown})"
            allowed = of_names if written else f"0 to {len(classes) - 1} ({shown})" if classes else "a finite number"
            remedy = f"complete it, or {DROP}" if is_missing(value, task.labels) else "correct or drop such rows"
            if classes and value == -1:
                remedy = f"-1 means no label; if it is a class, number the classes 0, 1, 2, ...; else {remedy}"
            raise UserError(
                f"{split}: row {i} has the label {value!r} in column {task.label}, where {allowed} is allowed; "
                f"{remedy}, {OTHER}",
                "label_column",
            )
    if not classes:
        return [float(value) for value in values]
    return [classes[value] if written else int(value) for value in values]


def has_labels(rows: Dataset, task: Any) -> bool:
    """Return True if any row has a label: competitions publish test rows with labels that are all -1 or missing."""
    values = rows[task.label][:] if task.label in rows.column_names else []
    return any(value != -1 and not is_missing(value, getattr(task, "labels", ())) for value in values)


def is_missing(value: object, labels: Sequence[str]) -> bool:
    """Return True for a missing label: nothing, NaN, an empty text, or among classes the -1 of the Hub.

    >>> [is_missing(value, ("no", "yes")) for value in (None, float("nan"), " ", -1, 0, "no")]
    [True, True, True, True, False, False]
    """
    empty = value is None or value != value or (isinstance(value, str) and not value.strip())
    return empty or bool(labels and value == -1)


def _is_written_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _is_valid(value: object, classes: int) -> bool:
    """Return True for an index of a class, or for a finite number if there are no classes."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return not classes or (value % 1 == 0 and 0 <= value < classes)  # integers are floats if a value is missing


def _labels_of(rows: Dataset, task: TextTask) -> tuple[list[Any], bool]:
    """Return the labels of a split, and True if they are written as class names."""
    kind, values, labels = rows.features[task.label], rows[task.label][:], [*task.labels]
    dtype, counted = getattr(kind, "dtype", ""), [str(i) for i in range(len(labels))]
    if not labels and dtype in STRINGS:  # one value that is no number makes a column of strings
        return [float(v) if v is not None and _is_written_number(v) else v for v in values], False
    # Each file of a dataset may number its classes by its own list of names.
    if isinstance(kind, ClassLabel):
        own = labels and [*kind.names] != labels and ({*kind.names} <= {*labels} or labels != counted)
        return ([kind.names[v] if v in range(len(kind.names)) else v for v in values], True) if own else (values, False)
    # Numbers are names of classes in a file in which no class is a word.
    if dtype in WHOLE and labels != counted and any(label.isdigit() for label in labels):
        return [None if value is None else str(value) for value in values], True
    return values, dtype in STRINGS
