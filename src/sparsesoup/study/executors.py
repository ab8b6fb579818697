"""Who does the jobs of a study: this process, or several beside it."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Protocol, cast

from sparsesoup.study.board import Board
from sparsesoup.study.work import Job, fail, perform

LIVES = 3  # a job whose process dies this often has failed
REFRESH = 1.0  # seconds between two looks at the processes under way


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
            perform(job, board.console)
            board.end(job)


@dataclass(frozen=True)
class Processes:
    """Several processes on this machine; one that dies is replaced, and its job goes on in another.

    Args:
        workers: how many at a time.
    """

    workers: int

    def run(self, jobs: Sequence[Job], board: Board) -> None:
        """Do all jobs."""
        waiting, lives, busy, idle = deque(jobs), Counter[str](), list[_Worker](), list[_Worker]()
        try:
            while waiting or busy:
                while waiting and len(busy) < self.workers:
                    worker = idle.pop() if idle else _Worker()
                    worker.give(waiting.popleft())
                    busy.append(worker)
                    board.begin(worker.job)
                for worker in _ready(busy):
                    busy.remove(worker)
                    if worker.finished():
                        idle.append(worker)
                        board.end(worker.job)
                    else:
                        lives[worker.job.cell.key] += 1
                        _bury(worker, lives[worker.job.cell.key] == LIVES, waiting, board)
                board.refresh()
        finally:
            for worker in busy:
                worker.process.kill()  # what it has done is on disk
            for worker in idle:
                worker.dismiss()


class _Worker:
    """A process that does one job after the other, forked from a server that has imported what they need."""

    job: Job

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sparsesoup.study.work"])
        self.connection, theirs = context.Pipe()
        self.process: ForkServerProcess = context.Process(target=_work, args=(theirs,))
        self.process.start()
        theirs.close()  # or its end would be no end of the pipe

    def give(self, job: Job) -> None:
        self.job = job
        self.connection.send(job)

    def dismiss(self) -> None:
        self.connection.close()
        self.process.join()

    def finished(self) -> bool:
        """Whether the job is done; if not, the process has died."""
        try:
            self.connection.recv()
            return True
        except (EOFError, OSError):
            self.process.join()
            return False


def _ready(busy: Sequence[_Worker]) -> list[_Worker]:
    spoken = wait([worker.connection for worker in busy], timeout=REFRESH)
    return [worker for worker in busy if worker.connection in spoken]


def _bury(worker: _Worker, last: bool, waiting: deque[Job], board: Board) -> None:
    """Give the job of a dead process to another one, or up."""
    code = worker.process.exitcode
    if last:
        hint = "memory may be short, lower --workers" if code == -signal.SIGKILL else "a library may have crashed"
        fail(worker.job, f"its process ended with {code}, {LIVES} times ({hint}); then say --retry-failed")
        board.end(worker.job)
    else:
        board.again(worker.job, code)
        waiting.appendleft(worker.job)


def _work(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the first process ends the others
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError):  # dismissed
        while True:
            perform(cast(Job, connection.recv()))
            connection.send(True)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)
