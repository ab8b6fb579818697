"""Expected time of the jobs of a study, kept up to date at the same price whatever their number."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsesoup.study.execute.jobs import TrialJob


@dataclass
class _Times:
    """Finished jobs of a group, and those that wait."""

    seconds: float = 0.0
    count: int = 0
    waiting: int = 0

    @property
    def mean(self) -> float:
        return self.seconds / self.count

    def expected(self) -> float:
        """Return the expected seconds of the waiting jobs, 0 if none of the group is finished."""
        return self.waiting * self.mean if self.count else 0.0


@dataclass
class _Row(_Times):
    """A row of the study; its `waiting` are those in columns where none is finished."""

    known: float = 0.0  # expected seconds of the others
    columns: defaultdict[Any, _Times] = field(default_factory=lambda: defaultdict(_Times))


class TimeForecast:
    """Expected seconds of jobs: the mean of their row and column, else of their row, else of all finished ones.

    Each event changes the sums of one column, one row and the whole, so that no event looks at all jobs.

    Args:
        jobs: the waiting jobs.
    """

    def __init__(self, jobs: Sequence[TrialJob]) -> None:
        self._rows: defaultdict[str, _Row] = defaultdict(_Row)
        self._all = _Times()  # its `waiting` are those in rows where none is finished
        self._known = 0.0
        for job in jobs:
            self.wait(job)

    @property
    def any_done(self) -> bool:
        """True once a job is finished."""
        return self._all.count > 0

    def wait(self, job: TrialJob) -> None:
        """Add a waiting job."""
        self._change(job, waiting=1)

    def begin(self, job: TrialJob) -> None:
        """Remove a job from those that wait."""
        self._change(job, waiting=-1)

    def end(self, job: TrialJob, seconds: float) -> None:
        """Add the time of a finished job."""
        self._change(job, seconds=seconds)

    def expected_seconds(self, job: TrialJob) -> float | None:
        """Return the expected seconds of a job; None before any is finished."""
        row = self._rows[job.trial.row]
        groups = (row.columns[job.trial.column_of], row, self._all)
        return next((group.mean for group in groups if group.count), None)

    def waiting_seconds(self) -> float:
        """Return the expected seconds of all waiting jobs together."""
        return max(self._known + self._all.expected(), 0.0)

    def _change(self, job: TrialJob, waiting: int = 0, seconds: float | None = None) -> None:
        row = self._rows[job.trial.row]
        column = row.columns[job.trial.column_of]
        self._count_row(row, -1)
        self._count_column(row, column, -1)
        column.waiting += waiting
        for group in (column, row, self._all) if seconds is not None else ():
            group.seconds += seconds or 0.0
            group.count += 1
        self._count_column(row, column, 1)
        self._count_row(row, 1)

    def _count_column(self, row: _Row, column: _Times, sign: int) -> None:
        row.known += sign * column.expected()
        row.waiting += 0 if column.count else sign * column.waiting

    def _count_row(self, row: _Row, sign: int) -> None:
        self._known += sign * (row.known + row.expected())
        self._all.waiting += 0 if row.count else sign * row.waiting
