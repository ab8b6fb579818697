"""Overview of a run's data with possible mistakes, as lines for the terminal and the report."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from datasets import Dataset, Features, Image

from sparsesoup.core.errors import UserError, list_names
from sparsesoup.hub.build import OpenedTask
from sparsesoup.hub.tasks.columns import spell_the_label, text_candidates
from sparsesoup.hub.tasks.labels import FEW, TextTask, is_missing, label_values, odd_label, visible_text
from sparsesoup.hub.tasks.registry import AnyTask, describe_task, task_type_of
from sparsesoup.hub.tasks.splits import (
    LoadedDataset,
    image_bytes,
    open_test,
    test_splits,
    training_splits,
    unlabelled_rows,
)

MOST = 1_000_000  # rows of a split to compare with those of another
Hashes = tuple[bytes, bytes]  # of a row's texts as they are, and without differences of capitals and spaces


@dataclass(frozen=True)
class DataOverview:
    """The data of a run."""

    read: tuple[str, ...]  # splits with their rows and files; columns and classes
    notes: tuple[str, ...]  # possible mistakes of the user

    def lines(self) -> list[str]:
        """Return all lines, as the terminal shows them before the first step."""
        return [f"data: {line}" for line in self.read] + [f"note: {line}" for line in self.notes]


def data_overview(opened: OpenedTask, seed: int) -> DataOverview:
    """Return the overview of a run's data; test rows are checked and counted, and compared with training rows by hash.

    Raises: UserError if the training rows cannot be read; an unreadable test split is a note.
    """
    source, task = opened.source, opened.task
    train, validation = training_splits(source, task, seed)
    notes = [*source.notes, *_dropped_notes(opened), *_revealing_columns(opened), *_label_notes(opened)]
    notes += _blank_notes(source.train_name, source.train_split, task)
    parts, known = {"validation": validation}, [*_row_hashes(train, task.texts)]
    notes += _overlap_notes(opened, known, parts)
    try:
        tests = open_test(source, task)
        notes += _overlap_notes(opened, [*known, *_row_hashes(validation, task.texts)], tests)
        for name in dict.fromkeys(test_splits(source, task).values()):
            notes += _blank_notes(name, source.splits[name], task) if name != source.train_name else ()
        parts |= tests
    except UserError as error:
        notes.append(f"the test rows cannot be scored as they are: {error}")
    others = [name for name in source.train_split.column_names if name not in (*task.texts, task.label)]
    columns = describe_task(task) + (f"; not read: {list_names(others)}" if others else "")
    return DataOverview((_describe_splits(opened, train, parts), columns), tuple(notes))


def _describe_splits(opened: OpenedTask, train: Dataset, parts: dict[str, Dataset]) -> str:
    source, names = opened.source, test_splits(opened.source, opened.task)
    rows = [f"{len(train):,} training and {len(parts['validation']):,} validation rows from split "
            f"{_describe_split(source, source.train_name)}"]  # fmt: skip
    rows += [f"{len(parts[key]):,} {key} rows from split {_describe_split(source, name)}" for key, name in names.items()
             if key in parts]  # fmt: skip
    unread = [name for name in source.splits if name not in (source.train_name, *names.values())]
    return f"{source.name}: {'; '.join(rows)}" + (f"; not read: split {', '.join(unread)}" if unread else "")


def _describe_split(source: LoadedDataset, name: str) -> str:
    files = source.files.get(name, ())
    return f"{name} ({list_names(files, 2)})" if files else name


def _dropped_notes(opened: OpenedTask) -> Iterator[str]:
    source, task = opened.source, opened.task
    names = dict.fromkeys((source.train_name, *test_splits(source, task).values())) if source.drop_unlabelled else ()
    for rows, name in ((source.splits[name], name) for name in names):
        if task.label in rows.column_names and (gone := len(unlabelled_rows(rows, task))):
            yield f"{gone:,} of {len(rows):,} rows of split {name} are dropped: they have no label"


def _blank_notes(name: str, rows: Dataset, task: AnyTask) -> Iterator[str]:
    """Count the texts of a split that show nothing."""
    for column in task.texts:
        if not task_type_of(task).images and (
            blank := sum(isinstance(text, str) and not visible_text(text) for text in rows[column][:])
        ):
            yield (
                f"{blank:,} of {len(rows):,} rows of split {name} are blank in column {column}: drop them if that is "
                f"not intended"
            )


def _revealing_columns(opened: OpenedTask) -> Iterator[str]:
    """Note columns that reveal the label: those that are read, and those excluded for that reason."""
    task, train = opened.task, opened.source.train_split
    if type(task) is not TextTask:
        return
    for column in dict.fromkeys([*task.texts, *text_candidates(train.features, task.label)]):
        if spell_the_label(train, column, task.label):
            does = f"column {column} gives column {task.label} away: each of its few values goes with one label"
            yield f"{does}, so the scores mean nothing" if column in task.texts else f"{does}, so it is not read"


def _label_notes(opened: OpenedTask) -> Iterator[str]:
    """Note numbers that may be classes, classes that may be numbers or one class, and classes without a row."""
    task, train = opened.task, opened.source.train_split
    if not isinstance(task, TextTask):
        return
    values = [value for value in train.unique(task.label) if not is_missing(value, task.labels)]
    if not task.labels:
        if len(values) <= FEW and all(float(value).is_integer() for value in values):
            yield (
                f"column {task.label} holds whole numbers with a point ({list_names(sorted(values))}), "
                f"so the task is a regression; for classes write 0, 1, 2, ... or words"
            )
        return
    kind = Features({task.label: train.features[task.label]})
    present = {*label_values(Dataset.from_dict({task.label: values}, features=kind), task, "the data")}
    if empty := [name for i, name in enumerate(task.labels) if i not in present]:
        yield (
            f"{len(empty)} of {len(task.labels)} classes without a training row: {list_names(empty)}; if that is not "
            f"intended, number the classes 0, 1, 2, ... without a gap, or write them as words"
        )
    if odd := odd_label(train, task.label):
        yield f"{odd[1]}: a class of its own; correct or drop such rows if that is not intended"
    if len(values) > FEW and 2 * len(values) > len(train):
        yield (
            f"column {task.label} has {len(values):,} different labels in {len(train):,} rows, each a class; if they "
            f"are numbers, write all with a point (0.5)"
        )
    plain = [visible_text(name).casefold() for name in task.labels]
    for low, count in Counter(plain).items():
        if count > 1:
            same = " and ".join(repr(name) for name, other in zip(task.labels, plain, strict=True) if other == low)
            yield f"classes {same} differ only in capital letters or spaces; write them alike if they are one"


def _overlap_notes(opened: OpenedTask, known: list[Hashes], parts: dict[str, Dataset]) -> list[str]:
    """Count the rows of each part that are also training rows, ignoring capitals and spaces."""
    what, found = "image" if task_type_of(opened.task).images else "text", []
    exact, plain = {one for one, _ in known}, {other for _, other in known}
    for name, rows in parts.items():
        again = [one in exact for one, other in _row_hashes(rows, opened.task.texts) if other in plain]
        if again:
            near = f"; {again.count(False):,} with other capitals or spaces" if not all(again) else ""
            found.append(
                f"{len(again):,} of {len(rows):,} {name} rows are also training rows (the same {what}{near}), so "
                f"{name} scores are too high"
            )
    return found


def _row_hashes(rows: Dataset, columns: tuple[str, ...]) -> Iterator[Hashes]:
    """Yield hashes of each row's texts or image, for the first rows of a large split."""
    chosen = rows.select_columns(list(columns))
    for column in columns:
        if isinstance(chosen.features[column], Image):
            chosen = chosen.cast_column(column, Image(decode=False))
    for batch in chosen.select(range(min(MOST, len(chosen)))).with_format("arrow").iter(batch_size=1000):
        for row in batch.to_pylist():
            plain = [visible_text(value).casefold() if isinstance(value, str) else value for value in row.values()]
            one = _hash_of(row.values())
            yield one, one if plain == [*row.values()] else _hash_of(plain)


def _hash_of(values: Iterable[object]) -> bytes:
    digest = blake2b(digest_size=12)
    for value in map(image_bytes, values):
        if isinstance(value, dict):  # an image that is not stored in a file
            value = value.get("bytes")
        data = value if isinstance(value, bytes) else str(value).encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8) + data)
    return digest.digest()
