"""`sparsesoup compare`, as the command line has it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import track

from sparsesoup.cli.study_flags import CHANGES
from sparsesoup.core.errors import UserError
from sparsesoup.core.files import read_table
from sparsesoup.core.process_pool import LIVES
from sparsesoup.report.console import Terminal, say
from sparsesoup.study.compare import compare, table_of_runs
from sparsesoup.study.dry_run import forecasts, told
from sparsesoup.study.equal_budget import at_equal_cost
from sparsesoup.study.execute.executors import Executor, InProcess, Processes
from sparsesoup.study.execute.ray_executor import Room, cluster
from sparsesoup.study.recipe.plan import read_plan


def main(options: Any) -> int:
    """What `sparsesoup compare` does; 1 if cells of the study have failed, also by an earlier command, else 0.

    Args:
        options: as `flags.read` gives them.
    """
    console = Terminal(stderr=True)
    if options.RUN:
        _show(table_of_runs(options.RUN, options.name or "runs", options.out))
        return 0
    fit = not options.dry_run  # which tells of every row that does not
    plan = at_equal_cost(read_plan(Path(options.config), _changes(options), options.name, options.out, fit))
    for said in sorted({cell.settings.train.doubt() for cell in plan.cells} - {""}):
        console.print(f"note: {said}", highlight=False, markup=False, soft_wrap=True)
    if options.dry_run:
        found = track(forecasts(plan, options.out), "estimating", len(plan.cells), console=console, transient=True)
        for line in told(found):
            say(line)
        return 0
    with _executor(options) as (executor, threads):
        folder = compare(plan, options.out, console, executor, threads, options.retry_failed, options.workers_per_cell)
    _show(folder)
    return int(bool(read_table(folder / "study.json")["failed"]))


def _changes(options: Any) -> dict[str, Any]:
    found = {key: getattr(options, key) for key in CHANGES}
    if found["steps"] is not None and found["epochs"] is not None:
        raise UserError("--steps and --epochs both say how long; give one of them")
    return found


@contextlib.contextmanager
def _executor(options: Any) -> Iterator[tuple[Executor, int | None]]:
    """The executor that the flags ask for, and the threads of each cell."""
    ray = options.executor == "ray"
    lives = LIVES if options.retries is None else options.retries + 1
    workers = options.workers or 1
    if ray:
        given = {"cpus": options.cpus_per_cell, "gpus": options.gpus_per_cell}
        room = Room(**{name: value for name, value in given.items() if value is not None})
        with cluster(options.address, options.out, room, options.workers, lives) as made:
            yield made, options.threads or max(1, int(room.cpus / options.workers_per_cell))
    elif workers == 1:
        yield InProcess(), options.threads
    else:
        share = (os.cpu_count() or 1) // (workers * options.workers_per_cell)
        yield Processes(workers, lives), options.threads or max(1, share)


def _show(folder: Path) -> None:
    for line in (folder / "study.md").read_text(encoding="utf-8").split("\n"):
        say(line)
    say(f"page    {folder / 'study.html'}")
    say(f"tables  {folder / 'study.md'}, .tex, .csv, .parquet, .json")
