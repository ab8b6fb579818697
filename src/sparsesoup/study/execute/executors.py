"""Who does the jobs of a study: this process, or several beside it."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sparsesoup.core.process_pool import LIVES, ProcessPool, TaskPool, run_with_retries
from sparsesoup.study.execute.jobs import TrialJob, record_failure, run_job
from sparsesoup.study.execute.progress import StudyProgress


class JobExecutor(Protocol):
    """Does jobs; each is done once, whatever dies on the way."""

    def run(self, jobs: Sequence[TrialJob], board: StudyProgress) -> None: ...


@dataclass(frozen=True)
class InProcess:
    """One job after the other, here."""

    def run(self, jobs: Sequence[TrialJob], board: StudyProgress) -> None:
        """Do all jobs."""
        for job in jobs:
            board.begin(job)
            run_job(job, None if board.is_live else board.console)  # a table has its bars in it
            board.end(job)


@dataclass(frozen=True)
class ProcessExecutor:
    """Several processes on this machine; one that dies is replaced, and its job goes on in another.

    Args:
        workers: how many at a time.
        lives: a job whose process dies this often has failed.
    """

    workers: int
    lives: int = LIVES

    def run(self, jobs: Sequence[TrialJob], board: StudyProgress) -> None:
        """Do all jobs."""
        with contextlib.closing(ProcessPool(self.workers, run_job)) as pool:
            run_and_report(pool, jobs, board, self.lives)


def run_and_report(pool: TaskPool[TrialJob], jobs: Sequence[TrialJob], board: StudyProgress, lives: int) -> None:
    """Have the jobs done, and tell the board how they fare."""
    for event in run_with_retries(pool, jobs, lives):
        if event is None:
            board.redraw_table()
        elif event.kind == "begun":
            board.begin(event.task)
        elif event.kind == "died":
            board.restart_job(event.task, event.why)
        else:
            if event.kind == "lost":
                record_failure(
                    event.task, f"its process died {lives} times, last it {event.why}; then say --retry-failed"
                )
            board.end(event.task)
