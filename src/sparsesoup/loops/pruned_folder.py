"""The folder of a model that a foreign loop has pruned: its weights, and its masks beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import atomic_write
from sparsesoup.core.masks import Masks
from sparsesoup.core.ticket import save_masks
from sparsesoup.hub.models.loading import save_module


def save_pruned(model: nn.Module, masks: Masks, folder: str | Path, facts: Mapping[str, Any]) -> Path:
    """Write a model as `save_pretrained` does, or the weights of another module as model.safetensors, and its masks.

    Args:
        facts: of the masks, such as method and sparsity.
    Raises: UserError if the folder exists.
    """
    target = Path(folder)
    if target.exists():
        raise UserError(f"{target} is there already; give a folder that does not exist")
    base = getattr(model, "name_or_path", "") or type(model).__name__
    with atomic_write(target) as temporary:
        (type(model).save_pretrained if isinstance(model, PreTrainedModel) else save_module)(model, temporary)
        own = {name: mask.cpu() for name, mask in masks.items()}
        save_masks(temporary / "pruning", own, {**facts, "base_model": base})
    return target
