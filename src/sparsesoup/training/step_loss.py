"""Loss of a step and the check that it is finite: read at once, or a step late where reading makes a GPU wait."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsesoup.training.state import TrainState

LATE_DEVICES = ("cuda",)  # where numbers are copied to the host without waiting for them


@dataclass
class StepLoss:
    """Losses of the parts of a step, still on the device.

    Args:
        parts: (loss, loss with penalties, share of the rows) of each part.
        norm: gradient norm before clipping; None without clipping.
    """

    parts: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)
    norm: Tensor | None = None

    def not_finite(self) -> Tensor:
        """Return 1.0 on the device if a loss or the norm is not finite, else 0.0."""
        checked = [whole for _, whole, _ in self.parts] + ([] if self.norm is None else [self.norm])
        return (~torch.stack([value.detach().float() for value in checked]).isfinite().all()).float()

    def read(self) -> float:
        """Return the mean loss; one that is not finite if a loss with penalties is not. Waits for the device."""
        return _mean_loss([(float(loss), float(whole), weight) for loss, whole, weight in self.parts])

    def read_norm(self) -> float:
        """Return the gradient norm, 0 without clipping. Waits for the device."""
        return 0.0 if self.norm is None else float(self.norm)

    def read_later(self) -> Callable[[], tuple[float, float]]:
        """Begin to copy the numbers to the host; return a function that waits for them and returns (loss, norm)."""
        weights = [weight for _, _, weight in self.parts]
        norms = [] if self.norm is None else [self.norm]
        values = [loss for loss, _, _ in self.parts] + [whole for _, whole, _ in self.parts] + norms
        copied, count = HostCopy(torch.stack([value.detach().float() for value in values])), len(weights)

        def read() -> tuple[float, float]:
            found = copied.read()
            loss = _mean_loss(list(zip(found[:count], found[count : 2 * count], weights, strict=True)))
            return loss, sum(found[2 * count :])

        return read


class HostCopy:
    """Numbers on their way from a device to the host."""

    def __init__(self, values: Tensor) -> None:
        self.event = torch.cuda.Event() if values.device.type == "cuda" else None
        self.host = torch.empty(values.shape, dtype=values.dtype, pin_memory=self.event is not None)
        self.host.copy_(values, non_blocking=True)
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """Return the numbers; waits until they are there, not for what the device was given afterwards."""
        if self.event is not None:
            self.event.synchronize()
        found: list[float] = self.host.tolist()
        return found


def _mean_loss(parts: list[tuple[float, float, float]]) -> float:
    # The log shows the criterion, comparable between methods; a non-finite loss is reported whatever its source.
    return sum((loss if math.isfinite(whole) else whole) * weight for loss, whole, weight in parts)


def can_skip_update(state: TrainState) -> bool:
    """Return True if the optimizer leaves everything as it is where a number on the device says so.

    Fused Adam and AdamW of torch do. Fused SGD does not: it would keep a momentum buffer that was never filled.
    """
    fused = all(group.get("fused") for group in state.optimizer.param_groups)
    return fused and isinstance(state.optimizer, (torch.optim.AdamW, torch.optim.Adam))


def scale_loss(state: TrainState, loss: Tensor) -> Tensor:
    """Return the loss that gradients are computed of: scaled in fp16, and then NaN if it is not finite."""
    if state.scaler is None:
        return loss
    finite = loss.detach().isfinite()
    return state.scaler.scale(loss * torch.where(finite, 1.0, math.nan))


def step_optimizer(state: TrainState, skip: Tensor | None) -> None:
    """Update the weights, unless gradients overflow in fp16 or `skip` is 1; then nothing changes but the scale.

    Args:
        skip: of `StepLoss.not_finite`, for an optimizer of `can_skip_update`; None: the numbers have been read.
    """
    optimizer = state.optimizer
    if state.scaler is not None:
        state.scaler.step(optimizer)
        state.scaler.update()
    elif skip is None:
        optimizer.step()
    else:
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
