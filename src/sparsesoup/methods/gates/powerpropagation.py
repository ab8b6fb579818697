"""Powerpropagation: weights seen through a power, so that large ones learn fast and small ones stay small."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize


class _PowerFunction(torch.autograd.Function):
    """v |v|^(alpha - 1), whose derivative alpha |v|^(alpha - 1) is finite at 0.

    Left to autograd, the derivative of the second factor is infinite there for alpha < 2, and times v NaN.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.alpha = alpha
        return _power_factor(v, alpha).mul_(v)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]  # torch has no type for it in some versions
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return _power_factor(v, ctx.alpha).mul_(gradient).mul_(ctx.alpha), None


def _power_factor(v: Tensor, alpha: float) -> Tensor:
    """|v|^(alpha - 1), in a tensor of its own."""
    return v.abs() if alpha == 2.0 else v.abs().pow_(alpha - 1.0)


class PowerParametrization(nn.Module):
    """w = sign(v) |v|^alpha in the place of a weight. Schwarz et al. 2021.

    Zero is zero on both sides and the order of magnitudes is the same, so masks of v are masks of w.

    Args:
        alpha: at least 1, which changes nothing.

    >>> PowerParametrization(2.0)(torch.tensor([-3.0, 0.0, 0.5])).tolist()
    [-9.0, 0.0, 0.25]
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, v: Tensor) -> Tensor:
        """The weight that the model works with."""
        weight: Tensor = _PowerFunction.apply(v, self.alpha)
        return weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        """v_0 = sign(w) |w|^(1 / alpha): the model begins with the weights it had."""
        return weight.abs().pow(1.0 / self.alpha).copysign(weight)


def attach_power(model: nn.Module, names: Iterable[str], alpha: float) -> None:
    """Put the power before these weights: from now on `v` is what is trained, under `parametrizations.*.original`."""
    for name in names:
        owner, _, own = name.rpartition(".")
        parametrize.register_parametrization(model.get_submodule(owner), own, PowerParametrization(alpha))


def fold_power_(model: nn.Module, names: Iterable[str]) -> None:
    """Write the weights in the place of v and take the power away: plain names, the same answers."""
    for name in names:
        owner, _, own = name.rpartition(".")
        parametrize.remove_parametrizations(model.get_submodule(owner), own, leave_parametrized=True)
