"""Attach gates to a model before its optimizer is built; fold them before anything is saved."""

from collections.abc import Callable, Iterator
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrize

from sparsesoup.core.granularity import CoupledGroups
from sparsesoup.core.targets import Targets, bias_of, target_parameters
from sparsesoup.methods.gates.bias import BiasGate
from sparsesoup.methods.gates.score_groups import group_gates
from sparsesoup.methods.gates.straight_through import StraightThroughGate, floor_count
from sparsesoup.training.state import TrainState

Kind = TypeVar("Kind", bound=nn.Module)
_ATTACHED: WeakKeyDictionary[nn.Module, list[tuple[str, nn.Module]]] = WeakKeyDictionary()  # until gates change
Make = Callable[[int, int, CoupledGroups], nn.Module]  # (group index, member index, groups) -> gate of that member


def attach_gates(model: nn.Module, groups: tuple[CoupledGroups, ...], make: Make) -> list[Parameter]:
    """Put a gate on every member of the coupled groups; return the parameters that the gates train, each once."""
    learned: dict[int, Parameter] = {}
    gates: list[nn.Module] = []
    for number, coupled in enumerate(groups):
        for member, (name, _) in enumerate(coupled.members):
            owner, _, own = name.rpartition(".")
            gate = make(number, member, coupled)
            # The result has the shape of the weight; torch's check would run the gate, and its random noise, once more.
            parametrize.register_parametrization(model.get_submodule(owner), own, gate, unsafe=True)
            learned |= {id(p): p for p in gate.parameters()}
            gates.append(gate)
    group_gates(gate for gate in gates if isinstance(gate, StraightThroughGate))
    _ATTACHED.pop(model, None)
    return list(learned.values())


def attach_biases(model: nn.Module, targets: Targets) -> None:
    """Gate the bias of every gated matrix, so that a fully masked row outputs zero."""
    for name, gate in list(gates_of(model)):
        owner, _, own = bias_of(name).rpartition(".")
        if own and len(targets[name].shape) == 2 and getattr(model.get_submodule(owner), own, None) is not None:
            new = BiasGate(gate, targets[name].shape, targets[name].transposed)
            parametrize.register_parametrization(model.get_submodule(owner), own, new, unsafe=True)
    _ATTACHED.pop(model, None)


def gates_of(model: nn.Module) -> Iterator[tuple[str, StraightThroughGate]]:
    """Yield (name of the gated parameter, its gate), grouped by coupled groups."""
    yield from _attached_of_kind(model, StraightThroughGate)


def _attached_of_kind(model: nn.Module, kind: type[Kind]) -> Iterator[tuple[str, Kind]]:
    """Yield (name of the parameter, its gate); a walk over all modules a few times a step would take milliseconds."""
    if model not in _ATTACHED:
        _ATTACHED[model] = list(_find_attached(model))
    yield from ((name, module) for name, module in _ATTACHED[model] if isinstance(module, kind))


def _find_attached(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, (StraightThroughGate, BiasGate)):
            owner, _, rest = f".{name}".partition(".parametrizations.")
            yield f"{owner}.{rest.split('.')[-2]}".lstrip("."), module


def underlying_weight(model: nn.Module, name: str) -> Parameter:
    """Return the weight behind a gate."""
    owner, _, own = name.rpartition(".")
    return model.get_parameter(f"{owner}.parametrizations.{own}.original".lstrip("."))


def weight_scores(state: TrainState, floor: float = 0.0) -> dict[str, Tensor]:
    """Return the gates' score for each weight; higher = keep.

    Args:
        floor: give infinite scores to just over this share of each gate's groups, the best ones.
    """
    found: dict[str, Tensor] = {}
    params = target_parameters(state.model, state.targets)
    for name, gate in gates_of(state.model):
        if name in params:
            score = gate.group_scores(params[name])
            if least := floor_count(score.numel(), floor):
                score = score.masked_fill(score >= score.flatten().topk(least).values[-1], torch.inf)
            found[name] = gate.expand_to_weights(score, params[name].shape)
    return {name: found[name] for name in state.targets}


@torch.no_grad()
def fold_gates_(state: TrainState) -> None:
    """Write the gates' outputs into the underlying weights and biases.

    The gates stay attached until `detach_gates_`.
    """
    for name, gate in gates_of(state.model):
        weight = underlying_weight(state.model, name)
        # Trimming may keep a weight although its gate is closed: it is not zeroed but restored at a small scale.
        weight.mul_(gate.mean_gate(weight).clamp_min(1e-3))
    for name, biased in _attached_of_kind(state.model, BiasGate):
        bias = underlying_weight(state.model, name)
        bias.mul_(biased.open_outputs().to(bias).clamp_min(1e-3))


@torch.no_grad()
def zero_biases_(state: TrainState) -> None:
    """Zero the biases of fully pruned rows, and their optimizer moments."""
    table = dict(state.model.named_parameters())
    for name, target in state.targets.items():
        owner, _, own = bias_of(name).rpartition(".")
        bias = table.get(bias_of(name), table.get(f"{owner}.parametrizations.{own}.original"))
        if bias is None or len(target.shape) != 2:
            continue
        closed = ~state.masks[name].any(0 if target.transposed else 1)
        for value in (bias, *state.optimizer.state.get(bias, {}).values()):
            if isinstance(value, Tensor) and value.shape == closed.shape:
                value[closed] = 0.0


def detach_gates_(state: TrainState) -> None:
    """Remove the gates and their optimizer group; the underlying weights stay."""
    for name, _ in [*gates_of(state.model), *_attached_of_kind(state.model, BiasGate)]:
        owner, _, own = name.rpartition(".")
        parametrize.remove_parametrizations(state.model.get_submodule(owner), own, leave_parametrized=False)
    _ATTACHED.pop(state.model, None)
    living = {id(p) for p in state.model.parameters()}
    groups = state.optimizer.param_groups
    groups[:] = [group for group in groups if all(id(p) in living for p in group["params"])]
    for parameter in [p for p in state.optimizer.state if id(p) not in living]:
        del state.optimizer.state[parameter]
