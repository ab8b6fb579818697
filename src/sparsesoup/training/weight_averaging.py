"""Soups: averages of the weights of models fine-tuned from the same one."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState, named_weights

Weights = dict[str, Tensor]  # parameters and buffers of a model, each once


def clone_weights(model: nn.Module) -> Weights:
    """Return a copy of the parameters and buffers of a model."""
    return {name: t.detach().clone() for name, t in named_weights(model).items()}


@torch.no_grad()
def load_weights_(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Load these weights into a model, in place.

    Raises: ValueError if the names do not match the model's.
    """
    own = named_weights(model)
    if own.keys() != given.keys():
        raise ValueError(f"weights of another model: {', '.join(sorted(own.keys() ^ given.keys())[:5])}")
    for name, t in own.items():
        t.copy_(given[name])


@torch.no_grad()
def interpolate_weights(one: Mapping[str, Tensor], other: Mapping[str, Tensor], share: float) -> Weights:
    """Return (1 - share) * one + share * other. Share 0 is exactly `one`, share 1 exactly `other`.

    Tensors that are not floating-point (counters, positions) are taken from `one`.

    >>> interpolate_weights({"w": torch.tensor([0.0, 8.0])}, {"w": torch.tensor([4.0, 0.0])}, 0.25)["w"].tolist()
    [1.0, 6.0]
    """
    if one.keys() != other.keys():
        raise ValueError(f"weights name different parameters: {', '.join(sorted(one.keys() ^ other.keys())[:5])}")
    return {
        name: torch.lerp(t, other[name].to(t.device), share) if t.is_floating_point() else t.clone()
        for name, t in one.items()
    }


def average_weights(members: Iterable[Mapping[str, Tensor]]) -> Weights:
    """Return the mean of the members' weights. Wortsman et al. 2022, sec. 2.

    Holds two sets at a time, whatever their number. The mean is zero where all members are zero: members that share a
    mask make a soup with the same mask.

    Raises: ValueError if there is no member.

    >>> average_weights([{"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([0.0, 3.0])}])["w"].tolist()
    [0.0, 2.0]
    """
    mean: Weights | None = None
    for count, member in enumerate(members, start=1):
        mean = interpolate_weights(member if mean is None else mean, member, 1 / count)
    if mean is None:
        raise ValueError("an average needs at least one member")
    return mean


def validation_score(problem: Problem, state: TrainState) -> float:
    """Return the score that selects between soups: the first one on the validation rows. The cost is recorded."""
    return next(iter(problem.validate(state.model).values()))
