"""Functions run on copies of a training state: the `map` of a problem."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from sparsesoup.training.state import TrainState

Tensors = dict[str, Tensor]
ForkFunction = Callable[..., Tensors]  # (problem, a copy of the state that it may change, *task) -> result


class ParallelMap(Protocol):
    """Run a function on copies of a training state and return a getter for each result. The state is unchanged.

    Nothing runs before its result is requested, so a restarted run recomputes nothing it has. `work` is a function, or
    a method of a plain value, that any process can import; a task consists of plain values.
    """

    def __call__(
        self, problem: Any, state: TrainState, work: ForkFunction, tasks: Sequence[tuple[Any, ...]]
    ) -> Callable[[int], Tensors]: ...


def serial_map(
    problem: Any, state: TrainState, work: ForkFunction, tasks: Sequence[tuple[Any, ...]]
) -> Callable[[int], Tensors]:
    """Run each task in this process."""

    def give(number: int) -> Tensors:
        here = state.take_snapshot()
        with problem.journal.without_saving():
            found = work(problem, state, *tasks[number])
        state.restore_snapshot_(here)
        return found

    return give
