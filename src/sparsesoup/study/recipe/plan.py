"""A study's recipe (YAML) and its cells (model, dataset, row, sparsity, seed), all checked before anything runs."""

import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.hub.build import EPOCHS
from sparsesoup.methods import METHODS, TABLE
from sparsesoup.runs.config import Settings, from_table
from sparsesoup.runs.run import complete
from sparsesoup.study.recipe.budget import agree, read_budget
from sparsesoup.study.recipe.resolve import find_all
from sparsesoup.study.recipe.schedule_check import need_fit
from sparsesoup.study.recipe.trial import Cell, with_ticket
from sparsesoup.study.recipe.yaml_lines import (
    Levels,
    Table,
    Wrong,
    check_keys,
    place_of,
    placing,
    read_written,
    shipped,
)

LISTS = {"models": ["minilm"], "datasets": ["docstrings"], "sparsities": [0.9], "seeds": [0, 1, 2]}
KEYS = (*LISTS, "methods", "budget", "train", "steps", "epochs", "dataset_config", "text_columns", "image_column",
        "label_column", "drop_unlabelled", "max_length", "doc_stride", "prompts", "class_names", "data_root",
        "trust_remote_code")  # fmt: skip
OWN = ("name", "method", "train", "times", "steps", "epochs", "seeds", "sparsities", "from")  # settings of a row
PLACED = ("train", *OWN[4:-1], "dataset_config", "text_columns", "image_column", "label_column", "drop_unlabelled",
          "max_length", "doc_stride", "prompts", "class_names")  # of a dataset  # fmt: skip
OTHER = {"steps": "epochs", "epochs": "steps",  # two ways to say the same
         "text_columns": "image_column", "image_column": "text_columns"}  # fmt: skip
NO_DISTILL: tuple[Any, ...] = (None, {}, {"teacher": ""}, {"teacher": None})  # of a row or dataset
MOST_SEED = 2**63  # what a column of a table holds


@dataclass(frozen=True)
class Plan:
    """A study.

    Args:
        name: of its folder.
        recipe: as written, with what flags changed.
        cells: in the order in which they are drawn.
        command: what repeats it.
        place: where in the recipe a path of keys stands, in words.
    """

    name: str
    recipe: Table
    cells: list[Cell]
    command: str
    place: Callable[[Sequence[str]], str]


def read_plan(
    path: Path, changes: Mapping[str, Any] | None = None, name: str | None = None, out: Path = Path("runs"),
    fit: bool = False,
) -> Plan:  # fmt: skip
    """The study of a recipe.

    Args:
        path: of the recipe; or the name of one that is shipped: table2, table3, transfer.
        changes: keys of the recipe that are to be others. They win over what a dataset has of its own, not over what a
            row has; of datasets that are named otherwise the recipe's own settings stay.
        name: of the study; default the file's.
        out: the folder of all runs, for rows that begin with the tickets of others.
        fit: refuse rows whose methods do not fit their T, too; where a budget sets T, that is looked at there.
    Raises: UserError with file and line for whatever could not run: an unknown key, method, setting, model or dataset.
    """
    given, path = path, shipped(path)
    recipe, lines = read_written(path)
    changed = {key: value for key, value in (changes or {}).items() if value is not None}

    def place(where: Sequence[str]) -> str:
        key, *deeper = where
        said = key in changed and len(deeper) < 2  # deeper are a dataset's own settings, which no flag has
        return _flag(key) if said else f"{path}, line {lines(where)}"

    with placing(place):
        _change_(recipe, changed)
        cells = list(_cells(recipe))
        agree(recipe, _datasets(recipe))
        cells = find_all(recipe, cells)
        cells += find_all(recipe, list(_transferred(recipe, cells, out)))
        if fit and read_budget(recipe.get("budget")) is None:
            need_fit(cells)
        _need_once(cells)
    flags = [f"{_flag(key)} {_words(value)}" for key, value in changed.items()]
    command = " ".join(["sparsesoup compare --config", _words(given), *flags])
    return Plan(name or path.stem, recipe, cells, command, place)


def _change_(recipe: Table, changed: Table) -> None:
    """Put changes into a recipe as read, and take away what they replace."""
    gone = {*changed, *_displaced(changed)}
    old = recipe.get("datasets")
    for key in gone - {"datasets"}:
        recipe.pop(key, None)
    recipe |= changed
    if isinstance(old, dict):
        names = changed.get("datasets", list(old))
        own = {name: old.get(_published(name, old)) or {} for name in names}
        kept = {n: {k: v for k, v in t.items() if k not in gone} if isinstance(t, dict) else t for n, t in own.items()}
        for name in kept.keys() - old.keys():
            kept[name].pop("dataset_config", None)  # configurations are of the place where a dataset was published
        recipe["datasets"] = kept


def _published(name: str, datasets: Mapping[str, Any]) -> str:
    """The dataset of a recipe that a name stands for: itself, or one of which it is a copy: its last part begins so.

    >>> _published("my/glue/mnli_dev_split", {"glue/mnli": None, "glue/wnli": None})
    'glue/mnli'
    >>> _published("stanford_dogs", {"tanganke/stanford_cars": None})
    'stanford_dogs'
    """
    leaves = {known: Path(known).name.lower() for known in datasets}
    alike = [known for known, leaf in leaves.items() if _begins(Path(name).name.lower(), leaf)]
    longest = max((len(leaves[known]) for known in alike), default=0)
    nearest = [known for known in alike if len(leaves[known]) == longest]
    return name if name in datasets or len(nearest) != 1 else nearest[0]


def _begins(leaf: str, other: str) -> bool:
    """Whether a name begins with another, whole words of it."""
    return leaf.startswith(other) and leaf[len(other) : len(other) + 1] in ("", "_", ".", "-")


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _words(value: Any) -> str:
    return shlex.join(map(str, value if isinstance(value, list) else [value]))


def _cells(recipe: Table) -> Iterator[Cell]:
    """All seeds of a row before the next row, so that rows get whole one after the other."""
    check_keys(recipe, KEYS)
    rows = recipe.get("methods")
    if not rows or not isinstance(rows, (dict, list)):
        raise Wrong("a study needs methods: a list of names, or a table of rows with settings", "methods")
    rows = rows if isinstance(rows, dict) else {str(row): None for row in _list(recipe, "methods")}
    for row, own in rows.items():
        if own is not None and not isinstance(own, dict):
            raise Wrong(f"row {row} has settings of its own (name, method, train, ...), got {own!r}", "methods", row)
    datasets = _datasets(recipe)
    for (dataset, placed), model, (row, own) in product(datasets.items(), _list(recipe, "models"), rows.items()):
        if "from" not in (own or {}):
            yield from _row(recipe, str(model), dataset, placed, str(row), dict(own or {}))


def _transferred(recipe: Table, drawn: list[Cell], out: Path) -> Iterator[Cell]:
    """Cells that train the tickets of others: `from: ROW` of that row on every dataset, or of one dataset alone."""
    rows, datasets = recipe["methods"], _datasets(recipe)
    found = {(cell.row, cell.place, cell.seed): cell for cell in drawn}
    given = {row: own for row, own in rows.items() if "from" in (own or {})} if isinstance(rows, dict) else {}
    for row, own in given.items():
        source, origins = _origin(row, own, datasets)
        plain = {key: value for key, value in own.items() if key != "from"} | {"name": "ticket"}
        for origin, (dataset, placed), model in product(origins, datasets.items(), _list(recipe, "models")):
            label = row if isinstance(own["from"], dict) and "dataset" in own["from"] else f"{row} {origin}"
            for cell in _row(recipe, str(model), dataset, placed, label, plain):
                first = found.get((source, (cell.place[0], origin, cell.sparsity), cell.seed))
                if first is None or TABLE[first.settings.name].grouped:
                    why = "which this study does not draw" if first is None else "whose masks are in groups"
                    ticket = f"{source} on {origin} at sparsity {cell.sparsity:g}, seed {cell.seed}"
                    raise Wrong(f"row {row} begins with the ticket of {ticket}, {why}; name another row", "methods",
                                 row, "from")  # fmt: skip
                yield replace(cell, settings=with_ticket(cell.settings, out / first.path), needs=first.path)


def _origin(row: str, own: Table, datasets: Mapping[str, Table]) -> tuple[str, list[str]]:
    """(the row whose tickets a row begins with, the datasets on which they are drawn)."""
    if strange := [key for key in ("name", "method") if key in own]:
        raise Wrong(f"row {row} begins with tickets, so its method is ticket; leave out {strange[0]}", "methods", row,
                     strange[0])  # fmt: skip
    given = own["from"] if isinstance(own["from"], dict) else {"row": own["from"]}
    check_keys(given, ("row", "dataset"), "methods", row, "from")
    if given.get("row") is None or isinstance(given["row"], (dict, list)):
        raise Wrong(f"row {row}: from is the name of a row, or {{row: NAME, dataset: NAME}}, got {own['from']!r}",
                     "methods", row, "from")  # fmt: skip
    origin = None if given.get("dataset") is None else str(given["dataset"])
    if origin is not None and origin not in datasets:
        raise Wrong(f"row {row} begins with tickets of {origin}; allowed: {', '.join(datasets)}", "methods", row,
                     "from", "dataset")  # fmt: skip
    return str(given.get("row")), [origin] if origin is not None else [*datasets]


def _datasets(recipe: Table) -> dict[str, Table]:
    found = recipe.get("datasets", LISTS["datasets"])
    if not found or not isinstance(found, dict):
        return {str(name): {} for name in _list({"datasets": [] if found == {} else found}, "datasets")}
    for name, placed in found.items():
        if placed is not None and not isinstance(placed, dict):
            raise Wrong(
                f"dataset {name} has settings of its own (sparsities, steps, ...), got {placed!r}", "datasets", name
            )
        check_keys(placed or {}, PLACED, "datasets", name)
    return {str(name): dict(placed or {}) for name, placed in found.items()}


def _row(recipe: Table, model: str, dataset: str, placed: Table, row: str, own: Table) -> Iterator[Cell]:
    check_keys(own, OWN, "methods", row)
    name = str(row if own.get("name") is None else own["name"])
    merged = _instead(_instead(recipe, placed), {k: v for k, v in own.items() if k in PLACED})
    dense = name in METHODS and TABLE[name].dense
    table = {key: merged[key] for key in KEYS if key in merged and key not in (*LISTS, "methods", "budget")}
    levels: Levels = [((), recipe), (("datasets", dataset), placed), (("methods", row), own)]
    table |= {"model": model, "dataset": dataset, "method": own.get("method"), "train": _trained(levels)}
    if own.get("times") is not None:
        _lengthen_(table, row, own["times"])
    for sparsity in [None] if dense else _list(merged, "sparsities", levels):
        settings = _settings(row, name, table | {"sparsity": sparsity}, levels)
        for seed in _list(merged, "seeds", levels):
            if not isinstance(seed, int) or isinstance(seed, bool) or not -MOST_SEED <= seed < MOST_SEED:
                raise Wrong(f"a seed is a whole number of at most 64 bits, got {seed!r}", *place_of(levels, ["seeds"]))
            asked = None if dense else settings.amount.sparsity
            yield Cell(row, asked, replace(settings, place=replace(settings.place, seed=seed)), Path())


def _instead(table: Table, own: Table) -> Table:
    """A table with another over it, without what this says in another way; a table that says both ways keeps both."""
    return {key: value for key, value in table.items() if key not in _displaced(own)} | own


def _displaced(own: Table) -> set[str]:
    """Settings that a table says in another way; one without a value says nothing."""
    return {OTHER[key] for key, value in own.items() if key in OTHER and value is not None}


def _trained(levels: Levels) -> Table:
    """The settings of the training: a row's win over a dataset's, these over the recipe's."""
    train: Table = {}
    for where, level in levels:
        own = level.get("train")
        if own is not None and not isinstance(own, dict):
            raise Wrong(f"train has settings of its own (learning_rate, batch_size, ...), got {own!r}", *where, "train")
        train = _over(train, own or {})
    return train


def _over(table: Table, own: Table) -> Table:
    """A table of settings with another over it, at every depth; no distillation takes all of it away.

    >>> _over({"clip": 1, "distill": {"teacher": "dense", "hidden": 1}}, {"distill": {"hidden": 2}})
    {'clip': 1, 'distill': {'teacher': 'dense', 'hidden': 2}}
    >>> _over({"clip": 1, "distill": {"teacher": "dense", "hidden": 1}}, {"distill": None})
    {'clip': 1}
    """
    found = {**table, **own}
    for key in own.keys() & table.keys():
        if isinstance(table[key], dict) and own[key] in NO_DISTILL:
            del found[key]
        elif isinstance(table[key], dict) and isinstance(own[key], dict):
            found[key] = _over(table[key], own[key])
    return found


def _lengthen_(table: Table, row: str, times: Any) -> None:
    """Let a row last so many times T."""
    length = "steps" if table.get("steps") is not None else "epochs"
    given = EPOCHS if table.get(length) is None else table[length]
    for number in (times, given):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise Wrong(f"row {row} lasts {times!r} times {length} {given!r}, which are to be numbers", "methods", row,
                         "times")  # fmt: skip
    table[length] = round(times * given) if length == "steps" else times * given


def _settings(row: str, name: str, table: Table, levels: Levels) -> Settings:
    try:
        return complete(from_table(name, {key: value for key, value in table.items() if value is not None}))
    except (UserError, TypeError) as error:
        said = re.match(r"(?:unknown )?setting (?:--)?([\w.-]+)|(train\.\w+)|(sparsity)", str(error))
        named = (said[1] or said[2] or "sparsities").replace("-", "_").split(".") if said else []
        raise Wrong(error, *(place_of(levels, named) or ["methods", row, *named])) from error


def _list(table: Table, key: str, levels: Levels = ()) -> list[Any]:
    found = table.get(key, LISTS.get(key))
    listed = found if isinstance(found, list) else [found]
    empty = None in listed and key != "sparsities"  # where nothing means what the method or its ticket has
    if not listed or empty or len(set(map(str, listed))) < len(listed):
        hint = f"; name some, or leave {key} out" if empty and key in LISTS else ""
        raise Wrong(f"{key} needs one or several different values, got {found}{hint}",
                     *(place_of(levels, [key]) or [key]))  # fmt: skip
    return listed


def _need_once(cells: list[Cell]) -> None:
    """Refuse two cells for one place of the table: 0.5 and "0.50", or a row called as one that begins with tickets."""
    seen = set()
    for cell in cells:
        if (place := (cell.row, cell.place, cell.seed)) in seen:
            raise Wrong(f"{cell.name} is there twice; leave one out, or call its row otherwise", "methods", cell.row)
        seen.add(place)
