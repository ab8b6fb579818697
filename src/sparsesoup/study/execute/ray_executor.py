"""Executor of a study's jobs on Ray: on this machine, or on the nodes of a cluster with a shared folder."""

import contextlib
import importlib
import math
import os
import time
import uuid
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import make_folder
from sparsesoup.core.process_pool import MAX_ATTEMPTS, REFRESH, EndedTask
from sparsesoup.study.execute.executors import run_and_report
from sparsesoup.study.execute.jobs import JobRunner, TrialJob
from sparsesoup.study.execute.progress import StudyProgress
from sparsesoup.study.execute.ray_actor import TrialActor, can_see, need_seen
from sparsesoup.study.execute.ray_connect import connect_ray, import_ray, last_error_line, ray_address

LISTED = 5.0  # seconds between two lists of the nodes
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
    address: str | None,
    out: Path,
    trial: TrialResources,
    workers: int | None = None,
    attempts: int = MAX_ATTEMPTS,
    runner: Callable[[], Callable[[TrialJob], None]] = JobRunner,
) -> Iterator["RayExecutor"]:
    """Provide an executor on Ray within the block.

    Args:
        address: host:port of a cluster's head, or auto for the one on this machine; default the variable RAY_ADDRESS,
            without which Ray is started here and stopped at the end.
        out: folder of all runs, which all nodes must see, like the working directory.
        workers: trials at a time; default as many as fit on the nodes.
        attempts: number of deaths of its process after which a job has failed.
        runner: makes what runs the jobs in each process.
    """
    address = ray_address(address)
    ray = import_ray(joins=address != "local")
    connect_ray(ray, address, math.ceil((workers or 0) * trial.cpus))
    # Ray prints a page to stdout for each death; our progress display reports it in one line.
    with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
        try:
            made = RayExecutor(ray, trial, workers, attempts, runner)
            made.check_nodes(out)
            yield made
        finally:
            ray.shutdown()


@dataclass
class _Worker:
    """An actor that runs one job after another, with its node and its last job."""

    actor: Any
    node: str = ""
    job: TrialJob | None = None


class RayExecutor:
    """Ray actors that run the jobs; one whose process or node dies is replaced. Made by `ray_executor`."""

    def __init__(
        self, ray: Any, trial: TrialResources, workers: int | None, attempts: int, runner: Callable[[], Any]
    ) -> None:
        self.runner = runner
        self.ray, self.trial, self.workers, self.attempts = ray, trial, workers, attempts
        # Ray's own restarts would go unreported, so they are counted here.
        settings = {"num_cpus": trial.cpus, "num_gpus": trial.gpus, "max_restarts": 0, "max_task_retries": 0}
        self._actor_class = ray.remote(**settings)(TrialActor)
        self._starting: dict[Any, _Worker] = {}  # until Ray has free resources for them
        self._idle: list[_Worker] = []
        self._busy: dict[Any, _Worker] = {}
        self._jobs, self._failed_starts = 0, 0
        self._nodes: list[dict[str, Any]] = []
        self._listed = 0.0

    @property
    def cores(self) -> float:
        """The cores for each job."""
        return self.trial.cpus

    def run(self, jobs: Sequence[TrialJob], board: StudyProgress) -> None:
        """Run all jobs."""
        self._jobs = len(jobs)
        with contextlib.closing(self):
            run_and_report(self, jobs, board, self.attempts)

    def load_key_of(self, job: TrialJob) -> Hashable:
        """Return what an actor loads for a job."""
        return job.load_key

    def idle_places(self) -> list[Hashable]:
        """Return the load keys of idle actors."""
        return [worker.job.load_key for worker in self._idle if worker.job]

    def busy_places(self) -> list[Hashable]:
        """Return the load keys of the running jobs."""
        return [worker.job.load_key for worker in self._busy.values() if worker.job]

    def free_slots(self) -> int:
        """Return the number of jobs that can be started now; start more actors where a trial fits."""
        nodes = self._list_nodes()
        alive = {node["NodeID"] for node in nodes}
        self._idle = [worker for worker in self._idle if worker.node in alive]
        most = min(sum(self.trial.trials_per_node(node["Resources"]) for node in nodes), self._jobs)
        here = len(self._starting) + len(self._idle) + len(self._busy)
        for _ in range(min(most, self.workers or most) - here):
            actor = self._actor_class.remote(self.runner)
            self._starting[actor.node_id.remote()] = _Worker(actor)
        return len(self._idle)

    def begin(self, job: TrialJob) -> None:
        """Start a job on an idle actor, if possible one that has loaded its model and data."""
        self._idle.sort(key=lambda worker: worker.job is not None and worker.job.load_key == job.load_key)
        worker = self._idle.pop()
        worker.job = job
        self._busy[worker.actor.run_job.remote(job, os.getcwd())] = worker

    def wait_for_ended(self) -> list[EndedTask[TrialJob]]:
        """Return the jobs that ended since the last call; wait for one, but at most `REFRESH` seconds."""
        pending = [*self._busy, *self._starting]
        if not pending:  # no node is left; one may join
            time.sleep(REFRESH)
            return []
        ready, _ = self.ray.wait(pending, timeout=REFRESH)  # one at most
        for reference in ready:
            if reference in self._starting:
                self._add_started(reference)
        return [self._collect_result(self._busy.pop(r), r) for r in ready if r in self._busy]

    def close(self) -> None:
        """Kill running jobs; their results so far are on disk. Idle actors stay for the next jobs."""
        for worker in [*self._busy.values(), *self._starting.values()]:
            self.ray.kill(worker.actor)
        self._busy.clear()
        self._starting.clear()

    def check_nodes(self, out: Path) -> None:
        """Raise a UserError unless a trial fits and every node sees the same folder of runs."""
        nodes = self._list_nodes()
        if not any(self.trial.trials_per_node(node["Resources"]) for node in nodes):
            raise UserError(
                f"no node of Ray has the resources for a run: {self.trial.cpus:g} cores and {self.trial.gpus:g} GPUs; "
                f"lower --cpus-per-run or --gpus-per-run, or add a node"
            )
        with _probe_file(out) as probe:
            pending = {self._probe_node(node["NodeID"], probe): node["NodeManagerAddress"] for node in nodes}
            ready, late = self.ray.wait(list(pending), num_returns=len(pending), timeout=SLOWEST)
            for reference in ready:
                self._check_answer(reference, pending[reference], out)
        if late:
            raise UserError(f"node {pending[late[0]]} of Ray gave no answer within {SLOWEST:g} seconds")

    def _probe_node(self, node: str, probe: Path) -> Any:
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        there = strategies.NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        pending = self.ray.remote(num_cpus=0, max_retries=0)(can_see).options(scheduling_strategy=there)
        return pending.remote(str(probe), os.getcwd())

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
        """Return the nodes that are alive, listed at most once every `LISTED` seconds."""
        if time.monotonic() - self._listed >= LISTED or not self._nodes:
            self._nodes = [node for node in self.ray.nodes() if node["Alive"]]
            self._listed = time.monotonic()
        return self._nodes

    def _add_started(self, reference: Any) -> None:
        """Take an actor that has started; raise a UserError if no actor starts."""
        worker = self._starting.pop(reference)
        try:
            worker.node = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:  # its node may have died
            self._failed_starts += 1
            if self._failed_starts >= self.attempts:
                raise UserError(f"on Ray: {last_error_line(error)}") from error
            return
        self._failed_starts = 0
        self._idle.append(worker)

    def _collect_result(self, worker: _Worker, reference: Any) -> EndedTask[TrialJob]:
        errors, job = self.ray.exceptions, worker.job
        assert job is not None
        try:
            self.ray.get(reference)
            self._idle.append(worker)
            need_seen("this machine", job.record_path, job.failure_path)
            return EndedTask(job)
        except UserError as error:
            return EndedTask(job, error=error)
        except errors.RayTaskError as error:  # failing jobs are recorded; this is another error
            cause = (
                error.cause if isinstance(error.cause, UserError) else UserError(f"on Ray: {last_error_line(error)}")
            )
            return EndedTask(job, error=cause)
        except errors.OutOfMemoryError:
            why = "was ended by Ray since memory is short"
        except errors.ActorUnavailableError:  # a node that was lost is listed for some seconds more
            why = "died with its node, or lost the connection to it"
        except errors.RayError as error:
            self._nodes = []
            lost = worker.node not in {node["NodeID"] for node in self._list_nodes()}
            why = "died with its node" if lost else f"died ({type(error).__name__})"
        self.ray.kill(worker.actor)  # where Ray has only lost the connection
        return EndedTask(job, why)


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
