"""Waiting tasks, taken in order; tasks that need the same model and data go to the process that has loaded them."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

Task = TypeVar("Task")


class TaskQueue(Generic[Task]):
    """Tasks that wait; taking one costs the same whatever their number.

    Args:
        tasks: the tasks, in order.
        load_key_of: identifies what a process loads for a task, and could keep for the next one with the same key.
    """

    def __init__(self, tasks: Sequence[Task], load_key_of: Callable[[Task], Hashable]) -> None:
        self._load_key_of = load_key_of
        self._waiting: dict[Hashable, deque[Task]] = {}  # keys in the order of their first tasks
        for task in tasks:
            self._waiting.setdefault(load_key_of(task), deque()).append(task)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put_back(self, task: Task) -> None:
        """Put a task back into the queue, before the others with its key."""
        self._waiting.setdefault(self._load_key_of(task), deque()).appendleft(task)

    def take_next(self, idle: Iterable[Hashable] = (), busy: Iterable[Hashable] = ()) -> Task:
        """Remove and return the next task: one whose data an idle process has, else no process, else the first.

        Args:
            idle, busy: the keys of what processes have loaded.

        >>> queue = TaskQueue([("imp", 0), ("imp", 1), ("isp", 0), ("isp", 1)], lambda task: task[1])
        >>> queue.take_next(), queue.take_next(busy=[0]), queue.take_next(idle=[1], busy=[0]), queue.take_next(busy=[0])
        (('imp', 0), ('imp', 1), ('isp', 1), ('isp', 0))
        """
        held = {*idle, *busy}
        load_key = next((load_key for load_key in idle if load_key in self._waiting), None)
        if load_key is None:  # looks at one key more than there are processes, at most
            first = next(iter(self._waiting))
            load_key = next((load_key for load_key in self._waiting if load_key not in held), first)
        tasks = self._waiting[load_key]
        task = tasks.popleft()
        if not tasks:
            del self._waiting[load_key]
        return task
