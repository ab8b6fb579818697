"""The parts of a model's repeated blocks, found by their names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsesoup.core.errors import UserError

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
        return head_size_of(self.module_of("core"))

    @property
    def num_heads(self) -> int:
        """The number of heads."""
        query = self.module_of("query")
        return int(getattr(query, "out_features", len(query.weight))) // self.head_size

    @property
    def num_units(self) -> int:
        """The number of feed-forward units."""
        return len(self.module_of("up").weight)


def head_size_of(core: nn.Module) -> int:
    """Return the width of a head of an attention module; 0 if that is not known."""
    return int(getattr(core, "attention_head_size", getattr(core, "head_dim", 0)))


def _parts_of(block: nn.Module, layout: LayerLayout) -> dict[str, str]:
    """Return part -> path in a block; {} if one is missing."""
    modules = dict(block.named_modules())
    linear = [(role_of(path), path) for path, module in modules.items() if hasattr(module, "weight")]
    parts = {SHORT.get(role, role): path for role, path in reversed(linear) if role != "other"}
    parts |= {"core": parts.get("query", "").rpartition(".")[0], "activation": layout.activation}
    needed = {"query", "key", "value", "output", "up", "down"}
    whole = needed <= parts.keys() and {*parts.values()} <= modules.keys() and head_size_of(modules[parts["core"]])
    return parts if whole else {}


def prunable_layers(model: Any) -> list[PrunableLayer]:
    """Return the blocks of a model, in order."""
    kind, base = str(model.config.model_type), getattr(model, model.base_model_prefix, model)
    blocks = {
        f"{name}.{i}": b for name, m in base.named_modules() if isinstance(m, nn.ModuleList) for i, b in enumerate(m)
    }
    layout = FAMILIES.get(kind)
    if hasattr(model.config, "low_rank_config"):
        raise UserError("layers of low rank have no heads and units to cut out; merge them first, by export --to dense")
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
