"""Soups: averages of weights that descend from one model."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState, named_weights

Weights = dict[str, Tensor]  # parameters and buffers of a model, each once


def clone_weights(model: nn.Module) -> Weights:
    """A copy of the parameters and buffers of a model."""
    return {name: t.detach().clone() for name, t in named_weights(model).items()}


@torch.no_grad()
def load_weights_(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Give a model these weights, in place.

    Raises: ValueError if they are not those of such a model.
    """
    own = named_weights(model)
    if own.keys() != given.keys():
        raise ValueError(f"weights of another model: {', '.join(sorted(own.keys() ^ given.keys())[:5])}")
    for name, t in own.items():
        t.copy_(given[name])


@torch.no_grad()
def interpolate_weights(one: Mapping[str, Tensor], other: Mapping[str, Tensor], share: float) -> Weights:
    """(1 - share) * one + share * other. Share 0 is the one to the bit, share 1 the other.

    What holds no real numbers (counters, positions) is taken from the one.

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
    """The mean of the members' weights. Wortsman et al. 2022, sec. 2.

    Two sets are held at a time, however many there are. Where all members are zero so is the mean: members that share a
    mask make a soup that has it.

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
    """What selects between soups: the first score on the validation rows. On the meter."""
    return next(iter(problem.validate(state.model).values()))
