"""Work on forks of a run's state: the small `map` that a problem is given."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from sparsesoup.training.state import TrainState

Tensors = dict[str, Tensor]
ForkFunction = Callable[..., Tensors]  # (problem, a state to use up, *task) -> what is wanted of it


class ParallelMap(Protocol):
    """Has work done on forks of a state: number of a task -> what its work gives; the state stays as it is.

    Nothing is done before it is asked for, so that a restarted run asks for nothing it has. `work` is a function, or a
    method of a plain value, that any process can import; a task is plain values.
    """

    def __call__(
        self, problem: Any, state: TrainState, work: ForkFunction, tasks: Sequence[tuple[Any, ...]]
    ) -> Callable[[int], Tensors]: ...


def serial_map(
    problem: Any, state: TrainState, work: ForkFunction, tasks: Sequence[tuple[Any, ...]]
) -> Callable[[int], Tensors]:
    """Each task in this process."""

    def give(number: int) -> Tensors:
        here = state.take_snapshot()
        with problem.journal.without_saving():
            found = work(problem, state, *tasks[number])
        state.restore_snapshot_(here)
        return found

    return give
