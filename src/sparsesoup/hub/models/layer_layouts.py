"""Locations of heads and feed-forward units in the blocks of a model, by model type, and how to cut them out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsesoup.core.errors import UserError

Widths = dict[str, dict[str, int]]  # layer, as named in the base model -> {"heads": count, "units": count}


@dataclass(frozen=True)
class LayerLayout:
    """Locations of a block's parts, as paths below the block.

    Its attention must split query, key and value into as many heads as their width holds, and its feed-forward part
    must be down(activation(up(x))); then heads and units can be removed without changing the code.

    Args:
        core: the attention module that splits into heads.
        size: attribute of the core with the width of a head.
        query, key, value, output: linear layers of the attention.
        up, down: linear layers of the feed-forward part.
        activation: elementwise activation between them.
        units: config key of the number of units.
    """

    core: str
    size: str
    query: str
    key: str
    value: str
    output: str
    up: str
    down: str
    activation: str
    units: str = "intermediate_size"

    def fits_block(self, block: nn.Module) -> bool:
        """Return True if a block has all these parts."""
        have = {name for name, _ in block.named_modules()}
        paths = (self.core, self.query, self.key, self.value, self.output, self.up, self.down, self.activation)
        return have.issuperset(paths) and hasattr(block.get_submodule(self.core), self.size)


BERT = LayerLayout(
    core="attention.self", size="attention_head_size", query="attention.self.query", key="attention.self.key",
    value="attention.self.value", output="attention.output.dense", up="intermediate.dense", down="output.dense",
    activation="intermediate.intermediate_act_fn",
)  # fmt: skip
DISTILBERT = LayerLayout(
    core="attention", size="attention_head_size", query="attention.q_lin", key="attention.k_lin",
    value="attention.v_lin", output="attention.out_lin", up="ffn.lin1", down="ffn.lin2", activation="ffn.activation",
    units="hidden_dim",
)  # fmt: skip
VIT = LayerLayout(
    core="attention", size="head_dim", query="attention.q_proj", key="attention.k_proj", value="attention.v_proj",
    output="attention.o_proj", up="mlp.fc1", down="mlp.fc2", activation="mlp.activation_fn",
)  # fmt: skip
CLIP = LayerLayout(
    core="self_attn", size="head_dim", query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj",
    output="self_attn.out_proj", up="mlp.fc1", down="mlp.fc2", activation="mlp.activation_fn",
)  # fmt: skip
FAMILIES = {  # `model_type` of config.json -> layout; add a model type here once its test passes
    "bert": BERT, "roberta": BERT, "xlm-roberta": BERT, "electra": BERT, "distilbert": DISTILBERT, "vit": VIT,
    "deit": VIT, "clip_vision_model": CLIP, "clip": CLIP,
}  # fmt: skip


@dataclass(frozen=True)
class PrunableLayer:
    """A repeated block of a model, with its parts by role.

    Args:
        name: the block's name in the base model, such as encoder.layer.3.
        block: the module itself.
        layout: locations of its parts.
    """

    name: str
    block: nn.Module
    layout: LayerLayout

    def module_of(self, role: str) -> Any:
        """Return the module with a role of the layout."""
        return self.block.get_submodule(getattr(self.layout, role))

    @property
    def head_size(self) -> int:
        """The width of a head."""
        return int(getattr(self.module_of("core"), self.layout.size))

    @property
    def num_heads(self) -> int:
        """The number of heads."""
        return int(self.module_of("query").weight.shape[0]) // self.head_size

    @property
    def num_units(self) -> int:
        """The number of feed-forward units."""
        return int(self.module_of("up").weight.shape[0])


def prunable_layers(model: Any) -> list[PrunableLayer]:
    """Return the blocks of a model, in order.

    Raises: UserError if the layout of its model type is unknown.
    """
    kind = str(model.config.model_type)
    base = getattr(model, model.base_model_prefix, model)
    layout = FAMILIES.get(kind)
    lists = [(n, m) for n, m in base.named_modules() if isinstance(m, nn.ModuleList)]
    found = [
        PrunableLayer(f"{name}.{i}", block, layout)
        for name, blocks in lists
        for i, block in enumerate(blocks)
        if layout and layout.fits_block(block)
    ]
    if not found:
        raise UserError(
            f"{type(model).__name__} (model type {kind}) has heads and units of a grouping that is not known here; "
            f"known are {', '.join(FAMILIES)}; export it --to packed"
        )
    return found


def why_not_shrinkable(model: Any) -> str:
    """Return why pruned heads and units stay in a model as zeros; '' if they can be cut out."""
    try:
        prunable_layers(model)
    except UserError:
        return (
            f"heads and units that are pruned stay in a {model.config.model_type} model as zeros, which make it no "
            f"smaller or faster: `export --to compact` cuts them out of {', '.join(FAMILIES)}"
        )
    return ""


def layer_widths(model: Any) -> Widths:
    """Return the number of heads and units in each layer of a model."""
    return {layer.name: {"heads": layer.num_heads, "units": layer.num_units} for layer in prunable_layers(model)}


def resize_layers_(model: Any, wanted: Mapping[str, Mapping[str, int]]) -> None:
    """Resize the layers of a new model to these numbers of heads and units; load its weights afterwards.

    Raises: UserError if layers are missing, or have fewer heads or units than requested.
    """
    for layer in prunable_layers(model):
        row = wanted.get(layer.name)
        numbers = [row.get(key) for key in ("heads", "units")] if isinstance(row, Mapping) else [None]
        most = (layer.num_heads, layer.num_units)
        if not all(isinstance(n, int) and 0 <= n <= top for n, top in zip(numbers, most, strict=False)):
            raise UserError(
                f"compact_config of config.json says {row} of {layer.name}; expected heads of 0 to {most[0]} and "
                f"units of 0 to {most[1]}; take the file as it was exported"
            )
        heads, units = (torch.arange(int(n or 0)) for n in numbers)
        prune_layer_(layer, heads, units)


def prune_layer_(layer: PrunableLayer, heads: Tensor, units: Tensor) -> None:
    """Remove all other heads and units from a layer, in place.

    Args:
        layer: the layer.
        heads, units: indices to keep, in rising order.
    """
    rows = (heads[:, None] * layer.head_size + torch.arange(layer.head_size)).flatten()
    for role in ("query", "key", "value"):
        _select_features(layer, role, rows, dim=0)
    _select_features(layer, "output", rows, dim=1)
    _select_features(layer, "up", units, dim=0)
    _select_features(layer, "down", units, dim=1)
    core = layer.module_of("core")
    for name in ("num_attention_heads", "num_heads", "n_heads"):
        if hasattr(core, name):
            setattr(core, name, len(heads))
    if hasattr(core, "all_head_size"):
        core.all_head_size = len(rows)
    if not len(heads) and not isinstance(core, NoHeads):
        layer.block.set_submodule(layer.layout.core, NoHeads(core, layer.layout))


def _select_features(layer: PrunableLayer, role: str, chosen: Tensor, dim: int) -> None:
    """Keep these rows (dim 0) or columns (dim 1) of a linear layer."""
    linear = layer.module_of(role)
    weight, bias = linear.weight.detach(), linear.bias
    chosen = chosen.to(weight.device)
    if bias is not None and dim == 0:
        bias = nn.Parameter(bias.detach().index_select(0, chosen), bias.requires_grad)
    # Contiguous: safetensors refuses views of larger tensors.
    weight = nn.Parameter(weight.index_select(dim, chosen).contiguous(), linear.weight.requires_grad)
    if len(chosen):
        linear.weight, linear.bias = weight, bias
        linear.out_features, linear.in_features = weight.shape
    else:
        layer.block.set_submodule(getattr(layer.layout, role), (EmptyOutputLinear, BiasOnly)[dim](weight, bias))


class EmptyOutputLinear(nn.Module):
    """A linear layer [features -> 0] without outputs.

    It keeps its empty weight, so that a stock class refuses the checkpoint instead of initialising new weights.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., features] to [..., 0]."""
        return x[..., :0]


class BiasOnly(EmptyOutputLinear):
    """A linear layer [0 -> features] without inputs: only its bias remains."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., 0] to [..., features]."""
        shape = (*x.shape[:-1], self.weight.shape[0])
        return x.new_zeros(shape) if self.bias is None else self.bias.expand(shape)


class NoHeads(nn.Module):
    """An attention without heads, which not all fused attention kernels support.

    Args:
        core: the attention that it replaces, whose parts it keeps under their names.
        layout: layout of the block.
    """

    def __init__(self, core: nn.Module, layout: LayerLayout) -> None:
        super().__init__()
        for name, child in core.named_children():
            self.add_module(name, child)
        setattr(self, layout.size, getattr(core, layout.size))
        # In BERT the output layer is beside the core, elsewhere inside it.
        inside = layout.output.startswith(f"{layout.core}.")
        self.path = layout.output.removeprefix(f"{layout.core}.") if inside else ""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Map [batch, length, hidden] to the output layer's bias, or to no features if that layer is outside."""
        nothing = hidden_states[..., :0]
        return (self.get_submodule(self.path)(nothing) if self.path else nothing), None
