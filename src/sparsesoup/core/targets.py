"""Targets: the prunable parameters with their role and layout, resolved once."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import Parameter

from sparsesoup.core.granularity import Block, CoupledGroups


@dataclass(frozen=True)
class Target:
    """One prunable parameter.

    Args:
        role: its function in the block: query, key, value, output, feed-forward in, feed-forward out, or other.
        shape: its shape.
        transposed: True if stored [in, out] (GPT-2's Conv1D), False for [out, in].
        head: rows of one attention head in query, key and value, columns of one in the attention output; 0: unknown.
    """

    role: str
    shape: tuple[int, ...]
    transposed: bool = False
    head: int = 0


Targets = dict[str, Target]  # parameter name as in named_parameters() -> target


def target_parameters(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, Parameter]:
    """Return the target parameters of a model, looked up by name on each call, in the order of `targets`.

    For a gated parameter, return the underlying weight, not the gate's output.

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


def block_of(name: str) -> str:
    """Return the repeated block of a parameter: its name up to the first number, '' if there is none.

    >>> block_of("bert.encoder.layer.3.attention.self.query.weight")
    'bert.encoder.layer.3'
    """
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return found.group() if found else ""


def names_in_blocks(names: Iterable[str], targets: Targets) -> list[str]:
    """Return the parameters of the repeated blocks that hold targets, and of the modules of other targets.

    >>> names_in_blocks(["layer.0.bias", "head.bias"], {"layer.0.weight": Target("other", (2, 2))})
    ['layer.0.bias']
    """
    homes = tuple(f"{block_of(target) or target.rpartition('.')[0]}." for target in targets)
    return [name for name in names if name.startswith(homes)]


def bias_of(name: str) -> str:
    """Return the name of the bias beside a weight; '' if the weight's name does not determine it.

    >>> bias_of("encoder.layer.3.attention.self.query.weight")
    'encoder.layer.3.attention.self.query.bias'
    """
    return f"{name.removesuffix('weight')}bias" if name.endswith("weight") else ""


def feed_forward_groups(targets: Targets) -> list[CoupledGroups]:
    """Return the coupled groups of the feed-forward part of each block: a unit is a row in and a column out."""
    return _couple_bands(targets, {"feed-forward in": 1, "feed-forward gate": 1}, {"feed-forward out": 1})


def attention_head_groups(targets: Targets) -> list[CoupledGroups]:
    """Return the coupled groups of each block's attention: rows of query, key and value, columns of the output."""
    sizes = {target.role: target.head for target in targets.values() if target.head}
    groups = _couple_bands(
        targets,
        {role: sizes.get(role, 0) for role in ("query", "key", "value")},
        {role: sizes.get(role, 0) for role in ("output",)},
    )
    shapes = {name: target.shape for name, target in targets.items()}
    # With shared keys and values, as in grouped-query attention, these have fewer bands.
    return [coupled for coupled in groups if len({*coupled.tiles_per_member(shapes).values()}) == 1]


def attention_feature_groups(targets: Targets) -> list[CoupledGroups]:
    """Return the coupled groups of single features of each block's attention, in two parts.

    A query-key feature is a row of query and of key, a value-output feature a row of value and a column of the output.
    """
    return [
        CoupledGroups(
            tuple((n, Block(min(b.rows, 1), min(b.cols, 1))) for n, b in coupled.members if targets[n].role in part)
        )
        for coupled in attention_head_groups(targets)
        for part in (("query", "key"), ("value", "output"))
    ]


def _couple_bands(targets: Targets, going_in: Mapping[str, int], coming_out: Mapping[str, int]) -> list[CoupledGroups]:
    """Couple bands of the given widths: rows of the `going_in` roles, columns of `coming_out`; complete blocks only."""
    blocks: dict[str, list[list[tuple[str, Block]]]] = {}
    for name, target in targets.items():
        width = going_in.get(target.role, 0) or coming_out.get(target.role, 0)
        if width and block_of(name):
            parts = blocks.setdefault(block_of(name), [[]])
            roles = {targets[n].role for n, _ in parts[-1]}
            if target.role in roles and roles & {*going_in} and roles & {*coming_out}:
                parts.append([])  # the decoder's cross-attention, or the next of MobileBERT's feed-forwards
            rows = (target.role in going_in) != target.transposed
            parts[-1].append((name, Block(width, 0) if rows else Block(0, width)))
    whole = [m for parts in blocks.values() for m in parts if {targets[n].role for n, _ in m} & {*coming_out}]
    return [CoupledGroups(tuple(m)) for m in whole if {targets[n].role for n, _ in m} & {*going_in}]


def to_out_in_layout(table: Mapping[str, Tensor], targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """Return the tensors as [out, in]: those stored [in, out] are transposed. Applying it twice is the identity."""
    return {name: t.mT.contiguous() if targets[name].transposed else t for name, t in table.items()}


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and float32 values: the same for every copy of a checkpoint."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name}{tuple(weights[name].shape)}".encode())
        digest.update(weights[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
