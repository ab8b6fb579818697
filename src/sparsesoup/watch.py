"""Who watches a run: a progress bar on a terminal, a line now and then in a pipe, and log.jsonl."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparsesoup.escaping import printable

PIPE_EVERY = 15.0  # seconds between lines where no bar can be drawn


class Watch:
    """Shows the training that is under way and writes a line of the log for each step."""

    def __init__(self, log: Path | None, console: Console) -> None:
        self.log, self.console, self.piece = log, console, lambda: ""
        self.first: Sequence[str] = ()  # lines to say when the first training or validation begins
        self._label, self._at, self._until, self._said = "", 0, 0, time.monotonic()
        columns = (TextColumn("{task.description:<22}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                   TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
        self._bars = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task: Any = None

    def position(self) -> int:
        """Length of the log, for a restart to return to."""
        return self.log.stat().st_size if self.log is not None and self.log.exists() else 0

    def rewind(self, at: int) -> None:
        """Cut the log to what the restarted run goes on from."""
        if self.log is not None and self.log.exists():
            os.truncate(self.log, at)

    def begin(self, label: str, step: int, until: int) -> None:
        """A training, or a validation, from `step` to `until` begins."""
        self.announce()
        self._label, self._at, self._until = f"{self.piece() or ''} {label}".strip(), step, until
        if self._bars is not None and until > step:
            self._bars.start()
            self._task = self._bars.add_task(self._label, total=until, completed=step, note="")

    def announce(self) -> None:
        """Say the first lines, once."""
        for line in self.first:
            self.console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
        self.first = ()

    def step(self, record: Mapping[str, Any]) -> None:
        """One step is done."""
        self._at += 1
        note = f"loss {record['loss']:.3f}  sparsity {record['sparsity']:.3f}" if record else ""
        if record and self.log is not None:
            with open(self.log, "a", encoding="utf-8") as file:  # so that a kill loses no line
                file.write(json.dumps(dict(record)) + "\n")
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self._at, note=note)
        elif self._bars is None and time.monotonic() - self._said >= PIPE_EVERY:
            self.console.print(f"{self._label}: step {self._at} of {self._until}  {note}", highlight=False)
            self._said = time.monotonic()

    def end(self) -> None:
        """The training or validation is over."""
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._bars is not None:
            self._bars.stop()
