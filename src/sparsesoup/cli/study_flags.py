"""Flags of `sparsesoup compare`, parsed and checked without slow imports."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsesoup.cli.command import Command, CommandParser
from sparsesoup.core.errors import UserError
from sparsesoup.core.process_pool import LIVES
from sparsesoup.core.threads import check_threads
from sparsesoup.study.execute.ray_connect import check_ray_reachable, ray_address

ABOUT = """Many runs as one resumable study: models, datasets, methods, sparsities and seeds; then a table and a page.

A recipe is YAML:

  models: minilm                 # one or a list, as for datasets, sparsities and seeds
  datasets: [glue/cola, glue/sst2]
  sparsities: [0.5, 0.9]
  seeds: [0, 1, 2]
  steps: 1440                    # T of every run; or epochs
  train: {precision: bf16}       # as --train.FIELD of prune
  methods:                       # rows of the table: a list of names, or a table with settings
    dense:
    isp:
    slow-imp: {name: imp, method: {cut: 0.1}}
    dense-2T: {name: dense, times: 2}
    moved: {from: isp}           # isp's tickets of every dataset, trained on every other
  budget: paper                  # or equal: all rows get the FLOPs of dense; {times: 3}, {row: imp}, {flops: 2e15}

Shipped recipes: table2 (CLIP on images), table3 (BERT on GLUE), transfer.

Repeat the command to resume after any kill. The test split is opened once per run, when all are
trained. Runs are trained in this process, in several (--workers 2), or on Ray (--executor ray), here or on the nodes of
a cluster that share the working directory and --out: bit-identical for the same device and number of threads. The exit
code is 1 if runs failed.
"""


INSTEAD = "instead of the recipe's"
OF_DATA = ("dataset_config", "text_columns", "image_column", "label_column", "drop_unlabelled", "prompts",
           "class_names")  # fmt: skip
CHANGES = ("models", "datasets", "sparsities", "seeds", "steps", "epochs", "data_root", *OF_DATA)


def study_parser() -> CommandParser:
    """Return the parser of `compare`."""
    made = CommandParser("compare", ABOUT)
    made.add_argument("RUN", type=Path, nargs="*", help="existing runs, for a table without a recipe")
    made.add_argument("--config", help="recipe (YAML), or the name of a shipped one: table2, table3, transfer")
    made.add_argument("--out", type=Path, default=Path("runs"), help="folder of all runs, with studies in studies/")
    made.add_argument("--name", help="name of the study; default: the recipe's file name, `runs` for existing runs")
    _recipe_flags(made)
    _executor_flags(made)
    made.add_argument("--retry-failed", action="store_true", help="retry runs that failed before")
    made.add_argument("--dry-run", action="store_true", help="print the runs and their estimated cost without training")
    return made


def read_study_arguments(arguments: Sequence[str]) -> Any:
    """Parse the flags. A cluster that is to run the trials must respond before their cost is estimated.

    Raises: UserError if flags conflict, or the cluster does not respond.
    """
    options = study_parser().parse_args(arguments)
    if bool(options.RUN) == bool(options.config):
        raise UserError("compare needs either --config recipe.yaml or runs that exist; see `sparsesoup compare --help`")
    if options.RUN:
        _need_no_recipe(options)
        return options
    ray = options.executor == "ray"
    _need_fitting(options, ray)
    if ray and not options.dry_run:
        check_ray_reachable(ray_address(options.address))
    return options


def _recipe_flags(made: argparse.ArgumentParser) -> None:
    """Add the flags that override recipe keys; lists are also accepted under `prune`'s name for one value."""
    lists: dict[str, tuple[str, Callable[[str], Any]]] = {
        "models": ("model", str), "datasets": ("dataset", str), "sparsities": ("sparsity", float),
        "seeds": ("seed", int),
    }  # fmt: skip
    for key, (one, kind) in lists.items():
        made.add_argument(f"--{key}", f"--{one}", nargs="+", type=kind, metavar=one.upper(), help=INSTEAD)
    made.add_argument("--steps", type=int, help=INSTEAD)
    made.add_argument("--epochs", type=float, help=INSTEAD)
    made.add_argument("--data-root", help="folder of named datasets; default the variable SPARSESOUP_DATA")
    for key in OF_DATA:
        made.add_argument(f"--{key.replace('_', '-')}", nargs="+" if key == "text_columns" else None, help=INSTEAD)


def _executor_flags(made: argparse.ArgumentParser) -> None:
    add = made.add_argument
    add("--executor", choices=("local", "ray"), default="local", help="run on this machine (default), or as Ray tasks")
    add("--workers", type=int, help="parallel runs; default 1, in this process; on Ray as many as fit")
    add(
        "--threads",
        type=int,
        help="torch threads per run; default: the cores divided by --workers, on Ray --cpus-per-run",
    )
    add("--retries", type=int, help=f"restarts of a run whose process died; default {LIVES - 1}")
    add("--address", help="host:port of a Ray cluster's head, or auto; default RAY_ADDRESS, else Ray is started here")
    add("--workers-per-run", type=int, default=1, help="processes for the weak masks of a run; default its own")
    add("--cpus-per-run", type=float, help="cores that Ray reserves per run; default 1")
    add("--gpus-per-run", type=float, help="GPUs that Ray reserves per run, 0.25 for four runs on one; default 0")


def _need_fitting(options: Any, ray: bool) -> None:
    """Raise a UserError for an invalid number, or a flag without effect."""
    for flag, low in (("workers", 1), ("threads", 1), ("retries", 0), ("workers_per_run", 1)):
        if (value := getattr(options, flag)) is not None and value < low:
            raise UserError(f"--{flag.replace('_', '-')} is at least {low}, got {value}")
    if not ray or ray_address(options.address) == "local":  # the nodes of a cluster have other numbers of cores
        check_threads(options.threads)
    for flag in ("address", "cpus_per_run", "gpus_per_run"):
        if getattr(options, flag) is not None and not ray:
            raise UserError(f"--{flag.replace('_', '-')} is for runs on Ray; add --executor ray")
    if options.retries is not None and not ray and (options.workers or 1) == 1:
        raise UserError("--retries is for runs in processes of their own; add --workers 2 or --executor ray")


def _need_no_recipe(options: Any) -> None:
    """Raise a UserError for a flag without effect on existing runs."""
    plain = vars(study_parser().parse_args([]))
    given = [name for name, value in vars(options).items() if value != plain[name]]
    for name in given:
        if name not in ("RUN", "out", "name"):
            raise UserError(f"--{name.replace('_', '-')} is for a recipe; with runs that exist, leave it out")


def _run_study(options: Any) -> int:
    from sparsesoup.cli.study import run_study_command  # after the flags are checked: it takes seconds

    return run_study_command(options)


COMMANDS = {"compare": Command(parser=study_parser, run=_run_study, parse=read_study_arguments)}
