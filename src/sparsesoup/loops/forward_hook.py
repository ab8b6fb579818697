"""The hook of a pruner on the model that it prunes."""

from typing import Any, Protocol


class HookOwner(Protocol):
    """A pruner, as far as its hook knows it."""

    method: Any

    def before_forward(self) -> None: ...


class ForwardHook:
    """Calls a pruner before each forward pass of its model.

    A copy of the model, such as a moving average or a teacher, or one that was pickled, has no pruner: its hook does
    nothing.
    """

    def __init__(self, pruner: HookOwner | None = None) -> None:
        self.pruner = pruner

    def __call__(self, *_: Any) -> None:
        if self.pruner is not None:
            self.pruner.before_forward()

    def __reduce__(self) -> Any:
        return ForwardHook, ()
