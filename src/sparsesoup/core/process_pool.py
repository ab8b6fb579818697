"""Run tasks in worker processes: retried if a process dies, given up if it dies too often."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Generic, Literal, Protocol, TypeVar

from sparsesoup.core.task_queue import TaskQueue

MAX_ATTEMPTS = 3  # a task is given up when its process has died this often
REFRESH = 1.0  # seconds between two polls

Task = TypeVar("Task")


@dataclass(frozen=True)
class EndedTask(Generic[Task]):
    """A task that is no longer running.

    Args:
        task: the task.
        death: the reason its process died; empty if it did not.
        error: the exception it raised, if any.
    """

    task: Task
    death: str = ""
    error: Exception | None = None


@dataclass(frozen=True)
class TaskEvent(Generic[Task]):
    """A change of a task's status: begun, died (it will be retried), lost (it died too often) or done."""

    kind: Literal["begun", "died", "lost", "done"]
    task: Task
    why: str = ""


class TaskPool(Protocol[Task]):
    """Processes that run tasks, on this machine or elsewhere; their methods are those of `ProcessPool`."""

    def load_key_of(self, task: Task) -> Hashable: ...
    def idle_places(self) -> list[Hashable]: ...
    def busy_places(self) -> list[Hashable]: ...
    def free_slots(self) -> int: ...
    def begin(self, task: Task) -> None: ...
    def wait_for_ended(self) -> Sequence[EndedTask[Task]]: ...
    def close(self) -> None: ...


def run_with_retries(
    pool: TaskPool[Task], tasks: Sequence[Task], attempts: int = MAX_ATTEMPTS
) -> Iterator[TaskEvent[Task] | None]:
    """Run all tasks; yield each event, and None at least once every `REFRESH` seconds.

    Each task ends exactly once, as done or as lost, so it must be safe to rerun after a partial run.

    Raises: the exception of a task, immediately.
    """
    waiting, deaths, busy = TaskQueue(tasks, pool.load_key_of), Counter[int](), 0
    while waiting or busy:
        while waiting and pool.free_slots() > 0:
            task = waiting.take_next(pool.idle_places(), pool.busy_places())
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
            elif deaths[id(found.task)] < attempts:
                waiting.put_back(found.task)
                yield TaskEvent("died", found.task, found.death)
            else:
                yield TaskEvent("lost", found.task, found.death)
        yield None


class ProcessPool(Generic[Task]):
    """Several processes on this machine, forked from a server that has imported the modules they need.

    Args:
        count: maximum number of processes.
        do: function that runs a task; importable by any process. An object is copied to each process, and may keep
            there what it loads for the next task.
        needs: modules imported once for all processes.
        load_key_of: identifies what a process loads for a task; a task goes to an idle process that loaded the same.
        environment: environment variables of each process by its number, from 0 to count - 1.
    """

    def __init__(
        self,
        count: int,
        do: Callable[[Task], None],
        needs: Sequence[str] = (),
        load_key_of: Callable[[Task], Hashable] = lambda task: None,
        environment: Callable[[int], Mapping[str, str]] = lambda number: {},
    ) -> None:
        self.count, self.do, self.needs = count, do, [do.__module__, *needs]
        self.load_key_of, self.environment = load_key_of, environment
        self._busy: list[_WorkerProcess[Task]] = []
        self._idle: list[_WorkerProcess[Task]] = []

    def idle_places(self) -> list[Hashable]:
        """Return the load keys of the last tasks of idle processes."""
        return [self.load_key_of(worker.task) for worker in self._idle]

    def busy_places(self) -> list[Hashable]:
        """Return the load keys of the running tasks."""
        return [self.load_key_of(worker.task) for worker in self._busy]

    def free_slots(self) -> int:
        """Return the number of tasks that can be started now."""
        return self.count - len(self._busy)

    def begin(self, task: Task) -> None:
        """Start a task in an idle process, or in a new one."""
        self._idle = [worker for worker in self._idle if worker.process.is_alive()]
        load_key = self.load_key_of(task)
        self._idle.sort(key=lambda worker: self.load_key_of(worker.task) == load_key)
        worker = self._idle.pop() if self._idle else self._start_worker()
        worker.send_task(task)
        self._busy.append(worker)

    def _start_worker(self) -> "_WorkerProcess[Task]":
        taken = {worker.number for worker in self._busy}
        number = next(number for number in range(self.count) if number not in taken)
        return _WorkerProcess(self.do, self.needs, number, self.environment(number))

    def wait_for_ended(self) -> list[EndedTask[Task]]:
        """Return the tasks that ended since the last call; wait for one, but at most `REFRESH` seconds."""
        spoken = wait([worker.connection for worker in self._busy], timeout=REFRESH)
        ready = [worker for worker in self._busy if worker.connection in spoken]
        found = [worker.receive_result() for worker in ready]
        self._busy = [worker for worker in self._busy if worker not in ready]
        self._idle += [worker for worker, end in zip(ready, found, strict=True) if not end.death]
        return found

    def close(self) -> None:
        """Kill the processes and their tasks."""
        for worker in self._busy:
            worker.process.kill()  # its results are on disk
            worker.process.join()
        for worker in self._idle:
            worker.dismiss()
        self._busy, self._idle = [], []


class _WorkerProcess(Generic[Task]):
    """A process that runs one task after another."""

    task: Task

    def __init__(
        self, do: Callable[[Task], None], needs: list[str], number: int, environment: Mapping[str, str]
    ) -> None:
        self.number = number
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(needs)
        self.connection, theirs = context.Pipe()
        self.process: ForkServerProcess = context.Process(target=_worker_loop, args=(theirs, do, dict(environment)))
        self.process.start()
        theirs.close()  # otherwise the pipe would not close when the process ends

    def send_task(self, task: Task) -> None:
        self.task = task
        with contextlib.suppress(OSError):  # killed meanwhile; `wait_for_ended` reports it
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


def _worker_loop(connection: Connection, do: Callable[[Task], None], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal signals all; the main process ends the others
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError):  # the pool closed the pipe
        while True:
            task, raised = connection.recv(), None
            try:
                do(task)
            except Exception as error:
                raised = error
            connection.send(raised)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)
