"""The command `sparsesoup compare`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import track

from sparsesoup.cli.study_flags import CHANGES
from sparsesoup.core.errors import UserError
from sparsesoup.core.files import read_table
from sparsesoup.core.process_pool import LIVES
from sparsesoup.report.console import SafeConsole, print_line
from sparsesoup.study.compare import run_study, table_of_runs
from sparsesoup.study.dry_run import forecast_trials, format_forecast
from sparsesoup.study.equal_budget import match_budget
from sparsesoup.study.execute.executors import JobExecutor, local_executor
from sparsesoup.study.execute.ray_executor import TrialResources, ray_executor
from sparsesoup.study.recipe.plan import read_plan


def run_study_command(options: Any) -> int:
    """Run `sparsesoup compare`; return 1 if trials of the study have failed, also in an earlier command, else 0.

    Args:
        options: as returned by `read_study_arguments`.
    """
    console = SafeConsole(stderr=True)
    if options.RUN:
        _print_tables(table_of_runs(options.RUN, options.name or "runs", options.out))
        return 0
    fit = not options.dry_run  # a dry run reports every row that does not fit
    plan = match_budget(read_plan(Path(options.config), _recipe_changes(options), options.name, options.out, fit))
    for said in sorted({cell.settings.train.precision_warning() for cell in plan.cells} - {""}):
        console.print(f"note: {said}", highlight=False, markup=False, soft_wrap=True)
    if options.dry_run:
        found = track(
            forecast_trials(plan, options.out), "estimating", len(plan.cells), console=console, transient=True
        )
        for line in format_forecast(found):
            print_line(line)
        return 0
    with _make_executor(options) as executor:
        folder = run_study(
            plan, options.out, console, executor, options.threads, options.retry_failed, options.workers_per_run
        )
    _print_tables(folder)
    return int(bool(read_table(folder / "study.json")["failed"]))


def _recipe_changes(options: Any) -> dict[str, Any]:
    found = {key: getattr(options, key) for key in CHANGES}
    if found["steps"] is not None and found["epochs"] is not None:
        raise UserError("--steps and --epochs are mutually exclusive; give one of them")
    return found


@contextlib.contextmanager
def _make_executor(options: Any) -> Iterator[JobExecutor]:
    """Provide the executor chosen by the flags."""
    lives = LIVES if options.retries is None else options.retries + 1
    if options.executor == "local":
        yield local_executor(options.workers or 1, lives)
        return
    given = {"cpus": options.cpus_per_run, "gpus": options.gpus_per_run}
    room = TrialResources(**{name: value for name, value in given.items() if value is not None})
    with ray_executor(options.address, options.out, room, options.workers, lives) as made:
        yield made


def _print_tables(folder: Path) -> None:
    for line in (folder / "study.md").read_text(encoding="utf-8").split("\n"):
        print_line(line)
    print_line(f"page    {folder / 'study.html'}")
    print_line(f"tables  {folder / 'study.md'}, .tex, .csv, .parquet, .json")
