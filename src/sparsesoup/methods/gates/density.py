"""Density of gates: measure and set the masked share."""

import torch
from torch import Tensor, nn

from sparsesoup.core.granularity import CoupledGroups
from sparsesoup.core.masking import Scope, score_thresholds
from sparsesoup.core.targets import Targets, target_parameters
from sparsesoup.methods.gates.attach import gates_of
from sparsesoup.methods.gates.score_samples import sample_flat
from sparsesoup.methods.gates.straight_through import StraightThroughGate
from sparsesoup.training.state import TrainState

SAMPLE = 1 << 14


def group_sizes(groups: tuple[CoupledGroups, ...], targets: Targets) -> list[int]:
    """Return the prunable weights in one group, for each of the coupled groups."""
    shapes = {name: target.shape for name, target in targets.items()}
    return [coupled.group_size(shapes) for coupled in groups]


def first_gate_per_group(model: nn.Module) -> dict[int, tuple[str, StraightThroughGate]]:
    """Return one gate per coupled groups, with its parameter name; it holds the scores of all members."""
    found: dict[int, tuple[str, StraightThroughGate]] = {}
    for name, gate in gates_of(model):
        found.setdefault(gate.coupled, (name, gate))
    return found


def group_scores(state: TrainState) -> dict[int, Tensor]:
    """Return the score of each group."""
    first = first_gate_per_group(state.model)
    bare = any(gate.score is None for _, gate in first.values())  # then a weight is its own score
    params = target_parameters(state.model, state.targets) if bare else {}
    return {
        coupled: gate.group_scores(params[name] if gate.score is None else gate.score)
        for coupled, (name, gate) in first.items()
    }


def set_thresholds_(state: TrainState, areas: list[int], sparsity: float, scope: Scope) -> None:
    """Set thresholds that close the lowest-scored groups, so that this share of all weights is masked, up to ties."""
    named = {str(coupled): score for coupled, score in group_scores(state).items()}
    found = score_thresholds(named, {name: areas[int(name)] for name in named}, sparsity, scope)
    for _, gate in gates_of(state.model):
        gate.level.fill_(found[str(gate.coupled)])


def masked_share(state: TrainState, areas: list[int], exact: bool = False) -> float:
    """Return the share of prunable weights masked by closed gates; estimated on a sample unless `exact`."""
    first, scores = first_gate_per_group(state.model), group_scores(state)
    some = {coupled: s.flatten() if exact else sample_flat(s, SAMPLE) for coupled, s in scores.items()}
    counts = torch.stack(
        [torch.count_nonzero(part >= first[coupled][1].level) for coupled, part in some.items()]
    ).tolist()
    opened, total = 0.0, 0
    for (coupled, score), count in zip(scores.items(), counts, strict=True):
        weights = score.numel() * areas[coupled]
        opened += count / len(some[coupled]) * weights
        total += weights
    return 1.0 - opened / total
