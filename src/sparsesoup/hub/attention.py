"""The attention that a model is trained with."""

from typing import Any

import torch
from transformers import PreTrainedModel

from sparsesoup.hub.checkpoint import quiet


def attend_fast_(model: PreTrainedModel, precision: str) -> None:
    """Train with plain matrix products where torch's fused attention is slow: on its way back on a CPU in bf16.

    The shorter the rows the slower: of a step of a small ViT at 37 tokens it took a third (torch 2.13). Where attention
    has dropout, as in most models of texts, torch takes products by itself. What is saved is as ever.

    Args:
        model: as loaded; only how it computes is changed, and that only where it may be chosen.
        precision: of its training.
    """
    slow = precision == "bf16" and not torch.accelerator.is_available()
    if slow and model.config._attn_implementation == "sdpa" and not _drops(model.config.to_dict()):
        with quiet():
            model.set_attn_implementation("eager")


def _drops(config: dict[str, Any]) -> bool:
    """Whether attention has dropout, by any family's name of it, in the config of the model or of a part."""
    parts = [value for value in config.values() if isinstance(value, dict)]
    own = [value for key, value in config.items() if "attention" in str(key) and "drop" in str(key)]
    return any(own) or any(map(_drops, parts))
