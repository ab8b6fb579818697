"""Density of gates: measure and set the masked share."""

import torch
from torch import Tensor, nn

from sparsesoup.core.granularity import CoupledGroups
from sparsesoup.core.masking import Scope, score_thresholds
from sparsesoup.core.targets import Targets, target_parameters
from sparsesoup.methods.gates.attach import gates_of
from sparsesoup.methods.gates.straight_through import StraightThroughGate
from sparsesoup.training.state import TrainState

SAMPLE = 1 << 14


def group_sizes(ties: tuple[CoupledGroups, ...], targets: Targets) -> list[int]:
    """Return the prunable weights in one group, for each of the coupled groups."""
    shapes = {name: target.shape for name, target in targets.items()}
    return [tie.group_size(shapes) for tie in ties]


def first_gate_per_group(model: nn.Module) -> dict[int, tuple[str, StraightThroughGate]]:
    """Return one gate per coupled groups, with its parameter name; it holds the scores of all members."""
    found: dict[int, tuple[str, StraightThroughGate]] = {}
    for name, gate in gates_of(model):
        found.setdefault(gate.tie, (name, gate))
    return found


def group_scores(state: TrainState) -> dict[int, Tensor]:
    """Return the score of each group."""
    first = first_gate_per_group(state.model)
    bare = any(gate.score is None for _, gate in first.values())  # then a weight is its own score
    params = target_parameters(state.model, state.targets) if bare else {}
    return {
        tie: gate.group_scores(params[name] if gate.score is None else gate.score)
        for tie, (name, gate) in first.items()
    }


def set_thresholds_(state: TrainState, areas: list[int], sparsity: float, scope: Scope) -> None:
    """Set thresholds that close the lowest-scored groups, so that this share of all weights is masked, up to ties."""
    named = {str(tie): score for tie, score in group_scores(state).items()}
    found = score_thresholds(named, {name: areas[int(name)] for name in named}, sparsity, scope)
    for _, gate in gates_of(state.model):
        gate.level.fill_(found[str(gate.tie)])


def masked_share(state: TrainState, areas: list[int], exact: bool = False) -> float:
    """Return the share of prunable weights masked by closed gates; estimated on a sample unless `exact`."""
    first, scores = first_gate_per_group(state.model), group_scores(state)
    some = {tie: s.flatten()[:: 1 if exact else max(1, s.numel() // SAMPLE)] for tie, s in scores.items()}
    counts = torch.stack([torch.count_nonzero(part >= first[tie][1].level) for tie, part in some.items()]).tolist()
    opened, total = 0.0, 0
    for (tie, score), count in zip(scores.items(), counts, strict=True):
        weights = score.numel() * areas[tie]
        opened += count / len(some[tie]) * weights
        total += weights
    return 1.0 - opened / total
