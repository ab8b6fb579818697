"""The attention implementation for training."""

import torch
from transformers import PreTrainedModel

from sparsesoup.hub.models.checkpoint import quiet_transformers


def use_faster_attention_(model: PreTrainedModel, precision: str) -> None:
    """Train with plain matrix products where torch's fused attention is slow: its backward pass in bf16 on a CPU.

    For image models, whose rows are short and whose attention has no dropout; with dropout, as in most text models,
    torch uses products anyway. Saved models are unaffected.

    Args:
        model: the loaded model; only its attention implementation is changed, if it can be chosen.
        precision: precision of the training.
    """
    if precision == "bf16" and not torch.accelerator.is_available() and model.config._attn_implementation == "sdpa":
        with quiet_transformers():
            model.set_attn_implementation("eager")
