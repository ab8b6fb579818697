"""Tasks done by other processes: begun again where a process dies, given up where it dies too often."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Generic, Literal, Protocol, TypeVar

LIVES = 3  # a task whose process dies this often is lost
REFRESH = 1.0  # seconds between two looks at what is under way

Task = TypeVar("Task")


@dataclass(frozen=True)
class EndedTask(Generic[Task]):
    """A task that is no longer under way.

    Args:
        task: which.
        death: how its process died; empty if it did not.
        error: what it raised, if it did.
    """

    task: Task
    death: str = ""
    error: Exception | None = None


@dataclass(frozen=True)
class TaskEvent(Generic[Task]):
    """What happens to a task: begun, died (it is begun again later), lost (it died too often) or done."""

    kind: Literal["begun", "died", "lost", "done"]
    task: Task
    why: str = ""


class TaskPool(Protocol[Task]):
    """Processes that do tasks, on this machine or elsewhere."""

    def free_slots(self) -> int:
        """How many more tasks can be begun now."""
        ...

    def begin(self, task: Task) -> None:
        """Have a task done."""
        ...

    def wait_for_ended(self) -> Sequence[EndedTask[Task]]:
        """What has ended since the last call; waits for something, but no longer than `REFRESH`."""
        ...

    def close(self) -> None:
        """End the processes, and what they do."""
        ...


def run_with_retries(
    pool: TaskPool[Task], tasks: Sequence[Task], lives: int = LIVES
) -> Iterator[TaskEvent[Task] | None]:
    """Have all tasks done; yields what happens, and None at least once in `REFRESH` seconds.

    Each ends as done or as lost, once, whatever dies on the way: so tasks must bear to be done again from the midst.

    Raises: what a task raised, at once.
    """
    waiting, deaths, busy = deque(tasks), Counter[int](), 0
    while waiting or busy:
        while waiting and pool.free_slots() > 0:
            task = waiting.popleft()
            pool.begin(task)
            busy += 1
            yield TaskEvent("begun", task)
        for found in pool.wait_for_ended():
            busy -= 1
            if found.error is not None:
                raise found.error
            deaths[id(found.task)] += bool(found.death)
            if not found.death:
                yield TaskEvent("done", found.task)
            elif deaths[id(found.task)] < lives:
                waiting.appendleft(found.task)
                yield TaskEvent("died", found.task, found.death)
            else:
                yield TaskEvent("lost", found.task, found.death)
        yield None


class ProcessPool(Generic[Task]):
    """Several processes on this machine, forked from a server that has imported what they need.

    Args:
        count: how many at a time.
        do: does a task; any process can import it.
        needs: modules that it needs, imported once for all processes.
    """

    def __init__(self, count: int, do: Callable[[Task], None], needs: Sequence[str] = ()) -> None:
        self.count, self.do, self.needs = count, do, [do.__module__, *needs]
        self._busy: list[_WorkerProcess[Task]] = []
        self._idle: list[_WorkerProcess[Task]] = []

    def free_slots(self) -> int:
        """How many more tasks can be begun now."""
        return self.count - len(self._busy)

    def begin(self, task: Task) -> None:
        """Have a task done by an idle process, or by a new one."""
        self._idle = [worker for worker in self._idle if worker.process.is_alive()]
        worker = self._idle.pop() if self._idle else _WorkerProcess(self.do, self.needs)
        worker.send_task(task)
        self._busy.append(worker)

    def wait_for_ended(self) -> list[EndedTask[Task]]:
        """What has ended since the last call; waits for something, but no longer than `REFRESH`."""
        spoken = wait([worker.connection for worker in self._busy], timeout=REFRESH)
        ready = [worker for worker in self._busy if worker.connection in spoken]
        found = [worker.receive_result() for worker in ready]
        self._busy = [worker for worker in self._busy if worker not in ready]
        self._idle += [worker for worker, end in zip(ready, found, strict=True) if not end.death]
        return found

    def close(self) -> None:
        """End the processes, and what they do."""
        for worker in self._busy:
            worker.process.kill()  # what it has done is on disk
            worker.process.join()
        for worker in self._idle:
            worker.dismiss()
        self._busy, self._idle = [], []


class _WorkerProcess(Generic[Task]):
    """A process that does one task after the other."""

    task: Task

    def __init__(self, do: Callable[[Task], None], needs: list[str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(needs)
        self.connection, theirs = context.Pipe()
        self.process: ForkServerProcess = context.Process(target=_worker_loop, args=(theirs, do))
        self.process.start()
        theirs.close()  # or its end would be no end of the pipe

    def send_task(self, task: Task) -> None:
        self.task = task
        with contextlib.suppress(OSError):  # killed meanwhile; `wait_for_ended` tells
            self.connection.send(task)

    def dismiss(self) -> None:
        self.connection.close()
        self.process.join()

    def receive_result(self) -> EndedTask[Task]:
        try:
            return EndedTask(self.task, error=self.connection.recv())
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            hint = "memory may be short" if code == -signal.SIGKILL else "a library may have crashed"
            return EndedTask(self.task, f"ended with {code}; {hint}")


def _worker_loop(connection: Connection, do: Callable[[Task], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the first process ends the others
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError):  # dismissed
        while True:
            connection.send(_run_task(do, connection.recv()))


def _run_task(do: Callable[[Task], None], task: Task) -> Exception | None:
    try:
        do(task)
    except Exception as error:
        return error
    return None


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)
