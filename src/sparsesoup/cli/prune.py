"""`sparsesoup prune METHOD`: flags for all settings of a run, below which a recipe is read."""

import argparse
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsesoup.cli.command import Command, CommandParser, add_settings, flag_value, help_of
from sparsesoup.core.errors import UserError
from sparsesoup.core.settings import ALIASES, Setting, flag_of, unknown_setting
from sparsesoup.methods import METHODS, TABLE
from sparsesoup.report.escaping import SafeConsole, print_line
from sparsesoup.runs.config import (
    NO_METHOD,
    OUTSIDE,
    RunConfig,
    config_from_dict,
    method_named,
    read_recipe,
    run_settings,
)
from sparsesoup.runs.yaml_text import line_of_keys
from sparsesoup.training.device import choose_device

USAGE = """sparsesoup prune METHOD [--model M] [--dataset D] [--sparsity S] [--steps N | --epochs X] [--seed N]
                        [--config recipe.yaml] [--out DIR] [--dry-run] [--method.SETTING V] [--train.SETTING V] ..."""
EXAMPLES = """examples:
  sparsesoup prune isp --model bert-base-uncased --dataset glue/cola --sparsity 0.7 --epochs 3
  sparsesoup prune imp --dataset reviews.csv --label-column stars --method.cut 0.3 --train.batch-size 16
  sparsesoup prune gradual --dataset glue/sst2 --train.eval-steps 100 --report-to tensorboard
  sparsesoup prune --config runs/docstrings/isp-0123456789/seed-0/run.yaml --seed 1

Repeat a command to resume it after a kill. `sparsesoup methods` lists the methods.
Python: sparsesoup.prune("isp", dataset="glue/cola", method={"stages": 3}, train={"batch_size": 16})
"""


def run_prune(parsed: tuple[RunConfig, argparse.Namespace]) -> None:
    """Run a method, then say how good the result is and where it is."""
    from sparsesoup.report.format import run_warnings
    from sparsesoup.runs.options import RuntimeOptions, check_cache_size
    from sparsesoup.runs.run import run_method
    from sparsesoup.runs.summary import closing_lines

    settings, options = parsed
    check_cache_size(options.cache_size)
    cache = Path(options.cache_dir) if options.cache_dir and not options.dry_run else None
    own = {"workers": options.workers, "snapshots": options.snapshots}
    own |= {} if options.cache_dir and options.dry_run else {"cache_size": options.cache_size}  # which makes no folder
    outside = RuntimeOptions(SafeConsole(stderr=True), options.save_every, cache, **own)
    if options.dry_run:
        from sparsesoup.runs.run import check_options
        from sparsesoup.study.dry_run import describe_plan

        settings = check_options(settings, Path(options.out), outside)
        for line in describe_plan(settings, Path(options.out), options.snapshots):
            print_line(line)
        return
    run = run_method(settings, Path(options.out), outside)
    for line in run_warnings(run.report):
        print_line(f"note: {line}", sys.stderr)
    for line in closing_lines(run.path, run.report, Path(options.out)):
        print_line(line)


def settings_parser(method: str = "") -> CommandParser:
    """Return the parser of the flags of a method; without one, of those that all methods have."""
    every = f"Prune a model. METHOD is one of: {', '.join(METHODS)}; `prune METHOD --help` has its settings."
    about = textwrap.fill(every, 120, break_on_hyphens=False)
    if method:
        fixed = ", ".join(f"{f} {getattr(METHODS[method], f)}" for f in TABLE[method].fixed if f != "protocols")
        about = f"{TABLE[method].summary}." + (f" Fixed here: {fixed}." if fixed else "")
    made = CommandParser(f"prune {method or 'METHOD'}", about, EXAMPLES, USAGE)
    add = made.add_argument
    add("--config", metavar="FILE", help="recipe (YAML), such as the run.yaml of a run; flags override it")
    add("--out", default="runs", metavar="DIR", help="folder for run directories (default runs)")
    add("--save-every", type=float, default=30.0, metavar="SECONDS", help="minimum between checkpoints (default 30)")
    add("--cache-dir", metavar="DIR", help="folder of trainings shared by runs (the dense run, IMP's rounds); existing "
        "ones are reused and new ones added; the cost of both is included in full; default: none")  # fmt: skip
    add("--cache-size", type=float, default=32.0, metavar="GIB", help="most GiB in that folder; trainings used least "
        "recently are removed (default 32)")  # fmt: skip
    add("--dry-run", action="store_true", help="print the phases of the run and their estimated cost, memory and disk, "
        "without training")  # fmt: skip
    add("--workers", type=int, default=1, metavar="N", help="processes for weak masks, each with as many threads as "
        "this one: set OMP_NUM_THREADS (default 1)")  # fmt: skip
    add("--snapshots", default="device", metavar="WHERE", help="keep forks and rewinding points on the device, in host "
        "memory (host) or on disk (disk); default device")  # fmt: skip
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:<number> or mps (default the first accelerator, else cpu)")
    settings = [s for s in run_settings(method or "dense") if method or not s.name.startswith("method.")]
    add_settings(made, settings)
    owners = {s.name.rpartition(".")[0]: s.owner for s in settings}
    for group in sorted({s.name[:i] for s in settings for i, sign in enumerate(s.name) if sign == "."}):
        owner = owners.get(group.rpartition(".")[0])
        about = help_of(Setting(group, None, None, owner)) or argparse.SUPPRESS
        add(flag_of(group), dest=group, default=argparse.SUPPRESS, metavar="TABLE", help=about)
    return made


def parse_arguments(words: Sequence[str]) -> tuple[RunConfig, argparse.Namespace]:
    """Return (settings, other flags) from the arguments of `prune`: a method, flags, a recipe under --config.

    Raises: UserError for bad input; SystemExit after help.
    """
    method = words[0] if words and not words[0].startswith("-") else ""
    flags = [_with_dashes(word) for word in words[bool(method) :]]
    first = CommandParser("prune", "", add_help=False)
    first.add_argument("--config")
    path, recipe, tree = first.parse_known_args(flags)[0].config, dict[str, Any](), None
    if path is not None:
        method, recipe, tree = read_recipe(Path(path), method)
    if method:
        method_named(method)
    options, others = settings_parser(method).parse_known_args(flags)
    if not method:
        raise _no_method(flags)
    _check_known(others, method)
    if options.device:
        choose_device(options.device)  # first, since the default precision is that of the device
    kinds = {s.name: s.kind for s in run_settings(method)}
    given = {name: value for name, value in sorted(vars(options).items()) if name not in OUTSIDE}  # a group comes first
    given = {name: flag_value(kinds.get(name, dict), value, name) for name, value in given.items()}
    for flag, other in (("steps", "epochs"), ("epochs", "steps")):
        if flag in given:
            recipe.pop(other, None)  # flags override the recipe
    try:
        return config_from_dict(method, {**recipe, **given}), options
    except UserError as error:
        line = line_of_keys(tree, error.field.split("."))
        if not line or error.field in vars(options):
            raise
        raise UserError(f"{path}, line {line}: {error}") from error


def _with_dashes(word: str) -> str:
    flag, equals, value = word.partition("=")
    return (flag.replace("_", "-") if flag.startswith("--") else flag) + equals + value


def _no_method(flags: Sequence[str]) -> UserError:
    """Return the error for a command without a method, or with one behind its flags."""
    behind = [i for i, word in enumerate(flags) if word in METHODS]
    if not behind:
        return UserError(NO_METHOD)
    own = [*flags[: behind[-1]], *flags[behind[-1] + 1 :]]
    line = shlex.join(["sparsesoup", "prune", flags[behind[-1]], *own])
    return UserError(f"the method {flags[behind[-1]]} comes before the flags: `{line}`")


def _check_known(words: Sequence[str], method: str) -> None:
    """Raise a UserError for words that the parser has not taken."""
    if words and words[0].startswith("--"):
        name = words[0][2:].partition("=")[0].replace("-", "_")
        raise unknown_setting(name, [*(s.name for s in run_settings(method)), *ALIASES, *OUTSIDE])
    if words and words[0] in METHODS:
        raise UserError(f"one method is allowed, got {method} and {words[0]}; leave one out")
    if words:
        raise UserError(f"unrecognized argument {words[0]}; see `sparsesoup prune {method} --help`")


COMMANDS = {"prune": Command(parser=settings_parser, run=run_prune, parse=parse_arguments)}
