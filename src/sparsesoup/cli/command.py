"""Parts of a command of the command line, and flags of settings dataclasses."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from docstring_parser import parse

from sparsesoup.core.errors import UserError
from sparsesoup.core.settings import ALIASES, Setting, flag_of
from sparsesoup.runs.yaml_text import BadYaml, TooManyValues, read_yaml


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, whose errors are a UserError."""

    def __init__(self, command: str, about: str, more: str = "", usage: str | None = None, **rest: Any) -> None:
        super().__init__(
            prog=f"sparsesoup {command}", usage=usage, description=about, epilog=more, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter, **rest,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        """Raises: UserError."""
        raise UserError(f"{message}; see `{self.prog} --help`")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command.

    Args:
        parser: returns the parser of its flags.
        run: carries it out; returns the exit code, None for 0.
        parse: returns what `run` takes from the words of a command line; default what the parser does.
    """

    parser: Callable[[], CommandParser]
    run: Callable[[Any], int | None]
    parse: Callable[[Sequence[str]], Any] | None = None

    def parse_words(self, words: Sequence[str]) -> Any:
        """Return what `run` takes.

        Raises: UserError naming the flag that is wrong; SystemExit after help.
        """
        return self.parse(words) if self.parse else self.parser().parse_args(words)


def add_settings(parser: CommandParser, settings: Iterable[Setting], title: str = "") -> None:
    """Add a flag for each setting, with its meaning from the docstring of its class; flags left out are absent.

    Args:
        title: of the group of flags; default the first line of the docstring.
    """
    groups: dict[type, Any] = {}
    for setting in settings:
        kind, own = setting.kind, type(setting.owner)
        if own not in groups:
            first = str(parse(own.__doc__ or "").short_description)
            groups[own] = parser.add_argument_group(title or first.partition(".")[0])
        has_default = setting.value not in (None, "", ())
        shown = f" (default {_plain_default(setting.value)})" if has_default else ""
        aliases = [alias for alias, name in ALIASES.items() if name == setting.name]
        more = {"nargs": "?", "const": "true"} if kind is bool else {"nargs": "+"} if _is_list_of_texts(kind) else {}
        groups[own].add_argument(
            *(flag_of(name) for name in (setting.name, *aliases)), dest=setting.name,
            default=argparse.SUPPRESS, metavar=_value_placeholder(kind), **more,
            help=(help_of(setting) + shown).replace("%", "%%"),
        )  # fmt: skip


def help_of(setting: Setting) -> str:
    """Return what the docstring of its class says of a setting."""
    leaf, text = setting.name.rpartition(".")[2], parse(type(setting.owner).__doc__ or "")
    return " ".join(next((p.description or "" for p in text.params if p.arg_name == leaf), "").split()).rstrip(".")


def read_settings(given: Mapping[str, Any], settings: Iterable[Setting]) -> dict[str, Any]:
    """Return the values of the settings that a command line names, by dotted name."""
    return {s.name: flag_value(s.kind, given[s.name], s.name) for s in settings if s.name in given}


def flag_value(kind: Any, words: str | Sequence[str], name: str) -> Any:
    """Return what is written behind a flag as a plain value: a text for a text, else YAML.

    >>> flag_value(str | None, "7", "model"), flag_value(float, "1e-4", "rate"), flag_value(bool, "true", "zstd")
    ('7', 0.0001, True)
    >>> flag_value(tuple[str, ...], ["a,b"], "text_columns"), flag_value(tuple[str, ...], ['["a,b"]'], "text_columns")
    (['a', 'b'], ['a,b'])
    """
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    text = words if isinstance(words, str) else words[0]
    if text == "null" and NoneType in options:
        return None
    if not isinstance(words, str) and not (len(words) == 1 and text.startswith("[")):
        return [part.strip() for word in words for part in word.split(",") if part.strip()]
    if str in options or (get_origin(kind) is Literal and text in get_args(kind)):
        return text
    try:
        return read_yaml(text)
    except TooManyValues as error:
        raise UserError(f"a value that begins with {text[:20]!r} cannot be read: {error}", name) from error
    except BadYaml:
        return text


def _is_list_of_texts(kind: Any) -> bool:
    return any(get_origin(option) is tuple and get_args(option)[0] is str for option in (kind, *get_args(kind)))


def _value_placeholder(kind: Any) -> str:
    """Return what the help shows for a value."""
    if get_origin(kind) is Literal or kind is bool:
        return "{" + ",".join(map(str, get_args(kind) or ("true", "false"))) + "}"
    if _is_list_of_texts(kind):
        return "A"
    known = {int: "N", float: "X", str: "TEXT"}
    return next((known[option] for option in (kind, *get_args(kind)) if option in known), "YAML")


def _plain_default(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
