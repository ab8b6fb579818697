"""The prunable parameters of a transformer: the linear weights inside its repeated blocks, with their roles."""

import contextlib
import re

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsesoup.core.errors import UserError
from sparsesoup.core.targets import Target, Targets
from sparsesoup.hub.models.layer_layouts import prunable_layers, role_of
from sparsesoup.hub.models.narrow_layers import NarrowLinear

# Two-dimensional but not linear layers: tables of Swin, BEiT, XLNet and similar models, the state space of Mamba.
NO_MATRIX = r"bias|position|embed|rel_pos|token|^A_log$|^D$"
NOT_LINEAR = (nn.Embedding, nn.modules.conv._ConvNd, nn.LayerNorm, nn.RMSNorm)


def find_prunable(model: PreTrainedModel) -> Targets:
    """Return the prunable parameters of a model, in its own order."""
    targets = prunable_matrices(model)
    if not targets:
        raise UserError(
            f"found nothing to prune in {type(model).__name__}: expected linear weights inside a list of repeated "
            f"blocks; use a transformer encoder such as BERT"
        )
    return targets


def prunable_matrices(model: PreTrainedModel) -> Targets:
    """Return the prunable parameters of a model, in its own order; empty if all heads and units were cut out.

    The rule: every matrix (or stack of matrices) below a list of repeated blocks of the base model. This excludes
    embeddings, norms, biases, position tables beside the blocks (DeBERTa's rel_embeddings), pooler and task head. It
    also excludes gains and temperatures with sides of 1 (Swin v2's logit_scale, ConvNeXt v2's grn), and convolutions: a
    pattern refers to [out, in], and a depthwise kernel has no inputs to choose from.
    """
    base = getattr(model, model.base_model_prefix, model)
    blocks = _block_lists(base)
    prefix = f"{model.base_model_prefix}." if base is not model else ""
    owners = dict(model.named_modules())
    targets: Targets = {}
    heads = _head_widths(model)
    for name, parameter in model.named_parameters():
        inside = any(name.startswith(f"{prefix}{block}.") for block in blocks)
        if inside and _is_matrix(name, parameter, owner := owners[name.rpartition(".")[0]]):
            role, transposed = role_of(name), isinstance(owner, Conv1D)
            head = heads[name] if name in heads else _head_width(model, role, parameter, transposed)
            targets[name] = Target(role, tuple(parameter.shape), transposed, head)
    return targets


def _is_matrix(name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
    """Return True for the matrix of a linear layer, or a stack of them, with both sides above 1."""
    linear = not isinstance(owner, NOT_LINEAR) and "Norm" not in type(owner).__name__
    table = re.search(NO_MATRIX, name.rpartition(".")[2])
    return parameter.dim() >= 2 and min(parameter.shape[-2:]) > 1 and linear and not table


def _head_widths(model: PreTrainedModel) -> dict[str, int]:
    """Return the head width of each matrix that is split into heads, as in the model's own attention; 0 if they differ.

    config.json does not have it for a compact model, whose layers have fewer heads, nor for CLIP's towers.
    """
    names, found = {id(p): name for name, p in model.named_parameters()}, dict[str, int]()
    with contextlib.suppress(UserError):  # an unknown model type
        for layer in prunable_layers(model):
            parts = {role: layer.module_of(role) for role in ("query", "key", "value", "output")}
            even = not any(isinstance(parts[role], NarrowLinear) for role in ("query", "key", "value"))
            found |= {names[id(part.weight)]: layer.head_size if even else 0 for part in parts.values()}
    return found


def _block_lists(base: nn.Module) -> list[str]:
    """Return the names of the lists of repeated blocks, the outer ones if they are nested.

    timm and open_clip may keep theirs in an nn.Sequential. Elsewhere that is what a block is made of, so it counts only
    if there is no list, and if all its members are of one class that has submodules.
    """
    modules = dict(base.named_modules())
    found = [name for name, m in modules.items() if isinstance(m, nn.ModuleList) and len(m)]
    for name, m in modules.items() if not found else ():
        if isinstance(m, nn.Sequential) and len({type(member) for member in m}) == 1 and [*m[0].children()]:
            found.append(name)
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _head_width(model: PreTrainedModel, role: str, parameter: nn.Parameter, transposed: bool) -> int:
    """Return the width of an attention head along the split side of a matrix; 0 if it is not split into heads."""
    count = getattr(model.config, "num_attention_heads", 0) or 0
    if role not in ("query", "key", "value", "output") or not isinstance(count, int) or count < 1:
        return 0
    if role in ("key", "value"):
        # Grouped-query attention: fewer heads than in the query, so they cannot be coupled one to one.
        count = getattr(model.config, "num_key_value_heads", None) or count
    side = parameter.shape[int((role == "output") != transposed)]
    return 0 if side % count else side // count
