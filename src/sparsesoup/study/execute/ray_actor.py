"""Actors that run a study's jobs on the nodes of Ray, and the check that they see the shared folder."""

import contextlib
import importlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from sparsesoup.core.errors import UserError
from sparsesoup.study.execute.jobs import TrialJob

LATE = 70.0  # seconds; a network file system may cache for a minute that a file does not exist


class TrialActor:
    """An actor that runs jobs on a node one after another, and keeps model and data for the next one."""

    def __init__(self, runner: Callable[[], Callable[[TrialJob], None]]) -> None:
        self._runner = runner()

    def node_id(self) -> str:
        """Return the id of the node, once the actor has started."""
        found: str = importlib.import_module("ray").get_runtime_context().get_node_id()
        return found

    def run_job(self, job: TrialJob, directory: str) -> None:
        """Run a job: paths of models and data may be relative to the driver's working directory."""
        with contextlib.suppress(OSError):
            os.chdir(directory)
        need_seen(f"node {socket.gethostname()} of Ray", job.folder / "study.yaml")  # it may have joined late
        self._runner(job)


def can_see(probe: str, directory: str) -> bool:
    """Return True if this node sees the working directory, and the file in it."""
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


def need_seen(who: str, *paths: Path) -> None:
    """Raise a UserError unless one of these paths is seen, which another process wrote."""
    if not _wait_until_seen(LATE, *paths):
        raise UserError(f"{who} does not see {paths[0].resolve()}, which another one wrote; all must share that folder")
