"""`sparsesoup completion SHELL`: a script for the shell, made from the parsers of all commands by shtab."""

import argparse
import sys
from pathlib import Path
from typing import Any

import shtab

from sparsesoup.cli.command import Command, CommandParser
from sparsesoup.cli.main import COMMANDS as ALL_COMMANDS
from sparsesoup.cli.main import load_command
from sparsesoup.cli.prune import settings_parser
from sparsesoup.methods import METHODS, TABLE

SHELLS = ("bash", "zsh", "fish")
EXAMPLES = """examples:
  sparsesoup completion bash > ~/.local/share/bash-completion/completions/sparsesoup
  sparsesoup completion zsh > ~/.zfunc/_sparsesoup
  sparsesoup completion fish > ~/.config/fish/completions/sparsesoup.fish

The script completes commands, methods, flags and choices, and does not start Python. Write it again after an
update.
"""
FOLDERS = ("DIR", "RUN", "TICKET", "RUN_OR_EXPORT")  # what the help calls a value that is a folder
PATHS = ("config", "model", "models", "dataset", "datasets", "train.distill.teacher", "method.ticket")


def completion_parser() -> CommandParser:
    """Return the parser of `completion`."""
    made = CommandParser("completion", "Print the completion script of a shell.", EXAMPLES)
    made.add_argument("SHELL", choices=SHELLS, help=", ".join(SHELLS))
    return made


def run_completion(options: Any) -> None:
    """Print the script."""
    sys.stdout.write(shtab.complete(full_parser(), options.SHELL).rstrip("\n") + "\n")


def full_parser() -> argparse.ArgumentParser:
    """Return one parser of all commands, and of all methods below `prune`, for completion alone."""
    root = argparse.ArgumentParser("sparsesoup")
    root.add_argument("--version", action="store_true", help="print the version")
    commands = root.add_subparsers()
    for name, (_, _, summary) in ALL_COMMANDS.items():
        parser = settings_parser() if name == "prune" else load_command(name).parser()
        made = _add_copy(commands, name, parser, summary)
        if name == "prune":
            methods = made.add_subparsers()
            for method in METHODS:
                _add_copy(methods, method, settings_parser(method), TABLE[method].summary)
    return root


def _add_copy(parent: Any, name: str, parser: CommandParser, summary: str) -> argparse.ArgumentParser:
    """Add a parser below another, with what completes the values of its flags."""
    for action in parser._actions:
        text = action.metavar if isinstance(action.metavar, str) else ""
        if text.startswith("{"):
            action.choices = text.strip("{}").split(",")
        elif name == "methods" and action.dest == "NAME":
            action.choices = [*METHODS]
        elif text in FOLDERS or action.dest in (*FOLDERS, "out", "data_root"):
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]  # an attribute that shtab reads
        elif action.type is Path or action.dest in PATHS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # the same
    made: argparse.ArgumentParser = parent.add_parser(
        name, parents=[parser], add_help=False, help=summary.replace("%", "%%"), allow_abbrev=False
    )
    return made


COMMANDS = {"completion": Command(parser=completion_parser, run=run_completion)}
