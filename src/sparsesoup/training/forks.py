"""Functions run on copies of a training state: the `map` of a problem."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from sparsesoup.training.state import Snapshot, TrainState

Tensors = dict[str, Tensor]
ForkFunction = Callable[..., Tensors]  # (problem, a copy of the state that it may change, *task) -> result


class ParallelMap(Protocol):
    """Run a function on copies of a training state and return a getter for each result. The state is unchanged.

    From the first result to the last, no work beside it may change the state but for its memory, which no copy has.
    Nothing runs before its result is requested, so a restarted run recomputes nothing it has. `work` is a function, or
    a method of a plain value, that any process can import; a task consists of plain values.
    """

    def __call__(
        self, problem: Any, state: TrainState, work: ForkFunction, tasks: Sequence[tuple[Any, ...]]
    ) -> Callable[[int], Tensors]: ...


def serial_map(
    problem: Any, state: TrainState, work: ForkFunction, tasks: Sequence[tuple[Any, ...]]
) -> Callable[[int], Tensors]:
    """Run each task in this process, on the state itself; one snapshot is the way back from all of them."""
    taken: list[Snapshot] = []

    def give(number: int) -> Tensors:
        memory, state.memory = state.memory, {}
        if not taken:
            taken.append(problem.snapshots.take(state))
        with problem.checkpointer.without_saving():
            found = work(problem, state, *tasks[number])
        state.restore_snapshot_(taken[0])
        state.memory = memory
        return found

    return give
