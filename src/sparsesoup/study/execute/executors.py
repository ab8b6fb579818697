"""Executors of a study's jobs: this process, or several worker processes."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from sparsesoup.core.process_pool import MAX_ATTEMPTS, ProcessPool, TaskPool, run_with_retries
from sparsesoup.core.task_queue import TaskQueue
from sparsesoup.study.execute.jobs import JobRunner, TrialJob, record_failure
from sparsesoup.study.execute.progress import StudyProgress
from sparsesoup.training.device import VARIABLE

VISIBLE = "CUDA_VISIBLE_DEVICES"


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
        """Run all jobs, those with the same model and data one after another."""
        waiting, runner = TaskQueue(jobs, lambda job: job.load_key), JobRunner()
        job = None
        while waiting:
            job = waiting.take_next([job.load_key] if job else [])
            board.begin(job)
            runner(job, None if board.is_live else board.console)  # a live table contains the progress bars
            board.end(job)


@dataclass(frozen=True)
class ProcessExecutor:
    """Worker processes on this machine, each with a GPU; a dead one is replaced, and its job resumes in another."""

    workers: int  # number of processes
    attempts: int = MAX_ATTEMPTS  # number of deaths of its process after which a job has failed

    @property
    def cores(self) -> float:
        """The cores for each job."""
        return (os.cpu_count() or 1) / self.workers

    def run(self, jobs: Sequence[TrialJob], board: StudyProgress) -> None:
        """Run all jobs."""
        gpus = gpu_names(os.environ, torch.cuda.device_count())
        pool = ProcessPool(
            self.workers, JobRunner(), load_key_of=lambda job: job.load_key,
            environment=lambda number: gpu_environment(number, gpus),
        )  # fmt: skip
        with contextlib.closing(pool):
            run_and_report(pool, jobs, board, self.attempts)


def local_executor(workers: int, attempts: int = MAX_ATTEMPTS) -> JobExecutor:
    """Return the executor of this machine: this process for one worker, else worker processes."""
    return ProcessExecutor(workers, attempts) if workers > 1 else InProcess()


def gpu_names(environment: Mapping[str, str], count: int) -> list[str]:
    """Return the GPUs to share among processes: none if a device is set for all of them.

    Args:
        environment: environment variables of this process.
        count: GPUs that it sees.

    >>> gpu_names({}, 2), gpu_names({"CUDA_VISIBLE_DEVICES": "3,5"}, 2), gpu_names({}, 0)
    (['0', '1'], ['3', '5'], [])
    """
    if VARIABLE in environment:
        return []
    named = environment.get(VISIBLE)
    return list(map(str, range(count))) if named is None else [name.strip() for name in named.split(",")][:count]


def gpu_environment(worker: int, gpus: Sequence[str]) -> dict[str, str]:
    """Return the variables that give a process one GPU: process k has GPU k mod n.

    >>> [gpu_environment(k, ["0", "1"])["CUDA_VISIBLE_DEVICES"] for k in range(4)], gpu_environment(0, [])
    (['0', '1', '0', '1'], {})
    """
    return {VISIBLE: gpus[worker % len(gpus)]} if gpus else {}


def run_and_report(pool: TaskPool[TrialJob], jobs: Sequence[TrialJob], board: StudyProgress, attempts: int) -> None:
    """Run the jobs in a pool, and update the progress display."""
    for event in run_with_retries(pool, jobs, attempts):
        if event is None:
            board.redraw_table()
        elif event.kind == "begun":
            board.begin(event.task)
        elif event.kind == "died":
            board.restart_job(event.task, event.why)
        else:
            if event.kind == "lost":
                why = f"its process died {attempts} times, last it {event.why}; then use --retry-failed"
                record_failure(event.task, why)
            board.end(event.task)
