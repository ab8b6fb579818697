"""Progress of a run: a bar on a terminal, a line at intervals in a pipe, and log.jsonl."""

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import append_text
from sparsesoup.hub.tasks.overview import DataOverview
from sparsesoup.report.escaping import printable_line
from sparsesoup.report.format import format_duration
from sparsesoup.report.run_page import read_log_lines
from sparsesoup.runs.config import RunConfig
from sparsesoup.training.cost import label_name
from sparsesoup.training.observer import Observer
from sparsesoup.training.problem import Problem

PIPE_EVERY = 15.0  # seconds between lines where no bar can be shown


class ProgressLogger(Observer):
    """Show the progress of the current training and log each step."""

    def __init__(self, log: Path | None, console: Console) -> None:
        self.log, self.console, self.stage = log, console, lambda: ""
        self.first: Sequence[str] = ()  # lines to print when the first training or validation begins
        self._label, self._at, self._until, self._last_note = "", 0, 0, time.monotonic()
        self._done, self._all, self._began = 0, 0, time.monotonic()  # training steps: done here, of the whole run
        columns = (TextColumn("{task.description:<30}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                   TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
        self._bars = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task: Any = None
        self._whole = self._bars.add_task("whole run", total=None, note="") if self._bars is not None else None
        self._written, self._digest = 0, hashlib.sha256()  # of the log so far
        self.kept: list[str] = []  # its lines, where there is no file for them
        self.steps_before = 0  # steps in the log of the run that this one resumes

    def log_position(self) -> dict[str, Any]:
        """Return length and digest of the log, for a restart to rewind to."""
        return {"bytes": self._written, "digest": self._digest.hexdigest()}

    def rewind_log(self, at: Any) -> None:
        """Truncate the log to the point from which a restarted run resumes; 0 is its beginning.

        Args:
            at: a value of `log_position`; older versions saved only the length.
        Raises: UserError if the log up to there has changed.
        """
        length, digest = (at["bytes"], at["digest"]) if isinstance(at, Mapping) else (int(at), None)
        if self.log is None or not self.log.exists():
            if length:
                message = "note: log.jsonl is gone; the page of this run will not show the steps up to here"
                self.console.print(Text(message), soft_wrap=True)
            return
        with open(self.log, "rb") as file:
            found = file.read(length)
        self._written, self._digest = len(found), hashlib.sha256(found)
        if self._written < length or digest not in (None, self._digest.hexdigest()):
            raise UserError(
                f"damaged log {self.log}: it does not hold the steps that the saved state was made by; put it back, or "
                f"remove it to continue without them (the page of the run will lack them)"
            )
        os.truncate(self.log, length)
        self.steps_before = found.count(b'"loss": ')

    def steps_left(self, steps: int) -> None:
        """Take the number of training steps that are left of the whole run."""
        self._all = self._done + steps
        if self._bars is not None and self._whole is not None:
            self._bars.update(self._whole, total=self._all)

    def begin(self, label: str, step: int, until: int) -> None:
        """Start a training, or a validation, from `step` to `until`."""
        self.print_overview()
        self._began = self._began if self._done else time.monotonic()  # what was loaded before tells nothing
        self._label, self._at, self._until = ", ".join(filter(None, (label_name(label), self.stage()))), step, until
        if self._bars is not None and until > step:
            self._bars.start()
            self._task = self._bars.add_task(self._label, total=until, completed=step, note="")

    def print_overview(self) -> None:
        """Print the first lines, once."""
        for line in self.first:
            self.console.print(printable_line(line), highlight=False, markup=False, soft_wrap=True)
        self.first = ()

    def step(self, record: Mapping[str, Any]) -> None:
        """Log a finished step."""
        self._at += 1
        note = f"loss {record['loss']:.3f}  sparsity {record['sparsity']:.3f}" if record else ""
        if record:
            self._write_line(json.dumps(dict(record)) + "\n")
        self._done += bool(record)
        if self._bars is not None and self._whole is not None and self._task is not None:
            self._bars.update(self._task, completed=self._at, note=note)
            self._bars.update(self._whole, completed=self._done)
        elif self._bars is None and time.monotonic() - self._last_note >= PIPE_EVERY:
            message = f"{self._label}: step {self._at} of {self._until}  {note}  {self._time_left()}"
            self.console.print(Text(message.rstrip()), soft_wrap=True)
            self._last_note = time.monotonic()

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Log the scores of a validation in the middle of a training."""
        self._write_line(json.dumps(dict(record)) + "\n")

    def _write_line(self, line: str) -> None:
        if self.log is None:
            self.kept.append(line)
            return
        with append_text(self.log) as file:  # reopened for each line, so that a kill loses none
            file.write(line)
        self._written += len(line)
        self._digest.update(line.encode())

    def log_lines(self) -> list[str]:
        """Return the lines of the log."""
        return self.kept if self.log is None else read_log_lines(self.log)

    def _time_left(self) -> str:
        """Return the time that the rest of the run takes at the pace so far; nothing before its first step."""
        if not self._done or self._all <= self._done:
            return ""
        seconds = (time.monotonic() - self._began) * (self._all - self._done) / self._done
        return f"whole run: {self._done} of {self._all} steps, {format_duration(seconds)} left"

    def end(self) -> None:
        """End the training or validation."""
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None

    def close(self) -> None:
        """Restore the terminal."""
        if self._bars is not None:
            self._bars.stop()


def opening_lines(settings: RunConfig, problem: Problem, data: DataOverview, path: Path | None) -> list[str]:
    """Return what a run reads: data, model, T, device, and its directory; with possible mistakes."""
    total = sum(math.prod(target.shape) for target in problem.targets.values())
    rows, sparsity = problem.training.rows_per_step, settings.budget.sparsity
    epochs = problem.steps * min(rows, len(problem.train)) / max(len(problem.train), 1)
    return [
        *(f"data: {line}" for line in data.read),
        f"model: {settings.model_data.model}, {total:,} prunable weights in {len(problem.targets)} matrices",
        f"run: {settings.name}{f' to sparsity {sparsity:g}' if sparsity else ''}, T = {problem.steps:,} steps of "
        f"{rows} rows ({epochs:.3g} epochs), on {problem.accelerator.device}, in {path or 'memory'}",
        *(f"note: {note}" for note in (*data.notes, *problem.notes)),
    ]
