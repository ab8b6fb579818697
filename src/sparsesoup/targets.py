"""Targets: the parameters that may be pruned, with their role and orientation, resolved once."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import Parameter


@dataclass(frozen=True)
class Target:
    """One prunable parameter.

    Args:
        role: what it does in its block: query, key, value, output, feed-forward in, feed-forward out, or other.
        shape: its shape.
        transposed: True where it is stored [in, out] (GPT-2's Conv1D), False for [out, in].
    """

    role: str
    shape: tuple[int, ...]
    transposed: bool = False


Targets = dict[str, Target]  # parameter name as in named_parameters() -> target


def parameters(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, Parameter]:
    """The target parameters of a model, looked up fresh by name, in the order of `targets`.

    Behind a gate it is the weight itself, not what the gate lets through.

    Raises: ValueError if one is missing or has another shape.
    """
    table = dict(model.named_parameters())
    found = {}
    for name, target in targets.items():
        owner, _, own = name.rpartition(".")
        parameter = table.get(name, table.get(f"{owner}.parametrizations.{own}.original"))
        if parameter is None:
            raise ValueError(f"the model has no parameter {name}")
        if tuple(parameter.shape) != target.shape:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, expected {target.shape}")
        found[name] = parameter
    return found


def upright(table: Mapping[str, Tensor], targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """The tensors as [out, in]: those stored [in, out] are transposed. Doing it twice gives them back."""
    return {name: t.mT.contiguous() if targets[name].transposed else t for name, t in table.items()}


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and float32 values: the same for every copy of a checkpoint, however it was stored."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name}{tuple(weights[name].shape)}".encode())
        digest.update(weights[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
