"""YAML recipes with the line number of each key."""

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sparsesoup.core.errors import UserError
from sparsesoup.runs.config_yaml import compose_yaml, construct_yaml, text_of, walk_nodes

SHIPPED = Path(__file__).parents[1] / "recipes"
NAMED = ("methods", "datasets", "models", "from", "row", "dataset")  # keys with names, which are read as text
NULL, MERGE, TEXT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "merge", "str"))
Table = dict[str, Any]
Levels = Sequence[tuple[tuple[str, ...], Any]]  # where settings of a row are in the recipe; later ones override


class RecipeError(Exception):
    """An error and its place in the recipe."""

    def __init__(self, error: Exception | str, *where: str) -> None:
        super().__init__(str(error))
        self.error, self.where = error if isinstance(error, Exception) else UserError(error), where


@contextlib.contextmanager
def add_location(place: Callable[[Sequence[str]], str]) -> Iterator[None]:
    """Turn a RecipeError into a UserError that starts with its place: a line of the recipe, or a flag."""
    try:
        yield
    except RecipeError as wrong:
        raise UserError(f"{place(wrong.where)}: {wrong.error}") from wrong.error


@contextlib.contextmanager
def at_location(*where: str) -> Iterator[None]:
    """Turn a UserError in the block into a RecipeError with its place."""
    try:
        yield
    except UserError as error:
        raise RecipeError(error, *where) from error


def builtin_recipe(path: Path) -> Path:
    """Return the recipe, or the shipped one of that name."""
    own = SHIPPED / f"{path.name}.yaml"
    return own if not path.exists() and path.parent == Path() and own.is_file() else path


def read_written(path: Path) -> tuple[Table, Callable[[Sequence[str]], int]]:
    """Return (the recipe, the line of a path of keys). Names of rows and datasets are kept as text: 7 is "7", no "no".

    Raises: UserError if it cannot be read or is not a table.
    """
    try:
        text = text_of(path)
        recipe, tree = _with_names_as_written(compose_yaml(text)), compose_yaml(text)
    except (OSError, yaml.YAMLError) as error:
        names = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.yaml")))
        hint = f"; shipped ones are {names}" if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot read recipe {path}: {' '.join(str(error).split())}{hint}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"recipe {path} must be a table with methods, datasets, ...; see `sparsesoup compare --help`")
    return recipe, lambda where: _line_of(tree, where)


def _with_names_as_written(tree: yaml.Node | None) -> Any:
    """Return the recipe with names as they are written; modifies the tree."""
    for node in walk_nodes(tree):
        if isinstance(node, yaml.MappingNode):
            node.value = [(key, _as_words(value) if _is_name(key, value) else value) for key, value in node.value]
    return construct_yaml(tree)


def _is_name(key: yaml.Node, value: yaml.Node) -> bool:
    return key.value in NAMED and value.tag != NULL


def _as_words(node: yaml.Node) -> yaml.Node:
    """Return a copy of a name, a list of names or a table with names as keys, with each name as text.

    A copy, since an aliased value may be a number elsewhere.
    """
    marks = node.start_mark, node.end_mark
    if isinstance(node, yaml.MappingNode):
        pairs = [(k, _as_words(v)) if k.tag == MERGE else (_as_words(k), v) for k, v in node.value]
        return yaml.MappingNode(node.tag, pairs, *marks)
    if isinstance(node, yaml.SequenceNode):
        named = [part if part.tag == NULL else _as_words(part) for part in node.value]  # an empty item is not a name
        return yaml.SequenceNode(node.tag, named, *marks)
    return yaml.ScalarNode(TEXT, node.value, *marks)


def _line_of(tree: Any, where: Sequence[str]) -> int:
    """Return the line of the last existing key of a path."""
    line = 1
    for key in where:
        pairs = tree.value if isinstance(tree, yaml.MappingNode) else []
        found = [(name, value) for name, value in pairs if name.value == str(key)]
        if not found:
            break
        line, tree = found[0][0].start_mark.line + 1, found[0][1]
    return line


def check_keys(table: Mapping[str, Any], keys: Sequence[str], *where: str) -> None:
    """Raise a RecipeError with the nearest key for one that is not among `keys`."""
    for key in table:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(keys)}"
            raise RecipeError(f"unknown setting {key!r}; {hint}", *where, str(key))


def place_of(levels: Levels, named: Sequence[str]) -> list[str]:
    """Return the recipe path of the setting that applies, as it is spelled there; empty if there is none."""
    within = [[*place, *found] for place, level in levels if (found := _spelled_path(level, named))]
    return within[-1] if within else []


def _spelled_path(table: Any, keys: Sequence[str]) -> list[str]:
    """Return a path of keys as spelled in a table, with dashes or underscores; empty if a key is missing."""
    alike = [key for key in table if keys and _plain_key(key) == _plain_key(keys[0])] if isinstance(table, dict) else []
    found = [[key, *deeper] for key in alike if (deeper := _spelled_path(table[key], keys[1:])) or not keys[1:]]
    return found[-1] if found else []


def _plain_key(key: Any) -> str:
    return str(key).replace("-", "_")
