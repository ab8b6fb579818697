"""A run in progress: model, optimizer, masks and step. It can be pruned, forked and rewound, and put on disk."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparsesoup.core.masks import Masks, apply_masks_
from sparsesoup.core.targets import Targets, target_parameters


@dataclass(frozen=True)
class Snapshot:
    """A copy of a state at one moment, restored in place."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(kw_only=True)
class TrainState:
    """All that a training run changes.

    Args:
        model, optimizer: prepared once; forks restore their contents in place.
        targets: the prunable parameters.
        masks: which of them stay. Change them by `set_masks_`.
        step: optimizer steps done since theta_0.
        memory: tensors that a hook or a method remembers (votes, moving averages); saved with the state.
        notes: plain facts for the report; saved with the state.
        masked: share of the weights that gates mask, or that the last pruning zeroed for a time; for the log, as long
            as no mask holds.
        halt: set by a hook to end the training.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    targets: Targets
    masks: Masks
    step: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    masked: float = 0.0
    halt: bool = False

    def prunable_parameters(self) -> dict[str, Parameter]:
        """The prunable parameters, looked up by name."""
        return target_parameters(self.model, self.targets)

    def set_masks_(self, masks: Masks) -> None:
        """Take these masks and make them hold."""
        self.masks = masks
        self.enforce_masks_()

    def enforce_masks_(self) -> None:
        """Zero the pruned weights and what the optimizer remembers of them.

        A moment left over would move a pruned weight at the next step, and the gradient norm with it.
        """
        params = self.prunable_parameters()
        apply_masks_(params, self.masks)
        for name, mask in self.masks.items():
            for value in self.optimizer.state.get(params[name], {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    value.mul_(mask.view(torch.int8))

    def reset_optimizer_(self) -> None:
        """Start the optimizer afresh: moments and step counts as before the first step."""
        self.optimizer.state.clear()

    def take_snapshot(self) -> Snapshot:
        """A copy to return to with `restore_snapshot_`: weights, buffers, moments, masks, step, memory, notes."""
        return Snapshot({name: t.detach().clone() for name, t in self.tensors().items()}, self.facts())

    def restore_snapshot_(self, snapshot: Snapshot) -> None:
        """Return to a snapshot, in place; it can be returned to again."""
        self.load_state_(snapshot.tensors, snapshot.facts)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state under a name; they are not copies."""
        found: dict[str, Tensor] = {f"model/{n}": t for n, t in self._named_weights().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"optimizer/{key}/{name}"] = value
        found |= {f"masks/{n}": m for n, m in self.masks.items()}
        return found | {f"memory/{n}": t for n, t in self.memory.items()}

    def facts(self) -> dict[str, Any]:
        """What is not a tensor: step, notes."""
        return {"step": self.step, "notes": copy.deepcopy(self.notes), "masked": self.masked}

    @torch.no_grad()
    def load_state_(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Become the state that `tensors` and `facts` described; the given tensors stay untouched."""
        own = self._named_weights()
        for name, t in own.items():
            t.copy_(tensors[f"model/{name}"])
        device = next(iter(own.values())).device
        self.masks = {n: tensors[f"masks/{n}"].to(device) for n in self.targets}
        self.memory = {
            k.removeprefix("memory/"): t.to(device, copy=True) for k, t in tensors.items() if k.startswith("memory/")
        }
        self._take_back_moments(tensors, device)
        self.step, self.masked, self.halt = int(facts["step"]), float(facts["masked"]), False
        self.notes = copy.deepcopy(facts["notes"])

    def _take_back_moments(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        table = dict(self.model.named_parameters())
        saved = [k for k in tensors if k.startswith("optimizer/")]
        fused = any(group.get("fused") for group in self.optimizer.param_groups)
        present = {table[k.split("/", 2)[2]] for k in saved}
        for parameter in [p for p in self.optimizer.state if p not in present]:
            del self.optimizer.state[parameter]
        for entry in saved:
            _, key, name = entry.split("/", 2)
            slot, value = self.optimizer.state[table[name]], tensors[entry]
            if key in slot and slot[key].shape == value.shape:
                slot[key].copy_(value)
            else:  # a step count stays on the CPU, unless the optimizer is fused
                slot[key] = value.clone() if value.dim() == 0 and not fused else value.to(device, copy=True)

    def _named_weights(self) -> dict[str, Tensor]:
        return named_weights(self.model)


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by name, each once; they are not copies."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
