"""Hooks of the training loop: what a method does after a step."""

from collections.abc import Callable
from dataclasses import dataclass

from sparsesoup.training.state import TrainState

Hook = Callable[[TrainState], None]


@dataclass(frozen=True)
class ScheduledHook:
    """A hook that does nothing but at some steps; at the others the loop need not wait for a GPU.

    Args:
        is_due: step -> whether the hook does something.
        work: the hook.
    """

    is_due: Callable[[int], bool]
    work: Hook

    def __call__(self, state: TrainState) -> None:
        """Call the hook if it is due."""
        if self.is_due(state.step):
            self.work(state)


def is_due(hook: Hook, step: int) -> bool:
    """Return False if the hook does nothing after this step."""
    return not isinstance(hook, ScheduledHook) or hook.is_due(step)
