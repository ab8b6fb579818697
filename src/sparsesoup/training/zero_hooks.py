"""Keep pruned weights at zero while another training loop trains the model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsesoup.core.masks import Masks


def zeros_of(model: nn.Module, names: Any) -> Masks:
    """Return the masks given by the zeros of a pruned model, for these parameters."""
    params = dict(model.named_parameters())
    return {name: params[name].detach() != 0 for name in names}


def hold_zeros(model: nn.Module, optimizer: Optimizer, masks: Masks) -> Callable[[], None]:
    """Keep pruned weights at exactly zero in any training loop, with any optimizer.

    Gradients of pruned weights are zeroed as they are computed, before any clipping; after each `optimizer.step()` the
    weights are zeroed too.

    Args:
        model: the model to train; its parameters have the names of the masks.
        optimizer: any torch optimizer.
        masks: name -> bool, True = kept, as returned by `sparsesoup.core.ticket.load_masks`.
    Returns: a function that removes the hooks.
    Raises: ValueError if the model lacks a masked parameter or its shape differs.

    >>> layer = nn.Linear(2, 2)
    >>> optimizer = torch.optim.AdamW(layer.parameters())
    >>> stop = hold_zeros(layer, optimizer, {"weight": torch.eye(2) > 0})
    """
    params = _matching_parameters(model, masks)
    handles: list[RemovableHandle] = []
    for name, parameter in params.items():
        mask = masks[name].to(parameter.device)
        handles.append(parameter.register_post_accumulate_grad_hook(_zero_gradient(mask)))
    handles.append(optimizer.register_step_post_hook(lambda *_: zero_pruned_(params, masks)))
    zero_pruned_(params, masks)

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop


@torch.no_grad()
def zero_pruned_(params: dict[str, Parameter], masks: Masks) -> None:
    """Set pruned weights to exactly zero."""
    for name, parameter in params.items():
        parameter.masked_fill_(~masks[name].to(parameter.device), 0.0)


def _zero_gradient(mask: torch.Tensor) -> Callable[[Parameter], None]:
    def hook(parameter: Parameter) -> None:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(~mask, 0.0)

    return hook


def _matching_parameters(model: nn.Module, masks: Masks) -> dict[str, Parameter]:
    params = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in params:
            raise ValueError(f"the model has no parameter {name} to hold at zero")
        if params[name].shape != mask.shape:
            raise ValueError(f"{name} has shape {tuple(params[name].shape)}, its mask {tuple(mask.shape)}")
    return {name: params[name] for name in masks}
