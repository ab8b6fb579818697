"""Losses that come from users: which model they compute with, and how a Trainer's is used for another model."""

import inspect
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from sparsesoup.core.errors import UserError, one_line, require


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


class TrainerLoss:
    """(model, batch) -> (loss, outputs) of a Trainer, its own `compute_loss` included; `alone` gives the loss only.

    Where a user has a loss of their own, it gets the number of labels of the batch, as from the Trainer.

    Args:
        compute_loss: that of the Trainer, for any model.
    """

    def __init__(self, trainer: Trainer, compute_loss: Callable[..., Any]) -> None:
        self.trainer, self.compute_loss = trainer, compute_loss
        self.parameters = inspect.signature(trainer.compute_loss).parameters
        own = not str(type(trainer).compute_loss.__module__).startswith("transformers.")
        self.counts = (own or trainer.compute_loss_func is not None) and "num_items_in_batch" in self.parameters

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        if "return_outputs" not in self.parameters:
            return self.alone(model, batch), None
        loss, outputs = self.compute_loss(model, batch, return_outputs=True, **self._items(batch))
        return loss, outputs[1:] if isinstance(outputs, tuple) else outputs

    def alone(self, model: nn.Module, batch: Any) -> Any:
        """Return the loss of a batch; outputs may cost a Trainer another pass (TRL's fused heads)."""
        return self.compute_loss(model, batch, **self._items(batch))

    def _items(self, batch: Any) -> dict[str, Any]:
        if not self.counts:
            return {}
        return {"num_items_in_batch": self.trainer._get_num_items_in_batch([batch], self.trainer.args.device)}


class CheckedLoss:
    """A user's (model, batch) -> mean loss, or (mean loss, outputs), as a function that returns the loss alone.

    Raises: UserError if that is no tensor of one number, or, in the first training pass, not of the model's weights.
    """

    def __init__(self, loss: Callable[[nn.Module, Any], Any]) -> None:
        self.loss, self.checked = loss, False

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        found = self.loss(model, batch)
        only = scalar_loss(found[0] if isinstance(found, tuple) and len(found) == 2 else found)
        if not self.checked and model.training and torch.is_grad_enabled():
            require_own_parameters(only, model)
            self.checked = True
        return only


def scalar_loss(loss: Any) -> Tensor:
    """Return a loss that a user's function gave; raise a UserError unless it is a tensor of one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        kind = f"a {type(loss).__name__} of {len(loss)}" if isinstance(loss, Sized) else one_line(repr(loss))[:80]
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else kind
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
        "it does not use the model that it is given, which may be a copy of yours; write loss=lambda model, batch: ... "
        "with that model",
        "loss",
    )
