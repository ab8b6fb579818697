"""Training state: model, optimizer, masks and step. It can be pruned, copied, rewound and saved."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparsesoup.core.errors import UserError
from sparsesoup.core.masks import Masks, apply_masks_
from sparsesoup.core.targets import Targets, target_parameters

COUNTS = ("step", "mu_product")  # what torch's optimizers count for each parameter, on the CPU


@dataclass(frozen=True)
class Snapshot:
    """A copy of a state, restored in place.

    Args:
        tensors: its tensors by name, as `TrainState.tensors` names them; those of a file are read one by one.
        facts: the rest.
    """

    tensors: Mapping[str, Tensor]
    facts: dict[str, Any]


@dataclass(kw_only=True)
class TrainState:
    """Everything that a training run changes.

    Args:
        model, optimizer: prepared once; snapshots are restored into them in place.
        targets: the prunable parameters.
        masks: the kept weights. Change them with `set_masks_`.
        step: optimizer steps done since theta_0.
        memory: tensors stored by a hook or a method (votes, moving averages); saved with the state.
        notes: plain facts for the report; saved with the state.
        masked: share of the weights masked by gates, or zeroed for a time by the last pruning; logged while no masks
            are set.
        halt: set by a hook to end the training.
        scaler: scales the loss in fp16; None in other precisions.
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
    scaler: torch.amp.GradScaler | None = None

    def prunable_parameters(self) -> dict[str, Parameter]:
        """Return the prunable parameters by name."""
        return target_parameters(self.model, self.targets)

    def set_masks_(self, masks: Masks) -> None:
        """Set the masks and enforce them."""
        self.masks = masks
        self.enforce_masks_()

    def enforce_masks_(self) -> None:
        """Zero the pruned weights and their optimizer moments.

        A leftover moment would move a pruned weight at the next step, and the gradient norm with it.
        """
        params = self.prunable_parameters()
        apply_masks_(params, self.masks)
        for name, mask in self.masks.items():
            for value in self.optimizer.state.get(params[name], {}).values():
                # Moments of 8 bits are codes, of which 0 is not the number 0.
                if isinstance(value, Tensor) and value.shape == mask.shape and value.is_floating_point():
                    value.mul_(mask.view(torch.int8))

    @torch.no_grad()
    def prune_and_update_(self, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Prune with an update of the rest: set masks, and new values of the weights that they keep.

        For second-order methods, in which the weights that stay make up for those that go (optimal brain surgeon,
        Hassibi & Stork 1993; SparseGPT, Frantar & Alistarh 2023). Parameters that are not named stay as they are.

        Args:
            masks: name -> kept weights, of some or all targets.
            weights: name -> new values, in the layout of the parameter; those of pruned weights are not used.
        Raises: UserError, with nothing changed, if one is no target, has another shape or is not finite.

        >>> from sparsesoup.core.targets import Target
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> targets = {"weight": Target("other", (1, 2))}
        >>> state = TrainState(model=layer, optimizer=torch.optim.SGD(layer.parameters()), targets=targets,
        ...                    masks={"weight": torch.tensor([[True, True]])})
        >>> state.prune_and_update_({"weight": torch.tensor([[True, False]])}, {"weight": torch.tensor([[3.0, 9.0]])})
        >>> layer.weight.tolist()
        [[3.0, 0.0]]
        """
        params = self.prunable_parameters()
        for what, table in (("mask", masks), ("update", weights)):
            for name, t in table.items():
                if name not in params or t.shape != params[name].shape:
                    raise UserError(f"the {what} of {name} has shape {tuple(t.shape)}, which no prunable weight has")
                kept = masks.get(name, self.masks[name])
                if what == "update" and not bool(t[kept].isfinite().all()):
                    raise UserError(f"the {what} of {name} has NaN or infinite values; check the batches, or damp more")
        for name, t in weights.items():
            params[name].copy_(t)
        self.set_masks_({**self.masks, **masks})

    def reset_optimizer_(self) -> None:
        """Reset the optimizer: moments and step counts as before the first step."""
        self.optimizer.state.clear()

    def take_snapshot(self) -> Snapshot:
        """Return a copy on the device for `restore_snapshot_`; `SnapshotStore` also takes it elsewhere.

        It holds weights, buffers, moments, masks, step, memory and notes.
        """
        return Snapshot({name: t.detach().clone() for name, t in self.tensors().items()}, self.facts())

    def restore_snapshot_(self, snapshot: Snapshot) -> None:
        """Restore a snapshot in place; it can be restored again."""
        self.load_state_(snapshot.tensors, snapshot.facts)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the state by name; they are not copies."""
        found: dict[str, Tensor] = {f"model/{n}": t for n, t in self._named_weights().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor | int):  # bitsandbytes counts steps in plain numbers
                    found[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
        found |= {f"masks/{n}": m for n, m in self.masks.items()}
        return found | {f"memory/{n}": t for n, t in self.memory.items()}

    def facts(self) -> dict[str, Any]:
        """Return the non-tensor part of the state: step, notes, scale of the loss."""
        scaler = {"scaler": self.scaler.state_dict()} if self.scaler is not None else {}
        return {"step": self.step, "notes": copy.deepcopy(self.notes), "masked": self.masked, **scaler}

    @torch.no_grad()
    def load_state_(self, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        """Load the state described by `tensors` and `facts`; the given tensors are not modified."""
        own = self._named_weights()
        for name, t in own.items():
            t.copy_(tensors[f"model/{name}"])
        device = next(iter(own.values())).device
        self.masks = {n: tensors[f"masks/{n}"].to(device) for n in self.targets}
        self.memory = {
            k.removeprefix("memory/"): tensors[k].to(device, copy=True) for k in tensors if k.startswith("memory/")
        }
        self._take_back_moments(tensors, device)
        self.step, self.masked, self.halt = int(facts["step"]), float(facts["masked"]), False
        self.notes = copy.deepcopy(facts["notes"])
        if self.scaler is not None and "scaler" in facts:
            self.scaler.load_state_dict(facts["scaler"])

    def _take_back_moments(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        table = dict(self.model.named_parameters())
        saved = [k for k in tensors if k.startswith("optimizer/")]
        fused = any(group.get("fused") for group in self.optimizer.param_groups)
        present = {table[k.split("/", 2)[2]] for k in saved}
        for parameter in [p for p in self.optimizer.state if p not in present]:
            del self.optimizer.state[parameter]
        wanted = set(saved)
        for name, parameter in table.items():
            slot = self.optimizer.state.get(parameter, {})
            for key in [k for k, t in slot.items() if isinstance(t, Tensor) and f"optimizer/{k}/{name}" not in wanted]:
                del slot[key]
        for entry in saved:
            _, key, name = entry.split("/", 2)
            slot, value = self.optimizer.state[table[name]], tensors[entry]
            if value.dim() == 0 and not value.is_floating_point():
                slot[key] = int(value)
            elif key in slot and slot[key].shape == value.shape:
                slot[key].copy_(value)
            else:  # step counts stay on the CPU, unless the optimizer is fused
                counts = value.dim() == 0 and (key in COUNTS or table[name].dim() > 0)
                slot[key] = value.clone() if counts and not fused else value.to(device, copy=True)

    def _named_weights(self) -> dict[str, Tensor]:
        return named_weights(self.model)


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name, each once; they are not copies."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def parameter_versions(params: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Return what changes when one of these parameters is written in place or moved."""
    return [(p._version, p.data_ptr()) for p in params.values()]
