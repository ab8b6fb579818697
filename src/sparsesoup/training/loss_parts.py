"""Parts of a training loss, and their separate gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsesoup.training.state import TrainState
from sparsesoup.training.step_loss import scale_loss


@dataclass(frozen=True)
class LossParts:
    """The training loss of a batch in two parts; it is their sum.

    Args:
        answers: loss of the model's outputs, against labels and a teacher's outputs.
        states: distances from a teacher's hidden states and attention maps; none: not compared.

    >>> import torch
    >>> float(LossParts(torch.tensor(2.0), (torch.tensor(0.5),)).total)
    2.5
    """

    answers: Tensor
    states: tuple[Tensor, ...] = ()

    @property
    def total(self) -> Tensor:
        """The sum of the parts."""
        return sum(self.states, start=self.answers)


class SeparateGradients:
    """Gradients of a part of the loss, kept separate from those that a method observes, and added afterwards.

    Args:
        params: the trained parameters.
    """

    def __init__(self, params: Sequence[Parameter]) -> None:
        self._params = params
        self._separate: list[Tensor | None] = [None] * len(params)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put these gradients in the place of the others within the block, so that a backward pass adds to them."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def observe_and_add_(self, state: TrainState, observe: Callable[[TrainState], None] | None) -> None:
        """Pass the gradients without these to a method, in the scale of the loss; then add these, and clear them.

        Args:
            observe: None if they are not finite.
        """
        if observe is not None:
            scale = 1.0 if state.scaler is None else float(state.scaler.get_scale())  # a power of two: nothing is lost
            self._multiply(1.0 / scale)
            observe(state)
            self._multiply(scale)
        for parameter, separate in zip(self._params, self._separate, strict=True):
            if separate is not None:
                parameter.grad = separate if parameter.grad is None else parameter.grad.add_(separate)
        self._separate = [None] * len(self._params)

    def _multiply(self, factor: float) -> None:
        for parameter in self._params if factor != 1.0 else ():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def _swap(self) -> None:
        before = [parameter.grad for parameter in self._params]
        for parameter, separate in zip(self._params, self._separate, strict=True):
            parameter.grad = separate
        self._separate = before


def backward_parts(
    state: TrainState, parts: LossParts, pull: Tensor | None, weight: float, separate: SeparateGradients | None
) -> Tensor:
    """Add the gradients of a loss and a penalty, those of the states separately if requested; return loss and penalty.

    Args:
        pull: the penalty, if any.
        weight: factor on both.
        separate: keeps the gradients of the states; None: they are added to the others.
    """
    whole, first = (part if pull is None else part + pull for part in (parts.total, parts.answers))
    split = separate is not None and bool(parts.states)
    scale_loss(state, (first if split else whole) * weight).backward(retain_graph=split)  # accelerate would use its own
    if separate is not None and parts.states:
        with separate.in_place():
            scale_loss(state, torch.stack(parts.states).sum() * weight).backward()
    return whole
