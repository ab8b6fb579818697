"""Executor of a study's jobs on Ray: on this machine, or on the nodes of a cluster with a shared folder."""

import contextlib
import importlib
import math
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import make_folder
from sparsesoup.core.process_pool import LIVES, REFRESH, EndedTask
from sparsesoup.study.execute.executors import run_and_report
from sparsesoup.study.execute.jobs import TrialJob, run_job
from sparsesoup.study.execute.progress import StudyProgress
from sparsesoup.study.execute.ray_connect import connect_ray, import_ray, last_error_line, ray_address

LATE = 70.0  # seconds; a network file system may cache for a minute that a file does not exist
SLOWEST = 180.0  # seconds for a node to start a process that responds


@dataclass(frozen=True, kw_only=True)
class TrialResources:
    """Resources reserved by Ray for each trial.

    Args:
        cpus: cores.
        gpus: GPUs; a fraction lets several trials share one.
    """

    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.cpus < 1e6 or not 0 <= self.gpus < 1e6 or (self.gpus > 1 and self.gpus % 1):
            raise UserError(
                f"a run has more than 0 cores and 0, a share of 1, or a whole number of GPUs, got {self.cpus:g} and "
                f"{self.gpus:g}"
            )

    def trials_per_node(self, resources: dict[str, float]) -> int:
        """Return the number of trials that fit on a node with these resources."""
        by_cpu = int(resources.get("CPU", 0) / self.cpus + 1e-9)
        whole = int(resources.get("GPU", 0))
        by_gpu = whole * int(1 / self.gpus + 1e-9) if 0 < self.gpus <= 1 else int(whole / (self.gpus or 1))
        return min(by_cpu, by_gpu) if self.gpus else by_cpu


@contextlib.contextmanager
def ray_executor(
    address: str | None, out: Path, trial: TrialResources, workers: int | None = None, lives: int = LIVES
) -> Iterator["RayExecutor"]:
    """Provide an executor on Ray within the block.

    Args:
        address: host:port of a cluster's head, or auto for the one on this machine; default the variable RAY_ADDRESS,
            without which Ray is started here and stopped at the end.
        out: folder of all runs, which all nodes must see, like the working directory.
        workers: trials at a time; default as many as fit on the nodes.
    """
    address = ray_address(address)
    ray = import_ray(joins=address != "local")
    connect_ray(ray, address, math.ceil((workers or 0) * trial.cpus))
    # Ray prints a page to stdout for each death; our progress display reports it in one line.
    with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
        try:
            made = RayExecutor(ray, trial, workers, lives)
            made.check_nodes(out)
            yield made
        finally:
            ray.shutdown()


class RayExecutor:
    """One Ray task per job, restarted elsewhere if its process or node dies. Made by `ray_executor`."""

    def __init__(self, ray: Any, trial: TrialResources, workers: int | None, lives: int) -> None:
        self.ray, self.trial, self.workers, self.lives = ray, trial, workers, lives
        # Ray's own retries would go unreported, so retries are counted here.
        settings = {"num_cpus": trial.cpus, "num_gpus": trial.gpus, "max_retries": 0}
        self._task = ray.remote(**settings)(_run_ray_task)
        self._busy: dict[Any, TrialJob] = {}

    @property
    def cores(self) -> float:
        """The cores for each job."""
        return self.trial.cpus

    def run(self, jobs: Sequence[TrialJob], board: StudyProgress) -> None:
        """Run all jobs."""
        with contextlib.closing(self):
            run_and_report(self, jobs, board, self.lives)

    def free_slots(self) -> int:
        """Return the number of jobs that can be started now."""
        most = self.workers or sum(self.trial.trials_per_node(node["Resources"]) for node in self._list_nodes())
        return most - len(self._busy)

    def begin(self, job: TrialJob) -> None:
        """Start a job on any node with free resources."""
        self._busy[self._task.remote(job, os.getcwd())] = job

    def wait_for_ended(self) -> list[EndedTask[TrialJob]]:
        """Return the jobs that ended since the last call; wait for one, but at most `REFRESH` seconds."""
        if not self._busy:  # no node is left; one may join
            time.sleep(REFRESH)
            return []
        ready, _ = self.ray.wait(list(self._busy), timeout=REFRESH)
        return [self._collect_result(self._busy.pop(reference), reference) for reference in ready]

    def close(self) -> None:
        """Kill running jobs; their results so far are on disk."""
        for reference in self._busy:
            self.ray.cancel(reference, force=True)
        self._busy.clear()

    def check_nodes(self, out: Path) -> None:
        """Raise a UserError unless a trial fits and every node sees the same folder of runs."""
        nodes = self._list_nodes()
        if not any(self.trial.trials_per_node(node["Resources"]) for node in nodes):
            raise UserError(
                f"no node of Ray has room for a run with {self.trial.cpus:g} cores and {self.trial.gpus:g} GPUs; lower "
                f"--cpus-per-run or --gpus-per-run, or add a node"
            )
        with _probe_file(out) as probe:
            asked = {self._probe_node(node["NodeID"], probe): node["NodeManagerAddress"] for node in nodes}
            ready, late = self.ray.wait(list(asked), num_returns=len(asked), timeout=SLOWEST)
            for reference in ready:
                self._check_answer(reference, asked[reference], out)
        if late:
            raise UserError(f"node {asked[late[0]]} of Ray gave no answer within {SLOWEST:g} seconds")

    def _probe_node(self, node: str, probe: Path) -> Any:
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        there = strategies.NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        asked = self.ray.remote(num_cpus=0, max_retries=0)(_can_see).options(scheduling_strategy=there)
        return asked.remote(str(probe), os.getcwd())

    def _check_answer(self, reference: Any, node: str, out: Path) -> None:
        try:
            seen = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            raise UserError(f"node {node} of Ray cannot do jobs of sparsesoup ({last_error_line(error)})") from error
        if not seen:
            raise UserError(
                f"node {node} of Ray does not see {out.resolve()} and the working directory {os.getcwd()} as this "
                f"machine does; nodes must share both: mount them there, or work where they are shared"
            )

    def _list_nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def _collect_result(self, job: TrialJob, reference: Any) -> EndedTask[TrialJob]:
        errors = self.ray.exceptions
        try:
            self.ray.get(reference)
            _need_seen("this machine", job.record_path, job.failure_path)
            return EndedTask(job)
        except UserError as error:
            return EndedTask(job, error=error)
        except errors.RayTaskError as error:  # failing jobs are recorded; this is another error
            cause = (
                error.cause if isinstance(error.cause, UserError) else UserError(f"on Ray: {last_error_line(error)}")
            )
            return EndedTask(job, error=cause)
        except errors.OutOfMemoryError:
            return EndedTask(job, "was ended by Ray since memory is short")
        except errors.NodeDiedError:
            return EndedTask(job, "died with its node")
        except errors.RayError as error:
            return EndedTask(job, f"died ({type(error).__name__})")


def _run_ray_task(job: TrialJob, directory: str) -> None:
    """Run a task: paths of models and data may be relative to the driver's working directory."""
    with contextlib.suppress(OSError):
        os.chdir(directory)
    _need_seen(f"node {socket.gethostname()} of Ray", job.folder / "study.yaml")  # it may have joined late
    run_job(job)


def _can_see(probe: str, directory: str) -> bool:
    try:
        os.chdir(directory)
    except OSError:
        return False
    return _wait_until_seen(5.0, Path(probe))


def _wait_until_seen(patience: float, *paths: Path) -> bool:
    """Return True as soon as one of these paths exists; False after `patience` seconds."""
    last = time.monotonic() + patience
    while not (found := any(path.exists() for path in paths)) and time.monotonic() < last:
        time.sleep(0.2)
    return found


def _need_seen(who: str, *paths: Path) -> None:
    if not _wait_until_seen(LATE, *paths):
        raise UserError(f"{who} does not see {paths[0].resolve()}, which another one wrote; all must share that folder")


@contextlib.contextmanager
def _probe_file(out: Path) -> Iterator[Path]:
    """Create a uniquely named file in the folder of runs."""
    fresh = [folder for folder in (out, *out.parents) if not folder.exists()]
    make_folder(out)
    probe = out.resolve() / f".shared-{uuid.uuid4().hex}"
    try:
        probe.touch()
        yield probe
    finally:
        probe.unlink(missing_ok=True)
        for folder in fresh:
            folder.rmdir()
