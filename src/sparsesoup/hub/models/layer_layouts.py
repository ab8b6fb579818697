"""The parts of a model's repeated blocks, found by their names, and how to cut heads and units out of them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsesoup.core.errors import UserError

Widths = dict[str, dict[str, int]]  # layer, as named in the base model -> {"heads": count, "units": count}

# Role -> end of a linear layer's path inside its block; BERT, RoBERTa, ELECTRA, DeBERTa, DistilBERT, ViT, CLIP, GPT-2,
# LLaMA and similar models. Other linear weights are pruned too, with the role "other".
ROLES = {
    "query": r"(query(_proj)?|q_lin|q_proj|\.q)",
    "key": r"(key(_proj)?|k_lin|k_proj|\.k)",
    "value": r"(value(_proj)?|v_lin|v_proj|\.v)",
    "query-key-value": r"(c_attn|qkv|in_proj|query_key_value)",
    "output": r"((attention|attn|self_attn)\.(output\.dense|dense|out_proj|out_lin|o_proj|c_proj|proj)|\.out_lin)",
    "feed-forward in": r"(intermediate\.dense|ffn\.lin1|\bfc1|c_fc|up_proj|linear1|\.wi|\bffn)",
    "feed-forward gate": r"(gate_proj)",
    "feed-forward out": r"(output\.dense|ffn\.lin2|\bfc2|mlp\.c_proj|down_proj|linear2|\.wo|\bffn_output)",
}
SHORT = {"feed-forward in": "up", "feed-forward out": "down"}  # of a feed-forward part without a gate


@dataclass(frozen=True)
class LayerLayout:
    """Facts on a block that the names of its linear layers do not say.

    Its attention must split query, key and value into as many heads as their width holds, and its feed-forward part
    must be down(activation(up(x))); then heads and units can be removed without changing the code.
    """

    activation: str  # path of the elementwise activation below the block
    units: str = "intermediate_size"  # config key of the number of units


BERT, VIT = LayerLayout("intermediate.intermediate_act_fn"), LayerLayout("mlp.activation_fn")
FAMILIES = {  # `model_type` of config.json -> layout; add a model type here once its test passes
    "bert": BERT, "roberta": BERT, "xlm-roberta": BERT, "electra": BERT,
    "distilbert": LayerLayout("ffn.activation", "hidden_dim"), "vit": VIT, "deit": VIT, "clip_vision_model": VIT,
    "clip": VIT,
}  # fmt: skip


def role_of(name: str) -> str:
    """Return the role of a parameter, or of the layer that it belongs to.

    >>> role_of("encoder.layer.0.attention.output.dense.weight"), role_of("mlp.fc1"), role_of("lm_head.weight")
    ('output', 'feed-forward in', 'other')
    """
    path = name.removesuffix(".weight").removesuffix("_weight")
    return next((role for role, ending in ROLES.items() if re.search(f"{ending}$", path)), "other")


@dataclass(frozen=True)
class PrunableLayer:
    """A repeated block of a model: its name in the base model, such as encoder.layer.3, and the paths of its parts.

    These are query, key, value, output; core, the module around the first three; up, down and their activation.
    """

    name: str
    block: nn.Module
    layout: LayerLayout
    parts: Mapping[str, str]

    def module_of(self, part: str) -> Any:
        """Return the module of a part."""
        return self.block.get_submodule(self.parts[part])

    @property
    def head_size(self) -> int:
        """The width of a head."""
        return _head_size(self.module_of("core"))

    @property
    def num_heads(self) -> int:
        """The number of heads."""
        return len(self.module_of("query").weight) // self.head_size

    @property
    def num_units(self) -> int:
        """The number of feed-forward units."""
        return len(self.module_of("up").weight)


def _head_size(core: nn.Module) -> int:
    return int(getattr(core, "attention_head_size", getattr(core, "head_dim", 0)))


def _parts_of(block: nn.Module, layout: LayerLayout) -> dict[str, str]:
    """Return part -> path in a block; {} if one is missing."""
    modules = dict(block.named_modules())
    linear = [(role_of(path), path) for path, module in modules.items() if hasattr(module, "weight")]
    parts = {SHORT.get(role, role): path for role, path in reversed(linear) if role != "other"}
    parts |= {"core": parts.get("query", "").rpartition(".")[0], "activation": layout.activation}
    needed = {"query", "key", "value", "output", "up", "down"}
    whole = needed <= parts.keys() and {*parts.values()} <= modules.keys() and _head_size(modules[parts["core"]])
    return parts if whole else {}


def prunable_layers(model: Any) -> list[PrunableLayer]:
    """Return the blocks of a model, in order."""
    kind, base = str(model.config.model_type), getattr(model, model.base_model_prefix, model)
    blocks = {
        f"{name}.{i}": b for name, m in base.named_modules() if isinstance(m, nn.ModuleList) for i, b in enumerate(m)
    }
    layout = FAMILIES.get(kind)
    found = [
        PrunableLayer(n, b, layout, parts) for n, b in blocks.items() if layout and (parts := _parts_of(b, layout))
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
    """Resize the layers of a new model to these numbers of heads and units; load its weights afterwards."""
    for layer in prunable_layers(model):
        row = wanted.get(layer.name)
        numbers = [row.get(key) for key in ("heads", "units")] if isinstance(row, Mapping) else [None]
        most = (layer.num_heads, layer.num_units)
        if not all(isinstance(n, int) and 0 <= n <= top for n, top in zip(numbers, most, strict=False)):
            raise UserError(
                f"compact_config of config.json says {row} of {layer.name}; expected heads of 0 to {most[0]} and "
                f"units of 0 to {most[1]}; take the file as it was exported"
            )
        prune_layer_(layer, *(torch.arange(int(n or 0)) for n in numbers))


def prune_layer_(layer: PrunableLayer, heads: Tensor, units: Tensor) -> None:
    """Remove all other heads and units from a layer, in place; the indices to keep are in rising order."""
    rows = (heads[:, None] * layer.head_size + torch.arange(layer.head_size)).flatten()
    for part in ("query", "key", "value"):
        _select_features(layer, part, rows, dim=0)
    _select_features(layer, "output", rows, dim=1)
    _select_features(layer, "up", units, dim=0)
    _select_features(layer, "down", units, dim=1)
    core = layer.module_of("core")
    counts = {"num_attention_heads": len(heads), "num_heads": len(heads), "n_heads": len(heads)}
    for name, value in {**counts, "all_head_size": len(rows)}.items():
        if hasattr(core, name):
            setattr(core, name, value)
    if not len(heads) and not isinstance(core, NoHeads):
        layer.block.set_submodule(layer.parts["core"], NoHeads(core, layer.parts))


def _select_features(layer: PrunableLayer, part: str, chosen: Tensor, dim: int) -> None:
    """Keep these rows (dim 0) or columns (dim 1) of a linear layer."""
    linear = layer.module_of(part)
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
        layer.block.set_submodule(layer.parts[part], (EmptyOutputLinear, BiasOnly)[dim](weight, bias))


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
        shape = (*x.shape[:-1], len(self.weight))
        return x.new_zeros(shape) if self.bias is None else self.bias.expand(shape)


class NoHeads(nn.Module):
    """An attention without heads, which not all fused kernels support; it keeps its parts under their names."""

    def __init__(self, core: nn.Module, parts: Mapping[str, str]) -> None:
        super().__init__()
        for name, child in core.named_children():
            self.add_module(name, child)
        self.head_dim = _head_size(core)
        # In BERT the output layer is beside the core, elsewhere inside it.
        output = parts["output"].removeprefix(f"{parts['core']}.")
        self.path = "" if output == parts["output"] else output

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Map [batch, length, hidden] to the output layer's bias, or to no features if that layer is outside."""
        nothing = hidden_states[..., :0]
        return (self.get_submodule(self.path)(nothing) if self.path else nothing), None
