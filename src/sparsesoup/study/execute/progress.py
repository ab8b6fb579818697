"""Progress of a study: a live table on a terminal, one line per trial in a pipe."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sparsesoup.core.files import from_json
from sparsesoup.report.format import format_duration
from sparsesoup.study.execute.forecast import TimeForecast
from sparsesoup.study.execute.jobs import TrialJob
from sparsesoup.training.cost import label_name

OFTEN = 2  # updates of the table per second
TAIL = 4096  # bytes of a log that contain its last line


class StudyProgress(contextlib.AbstractContextManager["StudyProgress"]):
    """Count the jobs of a study and show the running ones.

    Args:
        console: console for output.
        jobs: all jobs of the study.
        ended: called with each job after it.
    """

    def __init__(
        self, console: Console, jobs: Sequence[TrialJob], ended: Callable[[TrialJob], None] = lambda job: None
    ) -> None:
        self._ended = ended
        self.console, self.total, self.done, self.failed = console, len(jobs), 0, 0
        self.running: dict[str, tuple[TrialJob, float]] = {}
        self._forecast, self._lock = TimeForecast(jobs), threading.Lock()  # the table is drawn in a thread
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
        with self._lock:
            self.running[job.trial.trial_key] = (job, time.monotonic())
            self._forecast.begin(job)
        if self._live is None:
            self._print_line(f"{len(self.running) + self.done + self.failed} of {self.total}: {job.describe_job}")
        self.redraw_table()

    def end(self, job: TrialJob) -> None:
        """Mark a job as finished or failed."""
        with self._lock:
            began = self.running.pop(job.trial.trial_key)[1]
        if job.failure_path.exists():
            self.failed += 1
            why = from_json(job.failure_path.read_text(encoding="utf-8"))["error"]
            self._print_line(f"failed: {job.trial.describe_trial}: {why}")
        else:
            self.done += 1
            with self._lock:
                self._forecast.end(job, time.monotonic() - began)
        self.redraw_table()
        self._ended(job)

    def restart_job(self, job: TrialJob, death: str) -> None:
        """Report that a job's process died and the job is restarted."""
        with self._lock:
            self.running.pop(job.trial.trial_key)
            self._forecast.wait(job)
        self._print_line(f"the process of {job.trial.describe_trial} {death}; it is resumed in another one")

    def seconds_left(self, workers: int) -> float | None:
        """Return the estimated seconds until the last job is done; None before any is."""
        now = time.monotonic()
        with self._lock:
            running = [(self._forecast.expected_seconds(job), began) for job, began in self.running.values()]
            waiting = self._forecast.waiting_seconds()
        if not self._forecast.any_done:
            return None
        under_way = sum(max(expected - (now - began), 0.0) for expected, began in running if expected is not None)
        return (under_way + waiting) / workers

    def redraw_table(self) -> None:
        """Update the table."""
        if self._live is not None:
            self._live.refresh()

    def _print_line(self, line: str) -> None:
        # Text, not str: brackets and colons in names of rows or datasets are not markup.
        self.console.print(Text(line), soft_wrap=True)

    def _render_table(self) -> Group:
        table = Table("under way", "for", "step", "loss", box=None, header_style="dim", padding=(0, 2, 0, 0))
        with self._lock:
            running = [*self.running.values()]
        for job, began in running:
            step, loss = last_step(job.run / "log.jsonl")
            table.add_row(Text(job.describe_job), format_duration(time.monotonic() - began), step, loss)
        left = self.seconds_left(max(1, len(running)))
        waiting = self.total - self.done - self.failed - len(running)
        counts = f"{self.done} done, {len(running)} running, {waiting} waiting, {self.failed} failed"
        return Group(Text(counts + (f", about {format_duration(left)} left" if left is not None else "")), table)


def last_step(log: Path) -> tuple[str, str]:
    """Return (step, loss) of the last step in a log, formatted; empty before there is one."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().splitlines()
        line = from_json(next(text for text in reversed(lines) if b'"loss": ' in text))
        return f"{label_name(line['label'])} {line['step']}", f"{line['loss']:.3f}"
    except (OSError, ValueError, StopIteration, KeyError, TypeError):
        return "", ""
