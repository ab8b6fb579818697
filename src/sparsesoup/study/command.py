"""`sparsesoup compare`, as the command line has it."""

import argparse
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsesoup.errors import UserError
from sparsesoup.parser import OneLine
from sparsesoup.study.compare import compare, table_of_runs
from sparsesoup.study.executors import Executor, InProcess, Processes
from sparsesoup.study.plan import read_plan

ABOUT = """Many runs as one resumable study: models, datasets, methods, sparsities and seeds; then a table and a page.

A recipe is YAML:

  models: minilm                 # one or a list; so datasets, sparsities and seeds
  datasets: [glue/cola, glue/sst2]
  sparsities: [0.5, 0.9]
  seeds: [0, 1, 2]
  steps: 1440                    # T of every run; or epochs
  train: {precision: bf16}       # as --train.FIELD of prune
  methods:                       # rows of the table: a list of names, or a table with settings of each
    dense:
    isp:
    slow-imp: {name: imp, method: {cut: 0.1}}
    dense-2T: {name: dense, times: 2}

The same command again goes on where it was, whatever was killed. The test split is opened once a cell, when all
are drawn.
"""


def parser() -> argparse.ArgumentParser:
    """The parser of `compare`."""
    made = OneLine(
        prog="sparsesoup compare", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    made.add_argument("RUN", type=Path, nargs="*", help="runs that exist, for a table without a recipe")
    made.add_argument("--config", help="recipe (YAML)")
    made.add_argument("--out", type=Path, default=Path("runs"), help="folder of all runs; studies are in it")
    made.add_argument("--name", help="of the study; default the recipe's file name, for given runs `runs`")
    made.add_argument("--models", nargs="+", metavar="MODEL", help="instead of the recipe's")
    made.add_argument("--datasets", nargs="+", metavar="DATASET", help="instead of the recipe's")
    made.add_argument("--sparsities", nargs="+", type=float, metavar="S", help="instead of the recipe's")
    made.add_argument("--seeds", nargs="+", type=int, metavar="N", help="instead of the recipe's")
    made.add_argument("--steps", type=int, help="instead of the recipe's")
    made.add_argument("--epochs", type=float, help="instead of the recipe's")
    made.add_argument("--data-root", help="folder of named datasets; default the variable SPARSESOUP_DATA")
    made.add_argument("--workers", type=int, default=1, help="processes at a time; default 1, in this one")
    made.add_argument("--threads", type=int, help="of torch in each job; default the cores shared among the workers")
    made.add_argument("--retry-failed", action="store_true", help="do cells again that failed before")
    made.add_argument("--dry-run", action="store_true", help="print the cells, and draw none")
    return made


def main(arguments: list[str]) -> None:
    """What `sparsesoup compare` does."""
    options, console = parser().parse_args(arguments), Console(stderr=True)
    if bool(options.RUN) == bool(options.config):
        raise UserError("compare needs either --config recipe.yaml or runs that exist; see `sparsesoup compare --help`")
    if options.RUN:
        _show(table_of_runs(options.RUN, options.name or "runs", options.out))
        return
    plan = read_plan(Path(options.config), _changes(options), options.name)
    if options.dry_run:
        for cell in plan.cells:
            print(f"{cell.path}  {cell.name}")
        print(f"{len(plan.cells)} cells")
        return
    executor, threads = _executor(options)
    _show(compare(plan, options.out, console, executor, threads, options.retry_failed))


def _changes(options: Any) -> dict[str, Any]:
    keys = ("models", "datasets", "sparsities", "seeds", "steps", "epochs", "data_root")
    found = {key: getattr(options, key) for key in keys}
    if found["steps"] is not None and found["epochs"] is not None:
        raise UserError("--steps and --epochs both say how long; give one of them")
    return found


def _executor(options: Any) -> tuple[Executor, int | None]:
    if options.workers < 1 or (options.threads is not None and options.threads < 1):
        raise UserError(f"workers and threads are at least 1, got {options.workers} and {options.threads}")
    if options.workers == 1:
        return InProcess(), options.threads
    return Processes(options.workers), options.threads or max(1, (os.cpu_count() or 1) // options.workers)


def _show(folder: Path) -> None:
    print((folder / "study.md").read_text(encoding="utf-8"))
    print(f"page    {folder / 'study.html'}")
    print(f"tables  {folder / 'study.md'}, .tex, .csv, .parquet, .json")
