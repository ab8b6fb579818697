"""A copy of a model computes with its own weights, whatever stands in front of its forward pass."""

import functools
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparsesoup.training.model_copy import copy_model


def wrap_closure(model: nn.Module) -> None:
    before = model.forward

    @functools.wraps(before)
    def forward(self: nn.Module, x: torch.Tensor, *, more: float = 1.0) -> torch.Tensor:
        assert self is not None
        return before(x) + more

    model.forward = types.MethodType(forward, model)


def wrap_partial(model: nn.Module) -> None:
    model.forward = functools.partial(lambda before, x: before(x) + 1.0, model.forward)


def wrap_twice(model: nn.Module) -> None:
    wrap_closure(model)
    wrap_partial(model)


@pytest.mark.parametrize("wrap", [wrap_closure, wrap_partial, wrap_twice])
def test_a_wrapped_forward_pass_is_that_of_the_copy(wrap: Callable[[nn.Module], None]) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.ones(1, 3)
    wrap(model)
    wrap(model[1])
    before = model(x)
    copied = copy_model(model)
    assert torch.equal(copied(x), before)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    times = 2.0 if wrap is wrap_twice else 1.0
    assert torch.equal(copied(x), torch.full((1, 2), 2 * times))  # one of the last layer, one of the whole
    assert torch.equal(model(x), before)
