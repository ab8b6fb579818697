"""How much gates let through: measured, set, and penalised."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsesoup.gates.base import gates
from sparsesoup.gates.straight import Gate
from sparsesoup.patterns import Tie
from sparsesoup.select import Scope, levels
from sparsesoup.state import TrainState
from sparsesoup.targets import Targets, parameters


def sizes(ties: tuple[Tie, ...], targets: Targets) -> list[int]:
    """Prunable weights in one group of each tie; a bias that goes along is not counted."""
    areas = []
    for tie in ties:
        inside = [(name, block) for name, block in tie.members if name in targets]
        tiles = [block.tile(targets[name].shape, name) for name, block in inside]
        areas.append(sum(rows * cols for rows, cols in tiles))
    return areas


def firsts(model: nn.Module) -> dict[int, tuple[str, Gate]]:
    """One gate of each tie, with the name of its parameter: it knows the scores of all."""
    found: dict[int, tuple[str, Gate]] = {}
    for name, gate in gates(model):
        found.setdefault(gate.tie, (name, gate))
    return found


def worths(state: TrainState) -> dict[int, Tensor]:
    """What each group is worth, by tie."""
    params = parameters(state.model, state.targets)
    return {tie: gate.worth(params[name]) for tie, (name, gate) in firsts(state.model).items()}


def set_levels_(state: TrainState, areas: list[int], sparsity: float, scope: Scope) -> None:
    """Close the gates of the groups worth least, so that this share of all weights is masked, up to ties."""
    named = {str(tie): score for tie, score in worths(state).items()}
    found = levels(named, {name: areas[int(name)] for name in named}, sparsity, scope)
    for _, gate in gates(state.model):
        gate.level.fill_(found[str(gate.tie)])


def masked_share(state: TrainState, areas: list[int]) -> float:
    """The share of the prunable weights that closed gates mask."""
    first = firsts(state.model)
    counts = {tie: (int((w >= first[tie][1].level).sum()), w.numel()) for tie, w in worths(state).items()}
    return 1.0 - sum(n * areas[t] for t, (n, _) in counts.items()) / sum(n * areas[t] for t, (_, n) in counts.items())


def penalty(share: Callable[[TrainState], float], weights: Mapping[int, float], shift: float = 0.0) -> Any:
    """The penalty share * sum over ties of weight * mean sigmoid(score - shift) / ties. Sanh et al. 2020, sec. 4.

    Args:
        share: what it weighs in the loss at the present step.
        weights: tie -> weight of its family.
    """

    def term(state: TrainState) -> Tensor:
        first = firsts(state.model)
        scores = [gate.score for _, gate in first.values()]
        return share(state) * MeanOpen.apply(shift, [weights[t] / len(first) for t in first], *scores)

    return term


class MeanOpen(torch.autograd.Function):
    """Sum of weight * mean sigmoid(score - shift): nothing is kept for the way back but the scores themselves."""

    @staticmethod
    def forward(ctx: Any, shift: float, weights: list[float], *scores: Tensor) -> Tensor:
        ctx.shift, ctx.weights = shift, weights
        ctx.save_for_backward(*scores)
        means = [w * (s.detach() - shift).sigmoid_().mean() for w, s in zip(weights, scores, strict=True)]
        return torch.stack(means).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = []
        for weight, score in zip(ctx.weights, ctx.saved_tensors, strict=True):
            slope = (score.detach() - ctx.shift).sigmoid_()
            slope = torch.addcmul(slope, slope, slope, value=-1)
            found.append(slope.mul_(grads[0] * (weight / score.numel())))
        return None, None, *found
