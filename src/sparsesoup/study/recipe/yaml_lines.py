"""YAML recipes with the line number of each key, and their changes by flags."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from sparsesoup.core.errors import UserError
from sparsesoup.core.settings import unknown_setting
from sparsesoup.runs.yaml_text import BadYaml, compose_yaml, construct_yaml, line_of_keys, read_text

SHIPPED = Path(__file__).parents[1] / "recipes"
NAMED = ("methods", "datasets", "models", "from", "row", "dataset")  # keys with names, which are read as text
NULL, MERGE, TEXT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "merge", "str"))
Table = dict[str, Any]
Levels = Sequence[tuple[tuple[str, ...], Any]]  # where settings of a row are in the recipe; later ones override
OTHER = {"steps": "epochs", "epochs": "steps",  # mutually exclusive settings
         "text_columns": "image_column", "image_column": "text_columns"}  # fmt: skip


class RecipeError(Exception):
    """An error and its place in the recipe."""

    def __init__(self, error: Exception | str, *where: str) -> None:
        super().__init__(str(error))
        self.error, self.where = error if isinstance(error, Exception) else UserError(error), where


@contextlib.contextmanager
def add_location(location: Callable[[Sequence[str]], str]) -> Iterator[None]:
    """Turn a RecipeError into a UserError that starts with its place: a line of the recipe, or a flag."""
    try:
        yield
    except RecipeError as wrong:
        where, error = location(wrong.where), wrong.error
        if isinstance(error, UserError) and (where.startswith("--") or f".{where}".endswith(f".{error.field}")):
            error = error.without_field()
        raise UserError(f"{where}: {error}") from error


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
    """Return (the recipe, the line of a path of keys). Names of rows and datasets are text as written: 0x7, no."""
    try:
        tree = compose_yaml(read_text(path))
        _keep_names(tree)
        recipe = construct_yaml(tree)
    except (OSError, BadYaml) as error:
        names = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.yaml")))
        hint = f"; shipped ones are {names}" if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot read recipe {path}: {error}{hint}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"recipe {path} must be a table with methods, datasets, ...; see `sparsesoup compare --help`")
    return recipe, lambda where: line_of_keys(tree, where) or 1


def _keep_names(node: Node | None, named: bool = False) -> None:
    """Make text of the scalars of a tree that are names: keys, items or the value below a key of `NAMED`."""
    pairs = node.value if isinstance(node, MappingNode) else []
    for key, value in pairs:
        if named and key.tag != MERGE:
            key.tag = TEXT
        _keep_names(value, key.value in NAMED or (named and key.tag == MERGE))
    for part in node.value if isinstance(node, SequenceNode) else []:
        _keep_names(part, named)
    if named and isinstance(node, ScalarNode) and node.tag != NULL:  # an empty item is not a name
        node.tag = TEXT


def check_keys(table: Mapping[str, Any], keys: Sequence[str], *where: str) -> None:
    """Raise a RecipeError with the nearest key for one that is not among `keys`."""
    for key in table:
        if key not in keys:
            error = unknown_setting(str(key), keys)
            allowed = UserError(f"unknown setting (allowed: {', '.join(keys)})", str(key), error.near)
            raise RecipeError(error if "allowed" in error.message else allowed, *where, str(key))


def locate_keys(levels: Levels, named: Sequence[str]) -> list[str]:
    """Return the recipe path of the setting that applies, as it is spelled there; empty if there is none."""
    within = [[*location, *found] for location, level in levels if (found := _spelled_path(level, named))]
    return within[-1] if within else []


def _spelled_path(table: Any, keys: Sequence[str]) -> list[str]:
    """Return a path of keys as spelled in a table, with dashes or underscores; empty if a key is missing."""
    alike = [key for key in table if keys and _plain_key(key) == _plain_key(keys[0])] if isinstance(table, dict) else []
    found = [[key, *deeper] for key in alike if (deeper := _spelled_path(table[key], keys[1:])) or not keys[1:]]
    return found[-1] if found else []


def _plain_key(key: Any) -> str:
    return str(key).replace("-", "_").replace("image_column", "text_columns")


def apply_changes_(recipe: Table, changed: Table) -> None:
    """Apply changes to a recipe, and remove the settings that they replace."""
    gone, old = {*changed, *displaced_settings(changed)}, recipe.get("datasets")
    for key in gone - {"datasets"}:
        recipe.pop(key, None)
    recipe |= changed
    if isinstance(old, dict):
        recipe["datasets"] = {}
        for name in changed.get("datasets", list(old)):
            own = old.get(_published_dataset(name, old)) or {}
            # A configuration belongs to the place where a dataset was published, not to its copies.
            lost = gone if name in old else gone | {"dataset_config"}
            kept = {key: value for key, value in own.items() if key not in lost} if isinstance(own, dict) else own
            recipe["datasets"][name] = kept


def _published_dataset(name: str, datasets: Mapping[str, Any]) -> str:
    """Return the recipe's dataset for a name: itself, or the one that it is a copy of, by the start of its last part.

    >>> _published_dataset("my/glue/mnli_dev_split", {"glue/mnli": None, "glue/wnli": None})
    'glue/mnli'
    >>> _published_dataset("stanford_dogs", {"tanganke/stanford_cars": None})
    'stanford_dogs'
    """
    leaf = Path(name).name.lower()
    names = {known: Path(known).name.lower() for known in datasets}
    shared = {known: len(own) for known, own in names.items() if re.match(rf"{re.escape(own)}(?![^_.-])", leaf)}
    longest = [known for known, length in shared.items() if length == max(shared.values())]
    return name if name in datasets or len(longest) != 1 else longest[0]


def displaced_settings(own: Table) -> set[str]:
    """Return the settings excluded by those of a table; unset ones exclude nothing."""
    return {OTHER[key] for key, value in own.items() if key in OTHER and value is not None}


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, and anything else as a list of it alone."""
    return value if isinstance(value, list) else [value]
