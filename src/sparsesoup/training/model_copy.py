"""Copies of models whose forward pass another library has wrapped."""

import copy
import functools
import types
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def copy_model(model: M) -> M:
    """Return a deep copy of a model that computes with its own weights.

    copy.deepcopy leaves functions as they are. So a `forward` that a library has set on the object (TRL's fused head,
    accelerate's casts) and that holds the bound method of the model would go on computing with the model copied from.

    >>> import torch
    >>> layer = nn.Linear(2, 1)
    >>> layer.forward = functools.partial(lambda forward, x: forward(x) + 1, layer.forward)
    >>> copied = copy_model(layer)
    >>> _ = nn.init.zeros_(copied.weight), nn.init.zeros_(copied.bias)
    >>> copied(torch.ones(1, 2)).item()
    1.0
    """
    copied = copy.deepcopy(model)
    modules: dict[int, Any] = {id(old): new for old, new in zip(model.modules(), copied.modules(), strict=True)}
    for old, new in zip(model.modules(), copied.modules(), strict=True):
        if "forward" in vars(old):
            new.__dict__["forward"] = _rebound(vars(old)["forward"], modules)
    return copied


def _rebound(value: Any, modules: dict[int, Any]) -> Any:
    """Return a function, and the functions inside it, with the modules of the copy; `modules` keeps what was seen."""
    if id(value) in modules:
        return modules[id(value)]
    if isinstance(value, types.MethodType):
        return types.MethodType(_rebound(value.__func__, modules), _rebound(value.__self__, modules))
    if isinstance(value, functools.partial):
        args = [_rebound(argument, modules) for argument in value.args]
        return functools.partial(
            _rebound(value.func, modules), *args, **{k: _rebound(v, modules) for k, v in value.keywords.items()}
        )
    if isinstance(value, types.FunctionType) and value.__closure__:
        return _with_cells(value, modules)
    return value


def _with_cells(function: types.FunctionType, modules: dict[int, Any]) -> types.FunctionType:
    modules[id(function)] = function  # one that calls itself
    before = [cell.cell_contents for cell in function.__closure__ or ()]
    after = [_rebound(content, modules) for content in before]
    if all(new is old for new, old in zip(after, before, strict=True)):
        return function
    cells = tuple(types.CellType(content) for content in after)
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update({name: _rebound(value, modules) for name, value in function.__dict__.items()})
    return made
