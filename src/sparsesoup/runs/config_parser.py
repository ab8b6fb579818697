"""jsonargparse's parser with dashes in flags and errors in one plain line."""

import argparse
import difflib
import re
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

from sparsesoup.core.errors import UserError
from sparsesoup.runs.config_yaml import TooMany, compose_yaml

PLAINER = (  # jsonargparse's words -> our words
    (r"Parser key \"?([\w.]+)\"?:", r"setting \1:"),
    (r"Does not validate against any of the Union subtypes Subtypes: \[(.+?)\] Errors: .*Given value: ",
     r"Expected a \1. Got value: "),
    (r"<class '(\w+)'>", r"\1"),
    (r"Expected a (?:typing\.)?Literal\[(.+?)\]", r"Expected one of \1"),
    (r", NoneType\b", " or null"),
    (r", tuple\[float, float\]", " or two as [low, high]"),
)  # fmt: skip
MODE = "sparsesoup"  # jsonargparse's mode for parsing flag values and the files they name


def _load_value(text: str) -> Any:
    """Parse a flag value for jsonargparse.

    Raises: UserError if its aliases multiply: after an error of another kind jsonargparse would parse it again.
    """
    if "*" in text:
        try:
            compose_yaml(text)
        except TooMany as error:
            raise UserError(f"a value that begins with {text[:20]!r} cannot be read: {error}") from error
        except yaml.YAMLError:
            pass  # it may be plain text
    return get_loader("yaml")(text)


set_loader(MODE, _load_value, (yaml.YAMLError,))


class CommandParser(argparse.ArgumentParser):
    """argparse's parser for commands whose flags are not run settings."""

    def error(self, message: str) -> NoReturn:
        """Raises: UserError."""
        raise UserError(f"{message}; see `{self.prog} --help`")


class ConfigParser(ArgumentParser):
    """jsonargparse's parser with dashes in flags and one-line errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a UserError with the message; for an unknown flag, add the nearest ones."""
        cause: BaseException | None = ex
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, UserError):
            raise cause
        text = " ".join(message.split())
        text = re.sub(r"^Group '(\w+)' does not accept option '(.+)'$", r"unrecognized arguments: --\1.\2", text)
        unknown = re.search(r"unrecognized arguments: (--\S+)", text, re.IGNORECASE)
        if unknown:
            flag = unknown.group(1).split("=")[0].replace("_", "-")
            flags = self.list_flags()
            near = difflib.get_close_matches(flag, flags, n=3, cutoff=0.5)
            own = [f for f in flags if f.startswith("--method.")]
            hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
            listed = f" (the method has {', '.join(own)})" if flag.startswith("--method.") and own else ""
            text = f"unknown setting {flag}; {hint}{listed}"
        raise UserError(self._plain_message(text)) from ex

    def list_flags(self) -> list[str]:
        """Return all flags as users write them, without jsonargparse's flags for groups."""
        shown = [
            action for action in self._actions if action.help != argparse.SUPPRESS and action.dest != "print_shtab"
        ]
        found = [flag.replace("_", "-") for action in shown for flag in action.option_strings if flag.startswith("--")]
        return [*found, *(["--image-column"] if "--text-columns" in found else [])]

    def _plain_message(self, text: str) -> str:
        """Return a message of jsonargparse in plain words."""
        for pattern, plain in PLAINER:
            text = re.sub(pattern, plain, text)
        if share := re.match(r"setting sparsity: Expected .* Got value: (\S+)$", text):
            number = share[1].rstrip("%")
            hint = f"{float(number) / 100:g}" if re.fullmatch(r"[\d.]{1,5}", number) else "0.9"
            return f"sparsity is the share of weights removed, in [0, 1), got {share[1]}; say {hint}"
        outer, _, inner = text.partition(" - setting ")
        if outer.startswith("setting ") and "Unable to load config" in outer:
            name = outer.split()[1].rstrip(":")
            if inner.startswith(f"{name}."):
                return f"setting {inner}"
            own = [f.removeprefix(f"--{name}.") for a in self._actions for f in a.option_strings if f"--{name}." in f]
            return f"setting {name} has fields of its own ({', '.join(own)}); say --{name}.{own[0]} VALUE".replace(
                "_", "-"
            )
        return text

    def format_help(self) -> str:
        """Return the help with dashes in flags, such as `--data-root`."""
        return re.sub(r"--[a-z][\w.]*", lambda m: m.group().replace("_", "-"), super().format_help())
