"""A study's recipe (YAML) and its cells (model, dataset, row, sparsity, seed), all checked before anything runs."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from sparsesoup.errors import UserError
from sparsesoup.hub.build import open_task
from sparsesoup.hub.models import locate
from sparsesoup.methods import METHODS, TABLE
from sparsesoup.recipe import Settings, from_table
from sparsesoup.run import complete, directory

LISTS = {"models": ["minilm"], "datasets": ["docstrings"], "sparsities": [0.9], "seeds": [0, 1, 2]}
KEYS = (*LISTS, "methods", "train", "steps", "epochs", "dataset_config", "text_columns", "image_column", "label_column",
        "max_length", "doc_stride", "prompts", "class_names", "data_root", "trust_remote_code")  # fmt: skip
OWN = ("name", "method", "train", "times", "steps", "epochs", "seeds", "sparsities")  # settings of a row
PLACED = (*OWN[2:], "dataset_config", "text_columns", "image_column", "label_column", "max_length", "doc_stride",
          "prompts", "class_names")  # fmt: skip
ASKED = ("model", "dataset", "dataset_config", "text_columns", "label_column", "prompts", "class_names")
Table = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Args:
        row: its name in the table; the method's own, unless the recipe gives another.
        sparsity: what the row is pruned to; None for methods that keep every weight.
        settings: of the run.
        path: of the run, below the folder of all runs.
    """

    row: str
    sparsity: float | None
    settings: Settings
    path: Path

    @property
    def place(self) -> tuple[str, str, float | None]:
        """(model, dataset, sparsity): the column of the table."""
        return self.settings.place.model, self.settings.place.dataset, self.sparsity

    @property
    def name(self) -> str:
        """The cell in words."""
        model, dataset, sparsity = self.place
        how = "" if sparsity is None else f", sparsity {sparsity:g}"
        return f"{self.row} on {dataset}{how}, seed {self.settings.place.seed} ({model})"

    @property
    def key(self) -> str:
        """Twelve hex digits of row, column and settings: a cell of another study with the same key is the same."""
        settings = {k: v for k, v in self.settings.to_dict().items() if k != "data_root"}
        text = json.dumps([self.row, self.sparsity, settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Plan:
    """A study: its name, its recipe as written, its cells in the order in which they are drawn, and what repeats it."""

    name: str
    recipe: Table
    cells: list[Cell]
    command: str = ""


def read_plan(path: Path, changes: Mapping[str, Any] | None = None, name: str | None = None) -> Plan:
    """The study of a recipe.

    Args:
        path: of the recipe.
        changes: keys of the recipe that are to be others.
        name: of the study; default the file's.
    Raises: UserError with file and line for whatever could not run: an unknown key, method, setting, model or dataset.
    """
    recipe, lines = _read(path)
    changed = {key: value for key, value in (changes or {}).items() if value is not None}
    recipe |= changed
    try:
        cells = list(_cells(recipe))
        _check(cells)
    except _Wrong as wrong:
        raise UserError(f"{path}, line {lines(wrong.where)}: {wrong.error}") from wrong.error
    flags = [f"--{key.replace('_', '-')} {_words(value)}" for key, value in changed.items()]
    return Plan(name or path.stem, recipe, cells, " ".join(["sparsesoup compare --config", str(path), *flags]))


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


class _Wrong(Exception):
    """An error and the place in the recipe that it comes from."""

    def __init__(self, error: Exception | str, *where: str) -> None:
        super().__init__(str(error))
        self.error, self.where = error if isinstance(error, Exception) else UserError(error), where


def _read(path: Path) -> tuple[Table, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        recipe, tree = yaml.safe_load(text), yaml.compose(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read recipe {path}: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"recipe {path} must be a table with methods, datasets, ...; see `sparsesoup compare --help`")
    return recipe, lambda where: _line(tree, where)


def _line(tree: Any, where: Sequence[str]) -> int:
    """The line of the last key of a path that is there."""
    line = 1
    for key in where:
        pairs = tree.value if isinstance(tree, yaml.MappingNode) else []
        found = [(name, value) for name, value in pairs if name.value == str(key)]
        if not found:
            break
        line, tree = found[0][0].start_mark.line + 1, found[0][1]
    return line


def _cells(recipe: Table) -> Iterator[Cell]:
    """All seeds of a row before the next row, so that rows get whole one after the other."""
    _known(recipe, KEYS)
    rows = recipe.get("methods")
    if not rows or not isinstance(rows, (dict, list)):
        raise _Wrong("a study needs methods: a list of names, or a table of rows with settings", "methods")
    rows = rows if isinstance(rows, dict) else {str(row): None for row in rows}
    datasets = _datasets(recipe)
    for (dataset, placed), model, (row, own) in product(datasets.items(), _list(recipe, "models"), rows.items()):
        yield from _row(recipe, str(model), dataset, placed, str(row), dict(own or {}))


def _datasets(recipe: Table) -> dict[str, Table]:
    found = recipe.get("datasets", LISTS["datasets"])
    if not isinstance(found, dict):
        return {str(name): {} for name in _list(recipe, "datasets")}
    for name, placed in found.items():
        _known(dict(placed or {}), PLACED, "datasets", name)
    return {str(name): dict(placed or {}) for name, placed in found.items()}


def _row(recipe: Table, model: str, dataset: str, placed: Table, row: str, own: Table) -> Iterator[Cell]:
    _known(own, OWN, "methods", row)
    name = str(own.get("name", row))
    merged = recipe | placed | {k: v for k, v in own.items() if k in PLACED}
    dense = name in METHODS and TABLE[name].dense
    table = {key: merged[key] for key in KEYS if key in merged and key not in LISTS and key != "methods"}
    table |= {"model": model, "dataset": dataset, "method": own.get("method")}
    table["train"] = {**(recipe.get("train") or {}), **(placed.get("train") or {}), **(own.get("train") or {})}
    for length in ("steps", "epochs"):
        if table.get(length) is not None and own.get("times") is not None:
            table[length] *= own["times"]
    for sparsity in [None] if dense else _list(merged, "sparsities"):
        settings = _settings(row, name, table | {"sparsity": sparsity})
        for seed in _list(merged, "seeds"):
            if not isinstance(seed, int):
                raise _Wrong(f"a seed is a whole number, got {seed!r}", "seeds")
            yield Cell(row, sparsity, replace(settings, place=replace(settings.place, seed=seed)), Path())


def _settings(row: str, name: str, table: Table) -> Settings:
    if isinstance(table.get("steps"), float):
        table["steps"] = round(table["steps"])
    try:
        return complete(from_table(name, {key: value for key, value in table.items() if value is not None}))
    except (UserError, TypeError) as error:
        said = re.match(r"(?:unknown )?setting (?:--)?([\w.-]+)|(train\.\w+)|(sparsity)", str(error))
        named = (said[1] or said[2] or "sparsities").replace("-", "_").split(".") if said else []
        where = named if named and named[0] != "method" else ["methods", row, *named]
        raise _Wrong(error, *where) from error


def _list(table: Table, key: str) -> list[Any]:
    found = table.get(key, LISTS[key])
    listed = found if isinstance(found, list) else [found]
    if not listed or len(set(map(str, listed))) < len(listed):
        raise _Wrong(f"{key} needs one or several different values, got {found}", key)
    return listed


def _known(table: Table, keys: Sequence[str], *where: str) -> None:
    for key in table:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(keys)}"
            raise _Wrong(f"unknown setting {key!r}; {hint}", *where, str(key))


def _check(cells: list[Cell]) -> None:
    """Find every model and dataset, and give each cell the path of its run."""
    if not cells:
        raise _Wrong("the study has no cell", "methods")
    names: dict[str, str] = {}
    for i, cell in enumerate(cells):
        place = cell.settings.place
        known = json.dumps([getattr(place, key) for key in ASKED])
        try:
            locate(place.model)
        except UserError as error:
            raise _Wrong(error, "models") from error
        try:
            names[known] = names.get(known) or open_task(place).source.name
        except UserError as error:
            raise _Wrong(error, "datasets", place.dataset) from error
        cells[i] = replace(cell, path=directory(names[known], cell.settings))
