"""Runs that are killed while they train and begun again, with checkpoints after each step."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sparsesoup.core.ticket import Ticket
from sparsesoup.methods import Method
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.observer import Observer
from sparsesoup.training.problem import Problem


class Killed(BaseException):
    """Stands for the end of a process."""


class KillAfter(Observer):
    """An observer that kills the run after a number of training steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, record: Mapping[str, Any]) -> None:
        self.left -= bool(record)  # a batch of a validation has no record
        if self.left == 0:
            raise Killed


def finish_killed_run(
    method: Method, make: Callable[..., Problem], sparsity: float, folder: Path, monkeypatch: pytest.MonkeyPatch,
    kills: int, steps: int,
) -> Ticket:  # fmt: skip
    """Return the ticket of a run that is killed `kills` times, each after `steps` steps, and then runs to its end.

    Args:
        make: makes the problem, with a meter, a checkpointer and maybe an observer.
        folder: folder of the checkpoints.
    """
    monkeypatch.setattr("sparsesoup.training.checkpoint.SHARE", 0)

    def life(**more: Any) -> Problem:
        meter = CostTracker()
        return make(meter=meter, checkpointer=Checkpointer(meter, folder, 0.0), **more)

    for _ in range(kills):
        with pytest.raises(Killed):
            method.run(life(observer=KillAfter(steps)), sparsity)
    last = life()
    assert last.checkpointer.resumed_stage is not None
    return method.run(last, sparsity)
