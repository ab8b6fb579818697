"""Settings changed for the duration of a training: weight decay, dropout, trained parameters."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from sparsesoup.training.config import TrainingConfig, TrainingOverrides
from sparsesoup.training.state import TrainState


@contextmanager
def apply_overrides(state: TrainState, training: TrainingConfig, protocol: TrainingOverrides | None) -> Iterator[None]:
    """Apply the dropout of a training, and a run's overrides of weight decay and dropout, for its duration."""
    protocol = TrainingOverrides() if protocol is None else protocol
    decays = [group["weight_decay"] for group in state.optimizer.param_groups]
    try:
        for group in state.optimizer.param_groups:
            if protocol.weight_decay is not None and group["decays"]:
                group["weight_decay"] = protocol.weight_decay
        with dropout_set_to(state.model, training.dropout if protocol.dropout is None else protocol.dropout):
            yield
    finally:
        for group, decay in zip(state.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay


@contextmanager
def dropout_set_to(model: nn.Module, probability: float | None) -> Iterator[None]:
    """Set all dropout probabilities of a model within the block; None leaves them."""
    drops = [] if probability is None else find_dropouts(model)
    try:
        for owner, name, _ in drops:
            setattr(owner, name, probability)
        yield
    finally:
        for owner, name, value in drops:
            setattr(owner, name, value)


def find_dropouts(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Return all dropout probabilities of a model: (module, attribute, value); attention has some as plain numbers."""
    found: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout", "dropout_p", "drop_prob"):
            value = getattr(module, name, None)
            if isinstance(value, float) and (name != "p" or isinstance(module, nn.modules.dropout._DropoutNd)):
                found.append((module, name, value))
    return found


@contextmanager
def only_trained(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Freeze all but the named parameters of a model within the block."""
    others = [p for name, p in model.named_parameters() if p.requires_grad and name not in names]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
