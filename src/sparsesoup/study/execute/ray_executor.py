"""Who does the jobs of a study on Ray: tasks on this machine, or on the nodes of a cluster that share its folder."""

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
from sparsesoup.core.process_pool import LIVES, REFRESH, Ended
from sparsesoup.study.execute.executors import follow
from sparsesoup.study.execute.jobs import Job, perform
from sparsesoup.study.execute.progress import Board
from sparsesoup.study.execute.ray_connect import asked, brief, connect, imported

LATE = 70.0  # seconds; a network's file system may remember for a minute that there was no such file
SLOWEST = 180.0  # seconds in which a node must have started a process that answers


@dataclass(frozen=True, kw_only=True)
class Room:
    """What Ray keeps free for each cell.

    Args:
        cpus: cores.
        gpus: graphics cards; a share of one lets several cells have it together.
    """

    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.cpus < 1e6 or not 0 <= self.gpus < 1e6 or (self.gpus > 1 and self.gpus % 1):
            raise UserError(
                f"a cell has more than 0 cores and 0, a share of 1, or a whole number of GPUs, got {self.cpus:g} and "
                f"{self.gpus:g}"
            )

    def fits(self, resources: dict[str, float]) -> int:
        """How many cells a node with these resources holds at a time."""
        by_cpu = int(resources.get("CPU", 0) / self.cpus + 1e-9)
        whole = int(resources.get("GPU", 0))
        by_gpu = whole * int(1 / self.gpus + 1e-9) if 0 < self.gpus <= 1 else int(whole / (self.gpus or 1))
        return min(by_cpu, by_gpu) if self.gpus else by_cpu


@contextlib.contextmanager
def cluster(
    address: str | None, out: Path, cell: Room, workers: int | None = None, lives: int = LIVES
) -> Iterator["Cluster"]:
    """The executor on Ray, for the time of the block.

    Args:
        address: host:port of a cluster's head, or auto for the one on this machine; default the variable RAY_ADDRESS,
            and where there is none Ray is started here and stopped in the end.
        out: the folder of all runs, which all nodes must see, and so must be the working directory.
        cell: what each cell needs.
        workers: cells at a time; default as many as the nodes have room for.
        lives: a cell whose process dies this often has failed.
    Raises: UserError if Ray is not installed, does not answer, has no room for a cell, or a node sees another folder.
    """
    address = asked(address)
    ray = imported(joins=address != "local")
    connect(ray, address, math.ceil((workers or 0) * cell.cpus))
    # Ray prints what dies to stdout, a page each time; the board tells it in a line.
    with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
        try:
            made = Cluster(ray, cell, workers, lives)
            made.check(out)
            yield made
        finally:
            ray.shutdown()


class Cluster:
    """Ray tasks, one a job; one whose process or node dies is begun again elsewhere. Made by `cluster`."""

    def __init__(self, ray: Any, cell: Room, workers: int | None, lives: int) -> None:
        self.ray, self.cell, self.workers, self.lives = ray, cell, workers, lives
        # Ray would try again by itself, but tell nobody; we count.
        settings = {"num_cpus": cell.cpus, "num_gpus": cell.gpus, "max_retries": 0}
        self._task = ray.remote(**settings)(_perform)
        self._busy: dict[Any, Job] = {}

    def run(self, jobs: Sequence[Job], board: Board) -> None:
        """Do all jobs."""
        with contextlib.closing(self):
            follow(self, jobs, board, self.lives)

    def room(self) -> int:
        """How many more jobs can be begun now."""
        most = self.workers or sum(self.cell.fits(node["Resources"]) for node in self._nodes())
        return most - len(self._busy)

    def begin(self, job: Job) -> None:
        """Have a job done on any node with room."""
        self._busy[self._task.remote(job, os.getcwd())] = job

    def ended(self) -> list[Ended[Job]]:
        """What has ended since the last call; waits for something, but no longer than `REFRESH`."""
        if not self._busy:  # no node is left; one may come
            time.sleep(REFRESH)
            return []
        ready, _ = self.ray.wait(list(self._busy), timeout=REFRESH)
        return [self._ended(self._busy.pop(reference), reference) for reference in ready]

    def close(self) -> None:
        """End what is under way; what it has done is on disk."""
        for reference in self._busy:
            self.ray.cancel(reference, force=True)
        self._busy.clear()

    def check(self, out: Path) -> None:
        """Raise a UserError unless there is room for a cell, and every node sees the folder of runs as we do."""
        nodes = self._nodes()
        if not any(self.cell.fits(node["Resources"]) for node in nodes):
            raise UserError(
                f"no node of Ray has room for a cell with {self.cell.cpus:g} cores and {self.cell.gpus:g} GPUs; lower "
                f"--cpus-per-cell or --gpus-per-cell, or add a node"
            )
        with _probe(out) as probe:
            asked = {self._ask(node["NodeID"], probe): node["NodeManagerAddress"] for node in nodes}
            ready, late = self.ray.wait(list(asked), num_returns=len(asked), timeout=SLOWEST)
            for reference in ready:
                self._check_answer(reference, asked[reference], out)
        if late:
            raise UserError(f"node {asked[late[0]]} of Ray gave no answer within {SLOWEST:g} seconds")

    def _ask(self, node: str, probe: Path) -> Any:
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        there = strategies.NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        asked = self.ray.remote(num_cpus=0, max_retries=0)(_sees).options(scheduling_strategy=there)
        return asked.remote(str(probe), os.getcwd())

    def _check_answer(self, reference: Any, node: str, out: Path) -> None:
        try:
            seen = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            raise UserError(f"node {node} of Ray cannot do jobs of sparsesoup ({brief(error)})") from error
        if not seen:
            raise UserError(
                f"node {node} of Ray does not see {out.resolve()} and the working directory {os.getcwd()} as this "
                f"machine does; nodes must share both: mount them there, or work where they are shared"
            )

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def _ended(self, job: Job, reference: Any) -> Ended[Job]:
        errors = self.ray.exceptions
        try:
            self.ray.get(reference)
            _need_seen("this machine", job.record, job.failure)
            return Ended(job)
        except UserError as error:
            return Ended(job, error=error)
        except errors.RayTaskError as error:  # a job that fails is on record; this is none
            cause = error.cause if isinstance(error.cause, UserError) else UserError(f"on Ray: {brief(error)}")
            return Ended(job, error=cause)
        except errors.OutOfMemoryError:
            return Ended(job, "was ended by Ray since memory is short")
        except errors.NodeDiedError:
            return Ended(job, "died with its node")
        except errors.RayError as error:
            return Ended(job, f"died ({type(error).__name__})")


def _perform(job: Job, directory: str) -> None:
    """What a task does: models and data may be named by paths from the driver's working directory."""
    with contextlib.suppress(OSError):
        os.chdir(directory)
    _need_seen(f"node {socket.gethostname()} of Ray", job.folder / "study.yaml")  # it may have joined late
    perform(job)


def _sees(probe: str, directory: str) -> bool:
    try:
        os.chdir(directory)
    except OSError:
        return False
    return _seen(5.0, Path(probe))


def _seen(patience: float, *paths: Path) -> bool:
    """Whether one of these is there, now or soon."""
    last = time.monotonic() + patience
    while not (found := any(path.exists() for path in paths)) and time.monotonic() < last:
        time.sleep(0.2)
    return found


def _need_seen(who: str, *paths: Path) -> None:
    if not _seen(LATE, *paths):
        raise UserError(f"{who} does not see {paths[0].resolve()}, which another one wrote; all must share that folder")


@contextlib.contextmanager
def _probe(out: Path) -> Iterator[Path]:
    """A file in the folder of runs that nobody else has."""
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
