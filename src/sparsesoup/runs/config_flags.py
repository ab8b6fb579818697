"""A table of settings as flags of `prune`, so that recipes, keywords and flags are checked in one place."""

import dataclasses
import json
import os
import re
from typing import Any

import numpy as np

from sparsesoup.core.errors import UserError
from sparsesoup.hub.build import ModelAndDataConfig

OUTSIDE = {  # flags of `prune` that are not allowed in a recipe
    "config": "a recipe does not name another; from Python give its settings themselves",
    "out": "say where on the command line",
    "save_every": "say it on the command line",
    "cache_dir": "say it on the command line",
    "workers": "say it on the command line",
}
TEXTS = {field.name for field in dataclasses.fields(ModelAndDataConfig) if field.type in (str, str | None)}


def as_flags(recipe: dict[str, Any]) -> list[str]:
    """Return a recipe as flags, so that both are checked in one place; keys may have dashes, as flags do."""
    flags = []
    for name, value in recipe.items():
        if str(name) in OUTSIDE:
            raise UserError(f"{name} is no setting of a run, which a recipe holds; {OUTSIDE[str(name)]}")
        if isinstance(value, dict) and name in ("train", "method"):
            flags += [_as_flag(f"{name}.{key}", own) for key, own in value.items()]
        else:
            flags.append(_as_flag(str(name), value))
    return columns_as_list([normalize_flag(flag) for flag in flags])


def _as_flag(name: str, value: Any) -> str:
    if isinstance(value, (list, tuple, dict)) and name.replace("-", "_") in TEXTS:
        value = _as_text(name, value)
    try:
        return f"--{name}={_plain_text(value)}"
    except (TypeError, ValueError) as error:  # a date, a set, bytes, a value that contains itself
        raise UserError(
            f"setting {name} is a number, a text, true, false, null, or a list or table of these, got {value!r}; "
            f"write it in quotes if it is a text"
        ) from error


def _as_text(name: str, value: Any) -> str:
    """Return a list of class names as the flag takes it; refuse other lists, which JSON would make one text."""
    named, listed = name.replace("-", "_"), [value] if isinstance(value, dict) else list(value)
    plain = listed and all((isinstance(each, str) and "," not in each) or type(each) is int for each in listed)
    if named == "class_names" and plain:
        return ",".join(map(str, listed))
    hint = "; several are said by a file with one a line" if named in ("prompts", "class_names") else ""
    raise UserError(f"setting {name} is one text, got {value!r}{hint}")


def flatten_table(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables; keys are joined by dots."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            found |= flatten_table(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _plain_text(value: Any) -> str:
    path = isinstance(value, (str, os.PathLike))  # settings given in Python may be paths
    return os.fspath(value) if path else json.dumps(value, default=_to_builtin)


def _to_builtin(value: Any) -> Any:
    """Convert a numpy number, as from loops over `np.arange`, or a path to the Python type."""
    return value.item() if isinstance(value, np.generic) else os.fspath(value)


def shell_value(value: Any) -> str:
    """Return a value quoted for a shell."""
    text = _plain_text(value)
    return text if re.fullmatch(r"[\w./:@%+-]+", text) else "'" + text.replace("'", "'\\''") + "'"


def brief_number(number: int) -> str:
    """Format an integer to fit a line.

    >>> brief_number(300), brief_number(10**400)
    ('300', 'a number of 401 digits')
    """
    return str(number) if abs(number) < 10**20 else f"a number of {len(f'{abs(number):d}')} digits"


def normalize_flag(argument: str) -> str:
    """Return a flag as the parser spells it: with underscores, and image columns under the names of text columns."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    name = flag[2:].replace("-", "_")
    return "--" + ("text_columns" if name == "image_column" else name) + equals + value


def columns_as_list(arguments: list[str]) -> list[str]:
    """Convert `--text-columns a,b`, with or without spaces, or `--text-columns a b` to the parser's list syntax."""
    done: list[str] = []
    left = list(arguments)
    while left:
        flag, equals, value = left.pop(0).partition("=")
        if flag != "--text_columns":
            done.append(flag + equals + value)
            continue
        values = [value] if equals else []
        while left and not left[0].startswith("-"):
            values.append(left.pop(0))
        done.append(f"{flag}={_as_list(values)}" if values else flag)
    return done


def _as_list(values: list[str]) -> str:
    """Return column names as JSON; a single name that contains a comma is also written as JSON."""
    if len(values) == 1 and (values[0] in ("", "null") or values[0].startswith("[")):
        return values[0]
    return json.dumps([name.strip() for value in values for name in value.split(",") if name.strip()])
