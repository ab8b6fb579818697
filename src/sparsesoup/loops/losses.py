"""Losses that come from users: which model they compute with, and how a Trainer's is used for another model."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from sparsesoup.core.errors import UserError, require


@contextmanager
def borrowed_loss(trainer: Trainer) -> Iterator[Callable[..., Any]]:
    """Give a Trainer's `compute_loss` for other models than its own; it has its own again afterwards.

    A Trainer may keep the model in a loss object (sentence-transformers), where it exchanges it for the one it trains.
    """
    own = trainer.model, trainer.model_wrapped
    losses = [value for value in vars(trainer).values() if isinstance(value, nn.Module) and value not in own]
    parts = {module: dict(module._modules) for value in losses for module in value.modules()}

    def compute_loss(model: nn.Module, batch: Any, **more: Any) -> Any:
        trainer.model = trainer.model_wrapped = model
        return trainer.compute_loss(model, dict(batch), **more)

    try:
        yield compute_loss
    finally:
        trainer.model, trainer.model_wrapped = own
        for module, before in parts.items():
            module._modules.update(before)


def check_function(function: Any, name: str, *parameters: str) -> None:
    """Raise a UserError if an argument is no function, or one that takes other parameters; None is allowed."""
    require(function is None or callable(function), name, "a function", repr(function))
    try:
        own = inspect.signature(function) if function is not None else None
    except (ValueError, TypeError):  # it has no signature
        return
    try:
        _ = own.bind(*parameters) if own is not None else None
    except TypeError as error:
        raise UserError(f"it is called with ({', '.join(parameters)}), and is a function of {own}", name) from error


def check_loss(loss: Any) -> None:
    """Raise a UserError if a loss argument is no function, or one of torch's, which take (outputs, labels)."""
    made_by = getattr(loss, "__module__", "")
    if made_by in ("torch.nn.functional", "torch.nn.modules.loss"):
        name = getattr(loss, "__name__", type(loss).__name__)
        raise UserError(
            f"is a function of (model, batch), and {name} takes (outputs, labels); write, for example, "
            f"loss=lambda model, batch: {name}{'()' if isinstance(loss, nn.Module) else ''}(model(batch[0]), batch[1])",
            "loss",
        )
    check_function(loss, "loss", "model", "batch")


def scalar_loss(loss: Any) -> Tensor:
    """Return a loss that a user's function gave; raise a UserError unless it is a tensor of one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise UserError(f"the loss of a batch must be a tensor of one number, a mean over rows, got {got}", "loss")
    return loss


def require_own_parameters(loss: Tensor, model: nn.Module) -> None:
    """Raise a UserError if a loss was computed with other parameters than those of the model that is trained."""
    if not loss.requires_grad:
        raise UserError(
            "it has no gradient; compute it without detach() or no_grad(), of a model that has weights to train", "loss"
        )
    own, seen, waiting = {id(p) for p in model.parameters()}, set[Any](), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in own:
            return
        seen.add(node)
        waiting += [other for other, _ in node.next_functions]
    raise UserError(
        "the loss does not use the model that it is given, which is a copy of yours; write loss=lambda model, batch: "
        "... with that model, or keep your own loop with PruningCallback or attach"
    )
