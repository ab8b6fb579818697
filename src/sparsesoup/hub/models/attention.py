"""The attention that a model is trained with."""

import torch
from transformers import PreTrainedModel

from sparsesoup.hub.models.checkpoint import quiet_transformers


def use_faster_attention_(model: PreTrainedModel, precision: str) -> None:
    """Train with plain matrix products where torch's fused attention is slow: on its way back on a CPU in bf16.

    For models of images, whose rows are short and whose attention has no dropout: with dropout, as in most models of
    texts, torch takes products by itself. What is saved is as ever.

    Args:
        model: as loaded; only how it computes is changed, and that only where it may be chosen.
        precision: of its training.
    """
    if precision == "bf16" and not torch.accelerator.is_available() and model.config._attn_implementation == "sdpa":
        with quiet_transformers():
            model.set_attn_implementation("eager")
