"""Learning rate and left-out steps of the optimizer of a foreign loop."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsesoup.loops.problem import LoopProblem
from sparsesoup.training.loop import Rate


@dataclass(frozen=True)
class RelativeRate:
    """A plan's learning rate as a factor on the loop's present one."""

    rate: Rate
    now: float

    def __call__(self, step: int) -> float:
        return round(self.rate(step) / self.now, 12)


class StepNesting:
    """Tell the step of an optimizer from one within it: a subclass may call its parent's, which has the same hooks."""

    def __init__(self) -> None:
        self._depth, self._in_closure = 0, False

    def begin(self, args: tuple[Any, ...], kwargs: Any, work: Callable[[], None]) -> tuple[Any, Any] | None:
        """Do some work before a step, or, if it has a closure, which makes the gradients, after that.

        Args:
            args, kwargs: of the step, with the optimizer as the first.
        Returns: the arguments of the step in their place; None: as they are.
        """
        self._depth += 1
        if self._depth > 1:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            work()
            return None

        def gradients_then_work() -> Any:
            self._in_closure = True
            try:
                loss = closure()
            finally:
                self._in_closure = False
            work()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": gradients_then_work}
        return (args[0], gradients_then_work, *args[2:]), kwargs

    def end(self) -> bool:
        """End a step; return True unless it was within another one."""
        self._depth = max(0, self._depth - 1)
        return not self._depth

    def begin_forward(self) -> None:
        """Forget a step that an error has ended, at a forward pass outside of a closure."""
        self._depth = self._depth if self._in_closure else 0


def is_skipped(optimizer: Optimizer) -> bool:
    """Return True if a fused optimizer skips this step because a gradient scaler found an overflow."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(torch.as_tensor(found).sum() > 0)


@contextmanager
def lent_optimizer(problem: LoopProblem) -> Iterator[None]:
    """Use the optimizer in our loop for the model's parameters only, and restore it afterwards.

    What the optimizer trains beside the model, such as a head that the loss holds, stays as it is.
    """
    optimizer, own = problem.optimizer, {id(p) for p in problem.pretrained.parameters()}
    groups = [dict(group) for group in optimizer.param_groups]
    plain = {p: {k: v for k, v in slot.items() if not isinstance(v, Tensor)} for p, slot in optimizer.state.items()}
    others: dict[Any, Any] = {p: optimizer.state.pop(p) for p in [*optimizer.state] if id(p) not in own}
    for group in optimizer.param_groups:
        group["factor"], group["decays"] = float(group["lr"]), any(p.dim() > 1 for p in group["params"])
        group["params"] = [p for p in group["params"] if id(p) in own]
        group.setdefault("weight_decay", 0.0)
    try:
        yield
    finally:
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)
        optimizer.state.update(others)
        for parameter, values in plain.items():
            optimizer.state[parameter].update(values)
