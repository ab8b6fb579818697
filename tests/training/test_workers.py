"""Tasks in other processes end once each, as done or as lost, whatever dies; what one raises is raised."""

import os
import signal
from contextlib import closing
from pathlib import Path

import pytest

from sparsesoup.core.errors import UserError
from sparsesoup.core.process_pool import ProcessPool, run_with_retries


def do(task):
    """Die as often as the task says, told from a file, then leave a mark; or raise."""
    path, deaths = task
    if deaths < 0:
        raise UserError(f"{path.name} cannot be done")
    with open(path, "a", encoding="utf-8") as file:
        file.write("x")
    if len(path.read_text()) <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)


def happened(pool, tasks, lives=3):
    return [(e.kind, e.task[0].name) for e in run_with_retries(pool, tasks, lives) if e is not None]


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
        assert happened(pool, [(tmp_path / "second", 0)], lives=1) == [("begun", "second"), ("done", "second")]


def test_what_a_task_raises_is_raised_here(tmp_path: Path) -> None:
    with closing(ProcessPool(1, do)) as pool, pytest.raises(UserError, match=r"^bad cannot be done$"):
        happened(pool, [(tmp_path / "bad", -1)])
