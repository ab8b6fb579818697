"""Importance of whole groups: moving averages of the first-order change of the loss if a group is removed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsesoup.core.granularity import CoupledGroups
from sparsesoup.core.targets import Targets, bias_of
from sparsesoup.methods.live_features import head_densities
from sparsesoup.training.state import TrainState

# The side of a group that is summed over, the first of these that it has. What is removed with the group is a product
# of two sides, so that both give the same sum: of query with its bias and key, of value with its bias and output.
SIDES = ("output", "feed-forward out", "query")


@dataclass(frozen=True, kw_only=True)
class GroupImportance:
    """Moving average of |sum g w| of every group, over the weights of one side of it. Yang et al. 2023.

    S = decay S + (1 - decay) |sum g w| after each step, in the state's memory; it starts at 0 for all groups, so the
    ranking equals that of an unbiased average. The importance of a value-output feature is multiplied by
    tanh(density / regularization), density: the share of its head's value-output features that are left.

    Args:
        groups: the coupled groups.
        decay: decay of the average in a step.
        regularization: density of a head at which its features count by tanh(1); 0: all count alike.
    """

    groups: tuple[CoupledGroups, ...]
    decay: float
    regularization: float

    @torch.no_grad()
    def observe_gradients(self, state: TrainState) -> None:
        """Observe the gradients of a step: a hook of `train`."""
        every = dict(state.model.named_parameters())
        weights = state.prunable_parameters()
        for number, coupled in enumerate(self.groups):
            if coupled.spared:
                continue
            now = self._sums(coupled, weights | every, state.targets).abs_()
            if self.regularization:
                now.mul_(self._regularizer(coupled, state))
            key = f"importance/{number}"
            if key not in state.memory:
                state.memory[key] = torch.zeros_like(now)
            state.memory[key].lerp_(now, 1 - self.decay)

    def scores(self, state: TrainState) -> dict[str, Tensor]:
        """Return the importance of its group at every weight, in float64, so that a mean over a group is exact."""
        shapes = {name: target.shape for name, target in state.targets.items()}
        found: dict[str, Tensor] = {}
        for number, coupled in enumerate(self.groups):
            if coupled.spared:
                found |= {name: torch.zeros(shapes[name]) for name, _ in coupled.members}
            else:
                found |= coupled.expand_to_weights(state.memory[f"importance/{number}"].double(), shapes)
        return {name: found[name] for name in state.targets}

    def clear_(self, state: TrainState) -> None:
        """Remove the averages from the memory."""
        for number in range(len(self.groups)):
            state.memory.pop(f"importance/{number}", None)

    def _sums(self, coupled: CoupledGroups, params: dict[str, torch.nn.Parameter], targets: Targets) -> Tensor:
        """Return sum g w of each group over one side."""
        roles = {targets[name].role: (name, block) for name, block in coupled.members}
        role = next((side for side in SIDES if side in roles), next(iter(roles)))
        name, block = roles[role]
        found = block.sum_over_tiles(_product(params[name])).flatten()
        bias = params.get(bias_of(name))
        if role == "query" and bias is not None:
            found = found + _product(bias).view(len(found), -1).sum(1)
        return found

    def _regularizer(self, coupled: CoupledGroups, state: TrainState) -> Tensor | float:
        roles = {state.targets[name].role: name for name, _ in coupled.members}
        if {*roles} != {"value", "output"}:
            return 1.0
        heads = head_densities(roles["value"], roles["output"], state.masks, state.targets)
        return (heads / self.regularization).tanh().repeat_interleave(state.targets[roles["value"]].head)


def _product(parameter: torch.nn.Parameter) -> Tensor:
    """Return g w; 0 without a gradient."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.detach() * parameter.grad
