"""Executors of a study's jobs: this process, or several worker processes."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sparsesoup.core.process_pool import LIVES, ProcessPool, TaskPool, run_with_retries
from sparsesoup.study.execute.jobs import TrialJob, record_failure, run_job
from sparsesoup.study.execute.progress import StudyProgress


class JobExecutor(Protocol):
    """Runs jobs, each exactly once, even if processes die."""

    @property
    def cores(self) -> float | None:
        """The cores for each job; None if a job has all of them."""
        ...

    def run(self, jobs: Sequence[TrialJob], board: StudyProgress) -> None: ...


@dataclass(frozen=True)
class InProcess:
    """Run one job after another in this process."""

    cores: float | None = None

    def run(self, jobs: Sequence[TrialJob], board: StudyProgress) -> None:
        """Run all jobs."""
        for job in jobs:
            board.begin(job)
            run_job(job, None if board.is_live else board.console)  # a live table contains the progress bars
            board.end(job)


@dataclass(frozen=True)
class ProcessExecutor:
    """Worker processes on this machine; a dead one is replaced, and its job resumes in another."""

    workers: int  # number of processes
    lives: int = LIVES  # number of deaths of its process after which a job has failed

    @property
    def cores(self) -> float:
        """The cores for each job."""
        return (os.cpu_count() or 1) / self.workers

    def run(self, jobs: Sequence[TrialJob], board: StudyProgress) -> None:
        """Run all jobs."""
        with contextlib.closing(ProcessPool(self.workers, run_job)) as pool:
            run_and_report(pool, jobs, board, self.lives)


def local_executor(workers: int, lives: int = LIVES) -> JobExecutor:
    """Return the executor of this machine: this process for one worker, else worker processes."""
    return ProcessExecutor(workers, lives) if workers > 1 else InProcess()


def run_and_report(pool: TaskPool[TrialJob], jobs: Sequence[TrialJob], board: StudyProgress, lives: int) -> None:
    """Run the jobs in a pool, and update the progress display."""
    for event in run_with_retries(pool, jobs, lives):
        if event is None:
            board.redraw_table()
        elif event.kind == "begun":
            board.begin(event.task)
        elif event.kind == "died":
            board.restart_job(event.task, event.why)
        else:
            if event.kind == "lost":
                why = f"its process died {lives} times, last it {event.why}; then say --retry-failed"
                record_failure(event.task, why)
            board.end(event.task)
