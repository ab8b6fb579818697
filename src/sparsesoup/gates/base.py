"""Attach gates to a model before its optimizer is built; fold them before anything is saved."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrize

from sparsesoup.gates.straight import Gate
from sparsesoup.patterns import Tie
from sparsesoup.state import TrainState
from sparsesoup.targets import parameters

Make = Callable[[int, int, Tie], nn.Module]  # (tie, member, the tie) -> the gate of that member


def attach(model: nn.Module, ties: tuple[Tie, ...], make: Make) -> list[Parameter]:
    """Put a gate on every member of every tie; the parameters that the gates learn, each once."""
    learnt: dict[int, Parameter] = {}
    for number, tie in enumerate(ties):
        for place, (name, _) in enumerate(tie.members):
            owner, _, own = name.rpartition(".")
            gate = make(number, place, tie)
            # Its product has the shape of the weight; the check would run the gate once more, random noise and all.
            parametrize.register_parametrization(model.get_submodule(owner), own, gate, unsafe=True)
            learnt |= {id(p): p for p in gate.parameters()}
    return list(learnt.values())


def gates(model: nn.Module) -> Iterator[tuple[str, Gate]]:
    """(name of the gated parameter, its gate), tie by tie."""
    for name, module in model.named_modules():
        if isinstance(module, Gate):
            owner, _, rest = f".{name}".partition(".parametrizations.")
            yield f"{owner}.{rest.split('.')[-2]}".lstrip("."), module


def hidden(model: nn.Module, name: str) -> Parameter:
    """The weight behind a gate."""
    owner, _, own = name.rpartition(".")
    return model.get_parameter(f"{owner}.parametrizations.{own}.original".lstrip("."))


def worth(state: TrainState) -> dict[str, Tensor]:
    """What the gates hold each weight to be worth, at the weights themselves; higher = keep."""
    found: dict[str, Tensor] = {}
    params = parameters(state.model, state.targets)
    for name, gate in gates(state.model):
        if name in params:
            found[name] = gate.spread(gate.worth(params[name]), params[name].shape)
    return {name: found[name] for name in state.targets}


@torch.no_grad()
def fold_(state: TrainState) -> None:
    """Write what open gates let through into the weights behind them; a gated bias is zero where its group is pruned.

    The gates themselves stay on until `detach_`.
    """
    for name, gate in gates(state.model):
        weight = hidden(state.model, name)
        # Trimming may keep a weight whose gate is shut: it is no zero, but comes back as small as the model knows it.
        weight.mul_(gate.scale(weight).clamp_min(1e-3))
        if name not in state.targets:
            closed = ~_open(state, gate)
            weight[closed] = 0.0
            for value in state.optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value[closed] = 0.0


def _open(state: TrainState, gate: Gate) -> Tensor:
    """Which groups of a gate's tie the state's masks keep."""
    name, other = next((n, g) for n, g in gates(state.model) if g.tie == gate.tie and n in state.targets)
    return other.block.total(state.masks[name].float()).flatten() > 0


def detach_(state: TrainState) -> None:
    """Remove the gates and their group of the optimizer; the weights stay as they are behind them."""
    for name, _ in list(gates(state.model)):
        owner, _, own = name.rpartition(".")
        parametrize.remove_parametrizations(state.model.get_submodule(owner), own, leave_parametrized=False)
    living = {id(p) for p in state.model.parameters()}
    groups = state.optimizer.param_groups
    groups[:] = [group for group in groups if all(id(p) in living for p in group["params"])]
    for parameter in [p for p in state.optimizer.state if id(p) not in living]:
        del state.optimizer.state[parameter]
