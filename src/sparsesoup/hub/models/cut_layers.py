"""Cut heads, features of heads, units and outputs out of a model's layers; and the widths that remain."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.core.masks import pack_bits, unpack_bits
from sparsesoup.hub.models.layer_layouts import PrunableLayer, head_size_of, prunable_layers
from sparsesoup.hub.models.narrow_layers import (
    NarrowLinear,
    NoHeads,
    full_bias,
    full_weight,
    narrow_linear,
    used_outputs,
)

# Layer, as named in the base model -> {"heads": count, "units": count}, and "narrow" if a part is narrower than these.
Widths = dict[str, dict[str, Any]]
FULL = "full_head_size"  # attribute of an attention: width of its heads before they were cut, which scales the softmax
NARROW = "narrow"
FEATURES = ("query_key", "value_output")
PARTS = {"query": "query_key", "key": "query_key", "value": "value_output"}
ROWS = {"output_rows": "output", "down_rows": "down"}


@dataclass(frozen=True)
class KeptParts:
    """The parts of a layer to keep, as bool tensors, True = kept.

    Args:
        head_size: width of a head.
        query_key: features of the products of query and key, head by head.
        value_output: features between value and attention output, head by head; a head without any is removed.
        units: feed-forward units.
        output_rows, down_rows: outputs of the attention output and of the feed-forward part that have weights.
    """

    head_size: int
    query_key: Tensor
    value_output: Tensor
    units: Tensor
    output_rows: Tensor
    down_rows: Tensor

    @property
    def heads(self) -> Tensor:
        """The heads to keep, bool [heads]."""
        return self.value_output.view(-1, self.head_size).any(dim=1)

    @property
    def keeps_all(self) -> bool:
        """True if nothing is removed."""
        parts = (self.query_key, self.value_output, self.units, self.output_rows, self.down_rows)
        return all(bool(part.all()) for part in parts)


def all_parts(layer: PrunableLayer) -> KeptParts:
    """Return all parts of a layer."""
    features, hidden = layer.num_heads * layer.head_size, [len(used_outputs(layer.module_of(p))) for p in ROWS.values()]
    sizes = (features, features, layer.num_units, *hidden)
    return KeptParts(layer.head_size, *(torch.ones(n, dtype=torch.bool, device="cpu") for n in sizes))


def prune_layer_(layer: PrunableLayer, kept: KeptParts) -> None:
    """Remove all other parts from a layer, in place; the softmax keeps the scale of the full heads."""
    core, heads, size = layer.module_of("core"), kept.heads, kept.head_size
    inner = {key: getattr(kept, key).view(-1, size) & heads[:, None] for key in FEATURES}
    width = max(1, *(int(n) for alive in inner.values() for n in alive.sum(1))) if heads.any() else size
    slots = {key: _first_slots(alive[heads].sum(1), width) for key, alive in inner.items()}
    hidden = torch.ones(layer.module_of("query").weight.shape[1], dtype=torch.bool, device="cpu")
    between = {part: (inner[key].flatten(), slots[key]) for part, key in PARTS.items()}
    for part, (chosen, slot) in between.items():
        _replace(layer, part, chosen, hidden, outputs=slot)
    chosen, slot = between["value"]
    _replace(layer, "output", kept.output_rows, chosen, inputs=slot)
    _replace(layer, "up", kept.units, hidden, outputs=kept.units[kept.units])
    _replace(layer, "down", kept.down_rows, kept.units)
    count = int(heads.sum())
    sizes = {
        FULL: full_head_size(layer),
        "attention_head_size": width,
        "head_dim": width,
        "all_head_size": count * width,
    }
    for name in ("num_attention_heads", "num_heads", "n_heads"):
        sizes[name] = count
    for name, value in sizes.items():
        if name == FULL or hasattr(core, name):
            setattr(core, name, value)
    if not count and not isinstance(core, NoHeads):
        layer.block.set_submodule(layer.parts["core"], NoHeads(core, layer.parts, head_size_of(core)))


def _first_slots(counts: Tensor, width: int) -> Tensor:
    """Return the used ones of `width` slots a head, the first of each, bool [heads * width]."""
    return (torch.arange(width, device="cpu") < counts[:, None]).flatten()


def _replace(layer: PrunableLayer, part: str, rows: Tensor, columns: Tensor, **where: Tensor) -> None:
    """Keep these rows and columns of a linear layer; one that keeps its class keeps its place."""
    linear = layer.module_of(part)
    made: Any = narrow_linear(linear, rows, columns, **where)
    if type(made) is type(linear) and not isinstance(made, NarrowLinear):
        linear.weight, linear.bias = made.weight, made.bias
        if hasattr(linear, "in_features"):
            linear.out_features, linear.in_features = made.weight.shape
    else:
        layer.block.set_submodule(layer.parts[part], made)


def layer_widths(model: Any) -> Widths:
    """Return the number of heads and units in each layer of a model, and what is narrower than these say.

    `narrow` holds the features of each head, `query_key` and `value_output`, and as bits in hexadecimal digits the
    outputs that have weights, `output_rows` and `down_rows`.
    """
    return {layer.name: _widths_of(layer) for layer in prunable_layers(model)}


def _widths_of(layer: PrunableLayer) -> dict[str, Any]:
    row: dict[str, Any] = {"heads": layer.num_heads, "units": layer.num_units}
    narrow: dict[str, Any] = {}
    if layer.num_heads:
        used = {key: used_outputs(layer.module_of(part)) for part, key in PARTS.items()}
        if layer.head_size < full_head_size(layer) or not all(u.all() for u in used.values()):
            narrow = {key: alive.view(layer.num_heads, -1).sum(1).tolist() for key, alive in used.items()}
    for key, part in ROWS.items():
        if not (alive := used_outputs(layer.module_of(part))).all():
            narrow[key] = bytes(pack_bits(alive).tolist()).hex()
    return row | ({NARROW: narrow} if narrow else {})


def full_head_size(layer: PrunableLayer) -> int:
    """Return the width of a layer's heads before any was cut."""
    return int(getattr(layer.module_of("core"), FULL, layer.head_size))


def resize_layers_(model: Any, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """Resize the layers of a new model to these widths, as of `layer_widths`; load its weights afterwards."""
    for layer in prunable_layers(model):
        row = wanted.get(layer.name)
        numbers = [row.get(key) for key in ("heads", "units")] if isinstance(row, Mapping) else [None]
        most = (layer.num_heads, layer.num_units)
        try:
            if not all(isinstance(n, int) and 0 <= n <= top for n, top in zip(numbers, most, strict=False)):
                raise ValueError("heads or units out of range")
            assert row is not None
            kept = _parts_of_widths(layer, row)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"compact_config of config.json says {row} of {layer.name}; expected heads of 0 to {most[0]} and "
                f"units of 0 to {most[1]}; use the file as it was exported"
            ) from error
        prune_layer_(layer, kept)


def _parts_of_widths(layer: PrunableLayer, row: Mapping[str, Any]) -> KeptParts:
    """Return as many parts of a whole layer as these widths say: the first heads, features and units."""
    kept, narrow, heads, size = all_parts(layer), row.get(NARROW, {}), int(row["heads"]), layer.head_size
    for key in FEATURES:
        counts = [int(n) for n in narrow.get(key, [size] * heads)]
        if len(counts) != heads or not all(0 <= n <= size for n in counts):
            raise ValueError(f"{key} {counts}")
        few = torch.tensor([*counts, *[0] * (layer.num_heads - heads)], dtype=torch.long, device="cpu")
        getattr(kept, key).copy_(_first_slots(few, size))
    kept.units[int(row["units"]) :] = False
    for key in ROWS.keys() & narrow.keys():
        bits = torch.tensor([*bytes.fromhex(narrow[key])], dtype=torch.uint8, device="cpu")
        getattr(kept, key).copy_(unpack_bits(bits, getattr(kept, key).shape))
    return kept


def live_parts(layer: PrunableLayer) -> KeptParts:
    """Return the parts of a layer whose effect cannot be replaced by a bias.

    A feature between value and output is dead when its row of V is zero (then it equals its bias, whatever the
    attention weights, since they sum to one) or its column of the output matrix is; a head is removed when all of these
    are. A feature of query and key is dead when its row of K is zero, or that of Q with its bias: what it adds to the
    logits is then the same for every key, which the softmax does not see. A unit is dead when its row of the up
    projection is zero (then it equals the activation of its bias) or its column of the down projection is. An output
    without weights is its bias.
    """
    query, key, value, output, up, down = (
        full_weight(layer.module_of(part)) != 0 for part in ("query", "key", "value", "output", "up", "down")
    )
    bias = full_bias(layer.module_of("query"))
    asks = query.any(1) if bias is None else query.any(1) | (bias != 0)
    inside, units = (value.any(1) & output.any(0)).cpu(), (up.any(1) & down.any(0)).cpu()
    alive = inside.view(-1, layer.head_size).any(1).repeat_interleave(layer.head_size)
    rows = [_used_rows(weight, kept) for weight, kept in ((output, inside), (down, units))]
    return KeptParts(layer.head_size, (asks & key.any(1)).cpu() & alive, inside, units, *rows)


def _used_rows(weight: Tensor, columns: Tensor) -> Tensor:
    """Return the rows with a nonzero in these columns; all if there are no columns."""
    return (
        weight[:, columns.to(weight.device)].any(1).cpu()
        if columns.any()
        else torch.ones(len(weight), dtype=torch.bool)
    )
