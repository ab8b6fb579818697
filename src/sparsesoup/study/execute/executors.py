"""Who does the jobs of a study: this process, or several beside it."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sparsesoup.core.process_pool import LIVES, Pool, ProcessPool, work_off
from sparsesoup.study.execute.jobs import Job, fail, perform
from sparsesoup.study.execute.progress import Board


class Executor(Protocol):
    """Does jobs; each is done once, whatever dies on the way."""

    def run(self, jobs: Sequence[Job], board: Board) -> None: ...


@dataclass(frozen=True)
class InProcess:
    """One job after the other, here."""

    def run(self, jobs: Sequence[Job], board: Board) -> None:
        """Do all jobs."""
        for job in jobs:
            board.begin(job)
            perform(job, None if board.live else board.console)  # a table has its bars in it
            board.end(job)


@dataclass(frozen=True)
class Processes:
    """Several processes on this machine; one that dies is replaced, and its job goes on in another.

    Args:
        workers: how many at a time.
        lives: a job whose process dies this often has failed.
    """

    workers: int
    lives: int = LIVES

    def run(self, jobs: Sequence[Job], board: Board) -> None:
        """Do all jobs."""
        with contextlib.closing(ProcessPool(self.workers, perform)) as pool:
            follow(pool, jobs, board, self.lives)


def follow(pool: Pool[Job], jobs: Sequence[Job], board: Board, lives: int) -> None:
    """Have the jobs done, and tell the board how they fare."""
    for event in work_off(pool, jobs, lives):
        if event is None:
            board.refresh()
        elif event.kind == "begun":
            board.begin(event.task)
        elif event.kind == "died":
            board.again(event.task, event.why)
        else:
            if event.kind == "lost":
                fail(event.task, f"its process died {lives} times, last it {event.why}; then say --retry-failed")
            board.end(event.task)
