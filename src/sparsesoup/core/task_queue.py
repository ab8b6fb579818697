"""Waiting tasks, taken in order, those of one place by the process that has loaded it."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

Task = TypeVar("Task")


class TaskQueue(Generic[Task]):
    """Tasks that wait; taking one costs the same whatever their number.

    Args:
        tasks: the tasks, in order.
        place_of: what a process loads for a task, and could keep for the next one of the same place.
    """

    def __init__(self, tasks: Sequence[Task], place_of: Callable[[Task], Hashable]) -> None:
        self._place_of = place_of
        self._waiting: dict[Hashable, deque[Task]] = {}  # places in the order of their first tasks
        for task in tasks:
            self._waiting.setdefault(place_of(task), deque()).append(task)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put_back(self, task: Task) -> None:
        """Let a task wait again, before the others of its place."""
        self._waiting.setdefault(self._place_of(task), deque()).appendleft(task)

    def take_next(self, idle: Iterable[Hashable] = (), busy: Iterable[Hashable] = ()) -> Task:
        """Remove and return the next task: of a place that an idle process has, else that none has, else the first.

        Args:
            idle, busy: the places that processes have loaded.

        >>> queue = TaskQueue([("imp", 0), ("imp", 1), ("isp", 0), ("isp", 1)], lambda task: task[1])
        >>> queue.take_next(), queue.take_next(busy=[0]), queue.take_next(idle=[1], busy=[0]), queue.take_next(busy=[0])
        (('imp', 0), ('imp', 1), ('isp', 1), ('isp', 0))
        """
        held = {*idle, *busy}
        place = next((place for place in idle if place in self._waiting), None)
        if place is None:  # looks at one place more than there are processes, at most
            first = next(iter(self._waiting))
            place = next((place for place in self._waiting if place not in held), first)
        tasks = self._waiting[place]
        task = tasks.popleft()
        if not tasks:
            del self._waiting[place]
        return task
