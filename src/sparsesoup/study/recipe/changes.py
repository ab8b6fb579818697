"""Changes of a recipe by flags, and settings that exclude each other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsesoup.study.recipe.yaml_lines import Table

OTHER = {"steps": "epochs", "epochs": "steps",  # mutually exclusive settings
         "text_columns": "image_column", "image_column": "text_columns"}  # fmt: skip


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
    shared = {known: len(Path(known).name) for known in datasets if _starts_with(leaf, Path(known).name.lower())}
    longest = [known for known, length in shared.items() if length == max(shared.values())]
    return name if name in datasets or len(longest) != 1 else longest[0]


def _starts_with(leaf: str, known: str) -> bool:
    """Return True if a name starts with another one at the end of a word."""
    return leaf.startswith(known) and leaf[len(known) : len(known) + 1] in ("", "_", ".", "-")


def displaced_settings(own: Table) -> set[str]:
    """Return the settings excluded by those of a table; unset ones exclude nothing."""
    return {OTHER[key] for key, value in own.items() if key in OTHER and value is not None}


def as_flag(key: str) -> str:
    """Return the flag of a key."""
    return f"--{key.replace('_', '-')}"


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, and anything else as a list of it alone."""
    return value if isinstance(value, list) else [value]
