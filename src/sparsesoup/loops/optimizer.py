"""Learning rate, gradient scale and left-out steps of the optimizer of a foreign loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from sparsesoup.training.loop import Rate
from sparsesoup.training.state import TrainState


@dataclass(frozen=True)
class RelativeRate:
    """A plan's learning rate as a factor on the loop's present one."""

    rate: Rate
    now: float

    def __call__(self, step: int) -> float:
        return round(self.rate(step) / self.now, 12)


def is_skipped(optimizer: Optimizer) -> bool:
    """Return True if a fused optimizer leaves out this step, since a gradient scaler found an overflow."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(torch.as_tensor(found).sum() > 0)


@contextmanager
def unscaled(optimizer: Optimizer, state: TrainState) -> Iterator[None]:
    """Show the gradients without the factor of a gradient scaler, which a fused optimizer divides by itself."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        yield
        return
    params = state.prunable_parameters()
    grads = {name: p.grad for name, p in params.items()}
    for parameter in params.values():
        parameter.grad = None if parameter.grad is None else parameter.grad / scale
    yield
    for name, parameter in params.items():
        parameter.grad = grads[name]
