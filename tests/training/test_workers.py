"""Tasks in other processes end once each, as done or as lost, whatever dies; what one raises is raised."""

import os
import signal
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsesoup.core.errors import UserError
from sparsesoup.core.process_pool import ProcessPool, run_with_retries
from sparsesoup.core.task_queue import TaskQueue

pytestmark = pytest.mark.integration


def do(task):
    """Die as often as the task says, told from a file, then leave a mark; or raise."""
    path, deaths = task
    if deaths < 0:
        raise UserError(f"{path.name} cannot be done")
    with open(path, "a", encoding="utf-8") as file:
        file.write("x")
    if len(path.read_text()) <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)


def happened(pool, tasks, attempts=3):
    return [(e.kind, e.task[0].name) for e in run_with_retries(pool, tasks, attempts) if e is not None]


def test_a_task_is_begun_again_until_it_is_done_or_has_died_too_often(tmp_path: Path) -> None:
    tasks = [(tmp_path / "steady", 0), (tmp_path / "weak", 2), (tmp_path / "hopeless", 9)]
    with closing(ProcessPool(2, do)) as pool:
        found = happened(pool, tasks)
        again = happened(pool, [(tmp_path / "later", 0)])  # the pool serves more than one list
    assert sorted(found) == sorted(
        [("begun", "steady"), ("done", "steady")]
        + 3 * [("begun", "weak")] + 2 * [("died", "weak")] + [("done", "weak")]
        + 3 * [("begun", "hopeless")] + 2 * [("died", "hopeless")] + [("lost", "hopeless")]
    )  # fmt: skip
    assert again == [("begun", "later"), ("done", "later")]
    assert len((tmp_path / "hopeless").read_text()) == 3


def test_an_idle_process_that_died_costs_no_task_a_life(tmp_path: Path) -> None:
    with closing(ProcessPool(1, do)) as pool:
        happened(pool, [(tmp_path / "first", 0)])
        (idle,) = pool._idle
        idle.process.kill()
        idle.process.join()
        assert happened(pool, [(tmp_path / "second", 0)], attempts=1) == [("begun", "second"), ("done", "second")]


def test_what_a_task_raises_is_raised_here(tmp_path: Path) -> None:
    with closing(ProcessPool(1, do)) as pool, pytest.raises(UserError, match=r"^bad cannot be done$"):
        happened(pool, [(tmp_path / "bad", -1)])


def note(task):
    """Leave a line: the task, its process, and the GPU that this one sees."""
    with open(task[0], "a", encoding="utf-8") as file:
        file.write(f"{task[1]} {os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")


def test_a_task_goes_to_the_process_that_has_loaded_its_place(tmp_path: Path) -> None:
    tasks = [(tmp_path / "log", place) for _ in range(6) for place in "ab"]
    with closing(ProcessPool(2, note, load_key_of=lambda task: task[1])) as pool:
        assert [event.kind for event in run_with_retries(pool, tasks) if event].count("done") == 12
    rows = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(place for place, *_ in rows) == 6 * ["a"] + 6 * ["b"]
    assert len({(place, pid) for place, pid, _ in rows}) <= 3  # the last place may be helped with
    assert len({pid for _, pid, _ in rows}) == 2


def test_process_k_has_the_environment_of_its_number_and_so_has_the_one_that_replaces_it(tmp_path: Path) -> None:
    def environment(number):
        return {"CUDA_VISIBLE_DEVICES": "47"[number % 2]}

    with closing(ProcessPool(3, note, environment=environment)) as pool:
        for task in [(tmp_path / "log", name) for name in "abc"]:
            pool.begin(task)
        while pool.free_slots() < 3:
            pool.wait_for_ended()
        assert sorted(worker.number for worker in pool._idle) == [0, 1, 2]
        numbers = {str(worker.process.pid): worker.number for worker in pool._idle}
        for worker in pool._idle:
            worker.process.kill()
            worker.process.join()
        for task in [(tmp_path / "log", name) for name in "def"]:
            pool.begin(task)
        while pool.free_slots() < 3:
            pool.wait_for_ended()
        numbers |= {str(worker.process.pid): worker.number for worker in pool._idle}
    rows = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted((numbers[pid], gpu) for _, pid, gpu in rows) == sorted(2 * [(0, "4"), (1, "7"), (2, "4")])


@given(st.lists(st.integers(0, 4), max_size=30), st.lists(st.tuples(st.sets(st.integers(0, 4)), st.booleans())))
def test_every_task_is_taken_once_and_in_order_within_its_place(places, asked) -> None:
    tasks = [(place, number) for number, place in enumerate(places)]
    queue, taken = TaskQueue(tasks, lambda task: task[0]), []
    for idle, back in asked:
        if queue:
            task = queue.take_next(sorted(idle), [])
            waiting = [other for other in tasks if other not in taken]
            assert task[0] in idle or not idle & {place for place, _ in waiting}
            if back:
                queue.put_back(task)
            else:
                taken.append(task)
    while queue:
        taken.append(queue.take_next())
    assert Counter(taken) == Counter(tasks)
    for place in {*places}:
        assert [t for t in taken if t[0] == place] == [t for t in tasks if t[0] == place]


def test_a_task_of_a_place_that_no_process_has_comes_before_those_of_busy_ones() -> None:
    queue = TaskQueue([(row, seed) for row in range(3) for seed in range(2)], lambda task: task[1])
    assert queue.take_next() == (0, 0)
    assert queue.take_next(busy=[0]) == (0, 1)
    assert queue.take_next(idle=[1], busy=[0]) == (1, 1)
    assert queue.take_next(busy=[0, 1]) == (1, 0)
    queue.put_back((1, 0))
    assert queue.take_next(idle=[0]) == (1, 0)
