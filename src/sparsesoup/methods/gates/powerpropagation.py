"""Powerpropagation: weights reparametrized by a power, so that large ones learn fast and small ones stay small."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize


class _PowerFunction(torch.autograd.Function):
    """v |v|^(alpha - 1), whose derivative alpha |v|^(alpha - 1) is finite at 0.

    Under autograd, the derivative of the second factor is infinite there for alpha < 2, and times v NaN.
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
    """Return |v|^(alpha - 1) in a new tensor."""
    return v.abs() if alpha == 2.0 else v.abs().pow_(alpha - 1.0)


class PowerParametrization(nn.Module):
    """Reparametrize a weight as w = sign(v) |v|^alpha. Schwarz et al. 2021.

    Zeros and the order of magnitudes are the same for v and w, so masks of v are masks of w.

    Args:
        alpha: at least 1; 1 is the identity.

    >>> PowerParametrization(2.0)(torch.tensor([-3.0, 0.0, 0.5])).tolist()
    [-9.0, 0.0, 0.25]
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, v: Tensor) -> Tensor:
        """Return the weight w used by the model."""
        weight: Tensor = _PowerFunction.apply(v, self.alpha)
        return weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return v_0 = sign(w) |w|^(1 / alpha), so that the model starts with its own weights."""
        return weight.abs().pow(1.0 / self.alpha).copysign(weight)


def attach_power(model: nn.Module, names: Iterable[str], alpha: float) -> None:
    """Reparametrize these weights; training then updates `v`, under `parametrizations.*.original`."""
    for name in names:
        owner, _, own = name.rpartition(".")
        parametrize.register_parametrization(model.get_submodule(owner), own, PowerParametrization(alpha))


def fold_power_(model: nn.Module, names: Iterable[str]) -> None:
    """Replace v by the weights w and remove the parametrization: original names, the same outputs."""
    for name in names:
        owner, _, own = name.rpartition(".")
        parametrize.remove_parametrizations(model.get_submodule(owner), own, leave_parametrized=True)
