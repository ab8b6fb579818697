"""How much gates let through: measured, set, and penalised."""

from torch import Tensor, nn

from sparsesoup.core.granularity import Tie
from sparsesoup.core.masking import Scope, levels
from sparsesoup.core.targets import Targets, parameters
from sparsesoup.methods.gates.attach import gates
from sparsesoup.methods.gates.straight_through import Gate
from sparsesoup.training.state import TrainState

SAMPLE = 1 << 14


def sizes(ties: tuple[Tie, ...], targets: Targets) -> list[int]:
    """Prunable weights in one group of each tie."""
    shapes = {name: target.shape for name, target in targets.items()}
    return [tie.area(shapes) for tie in ties]


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


def masked_share(state: TrainState, areas: list[int], exact: bool = False) -> float:
    """The share of the prunable weights that closed gates mask; of many scores a tie, a sample is looked at."""
    first, opened, total = firsts(state.model), 0.0, 0
    for tie, score in worths(state).items():
        some = score.flatten()[:: 1 if exact else max(1, score.numel() // SAMPLE)]
        weights = score.numel() * areas[tie]
        opened += float((some >= first[tie][1].level).sum()) / len(some) * weights
        total += weights
    return 1.0 - opened / total
