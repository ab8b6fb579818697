"""Who does the jobs of a study on Ray: tasks on this machine, or on the nodes of a cluster that share its folder."""

import contextlib
import importlib.util
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsesoup.errors import UserError
from sparsesoup.files import make_folder
from sparsesoup.study.board import Board
from sparsesoup.study.executors import follow
from sparsesoup.study.work import Job, perform
from sparsesoup.workers import LIVES, REFRESH, Ended

STORE = 80_000_000  # bytes of Ray's object store where we start it: nothing of ours goes through it
PATIENCE = 5.0  # seconds in which an address must answer
SLOWEST = 120.0  # seconds in which a node must have started a process that answers
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # RFC 9113, section 3.4
CARRIED = re.compile(r"(SPARSESOUP|HF|TRANSFORMERS|TOKENIZERS|OMP|MKL|CUBLAS|TORCH|PYTORCH|RAY_ACCEL)_")  # variables
RAY = {  # what Ray reads when it is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a cell without a GPU sees none
}
TRIES = {"RAY_NUM_REDIS_GET_RETRIES": "3"}  # seconds that an address may take to turn out to be no cluster


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
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    ray = _imported({} if address == "local" else TRIES)
    _connect(ray, address, cell, workers)
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
            raise UserError(f"node {node} of Ray cannot do jobs of sparsesoup ({_brief(error)})") from error
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
            return Ended(job)
        except errors.RayTaskError as error:  # a job that fails is on record; this is none
            cause = error.cause if isinstance(error.cause, UserError) else UserError(f"on Ray: {_brief(error)}")
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
    if not (job.folder / "study.yaml").exists():
        raise UserError(
            f"node {socket.gethostname()} of Ray, which joined later, does not see {directory} and {job.folder} there"
        )
    perform(job)


def _sees(probe: str, directory: str) -> bool:
    try:
        os.chdir(directory)
    except OSError:
        return False
    last = time.monotonic() + 5.0  # a network's file system may be late
    while not os.path.exists(probe) and time.monotonic() < last:
        time.sleep(0.2)
    return os.path.exists(probe)


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


def _imported(more: dict[str, str]) -> Any:
    for name, value in (RAY | more).items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("ray") is None:
        raise UserError("--executor ray needs Ray; say pip install 'sparsesoup[ray]'")
    return importlib.import_module("ray")


def _connect(ray: Any, address: str, cell: Room, workers: int | None) -> None:
    """Start Ray or join a cluster. ray.init waits long for what is not there, so that is asked first."""
    settings: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.CRITICAL}
    if address == "local":
        cores = max(1, round(workers * cell.cpus)) if workers else None
        settings |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": STORE}
    else:
        _need_answer(address)
        carried = {name: value for name, value in os.environ.items() if CARRIED.match(name)}
        settings |= {"runtime_env": {"env_vars": carried}}
    try:
        with _mute():
            ray.init(**settings)
    except Exception as error:
        what = "Ray does not start here" if address == "local" else f"cannot join the Ray cluster at {address}"
        raise UserError(f"{what}: {_brief(error)}") from error


def _need_answer(address: str) -> None:
    if address == "auto":
        return  # Ray looks at what runs on this machine, and says at once that there is none
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise UserError(
            f"--address is host:port of a Ray cluster's head, such as 10.0.0.1:6379, or auto; got {address}"
        )
    why = _unanswered(host.strip("[]"), int(port))
    if why:
        raise UserError(
            f"no Ray cluster answers at {address} ({why}); start one with `ray start --head`, or leave --address and "
            f"RAY_ADDRESS out and it is started here"
        )


def _unanswered(host: str, port: int) -> str:
    """Why no gRPC server is there; empty if one is. Within `PATIENCE`, however long a name server takes."""
    said = [f"nothing within {PATIENCE:g} seconds"]

    def ask() -> None:
        try:
            with socket.create_connection((host, port), timeout=PATIENCE) as line:
                line.sendall(PREFACE)
                answer = line.recv(9)
            settings = len(answer) > 3 and answer[3] == 4  # the frame with which a server must begin
            said[0] = "" if settings or os.environ.get("RAY_USE_TLS") == "1" else "what answers there is not Ray"
        except OSError as error:
            said[0] = error.strerror or str(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return said[0]


@contextlib.contextmanager
def _mute() -> Iterator[None]:
    """Nothing is written to stderr in this block, not by C++ either: what goes wrong is raised as well."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _brief(error: BaseException) -> str:
    """The last line of an error: where Ray passes a worker's traceback on, its cause."""
    lines = [line.strip() for line in re.sub(r"\x1b\[\d+m", "", str(error)).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
