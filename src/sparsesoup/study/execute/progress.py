"""Progress of a study: a live table on a terminal, one line per trial in a pipe."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sparsesoup.core.files import from_json
from sparsesoup.report.format import format_duration, label_name
from sparsesoup.study.execute.jobs import TrialJob

OFTEN = 2  # updates of the table per second
TAIL = 4096  # bytes of a log that contain its last line
ALIKE: tuple[Callable[[TrialJob], Any], ...] = (
    lambda job: (job.trial.row, job.trial.column_of), lambda job: job.trial.row, lambda job: None
)  # jobs that take about as long, the nearest first  # fmt: skip


class StudyProgress(contextlib.AbstractContextManager["StudyProgress"]):
    """Count the jobs of a study and show the running ones.

    Args:
        console: console for output.
        jobs: all jobs of the study.
    """

    def __init__(self, console: Console, jobs: Sequence[TrialJob]) -> None:
        self.console, self.total, self.done, self.failed = console, len(jobs), 0, 0
        self.running: dict[str, tuple[TrialJob, float]] = {}
        self._waiting = {job.trial.trial_key: job for job in jobs}
        self._took: list[tuple[TrialJob, float]] = []
        # Updated by a thread, since jobs in this process leave no time for it.
        table = Live(
            get_renderable=self._render_table, console=console, refresh_per_second=OFTEN, redirect_stdout=False
        )
        self._live = table if console.is_terminal else None

    def __enter__(self) -> "StudyProgress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self.redraw_table()
            self._live.stop()

    @property
    def is_live(self) -> bool:
        """True for a live table; otherwise a line is printed as each job begins and ends."""
        return self._live is not None

    def begin(self, job: TrialJob) -> None:
        """Mark a job as started."""
        self.running[job.trial.trial_key] = (job, time.monotonic())
        self._waiting.pop(job.trial.trial_key, None)
        if self._live is None:
            self._print_line(f"{len(self.running) + self.done + self.failed} of {self.total}: {job.describe_job}")
        self.redraw_table()

    def end(self, job: TrialJob) -> None:
        """Mark a job as finished or failed."""
        began = self.running.pop(job.trial.trial_key)[1]
        if job.failure_path.exists():
            self.failed += 1
            why = from_json(job.failure_path.read_text(encoding="utf-8"))["error"]
            self._print_line(f"failed: {job.trial.describe_trial}: {why}")
        else:
            self.done += 1
            self._took.append((job, time.monotonic() - began))
        self.redraw_table()

    def restart_job(self, job: TrialJob, death: str) -> None:
        """Report that a job's process died and the job is restarted."""
        self.running.pop(job.trial.trial_key)
        self._waiting[job.trial.trial_key] = job
        self._print_line(f"the process of {job.trial.describe_trial} {death}; it goes on in another one")

    def seconds_left(self, workers: int) -> float | None:
        """Return the estimated seconds until the last job is done; None before any is."""
        if not self._took:
            return None
        now, waiting, running = time.monotonic(), [*self._waiting.values()], [*self.running.values()]
        under_way = sum(max(self._expected_seconds(job) - (now - began), 0.0) for job, began in running)
        return (under_way + sum(map(self._expected_seconds, waiting))) / workers

    def _expected_seconds(self, job: TrialJob) -> float:
        """Return the expected seconds of a job: the mean of its row and column, else of its row, else of all."""
        groups = ([took for other, took in [*self._took] if key(other) == key(job)] for key in ALIKE)
        return statistics.fmean(next(group for group in groups if group))

    def redraw_table(self) -> None:
        """Update the table."""
        if self._live is not None:
            self._live.refresh()

    def _print_line(self, line: str) -> None:
        # Text, not str: brackets and colons in names of rows or datasets are not markup.
        self.console.print(Text(line), soft_wrap=True)

    def _render_table(self) -> Group:
        table = Table("under way", "for", "step", "loss", box=None, header_style="dim", padding=(0, 2, 0, 0))
        for job, began in [*self.running.values()]:
            step, loss = last_step(job.run / "log.jsonl") if job.kind == "train" else ("", "")
            table.add_row(Text(job.describe_job), format_duration(time.monotonic() - began), step, loss)
        left = self.seconds_left(max(1, len(self.running)))
        waiting = self.total - self.done - self.failed - len(self.running)
        told = f"{self.done} done, {len(self.running)} running, {waiting} waiting, {self.failed} failed"
        return Group(Text(told + (f", about {format_duration(left)} left" if left is not None else "")), table)


def last_step(log: Path) -> tuple[str, str]:
    """Return (step, loss) from the last line of a log, formatted; empty before there is one."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            line = from_json(file.read().splitlines()[-1])
        return f"{label_name(line['label'])} {line['step']}", f"{line['loss']:.3f}"
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return "", ""
