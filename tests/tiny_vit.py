"""A tiny ViT of random weights as a problem, beside that of tiny_bert."""

from typing import Any

import torch
import transformers

import tiny_images
from conftest import tiny
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.training.batching import Batch, RowBatches
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.problem import Problem


def images(**changes: Any) -> Problem:
    """Two classes of random pictures, for a tiny ViT."""
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(tiny_images.CONFIGS["vit"]())
    pixels = torch.randn(24, 3, tiny_images.SIDE, tiny_images.SIDE)
    rows = [(x, int(x.mean() > 0)) for x in pixels]

    def collate(chosen: Any) -> Batch:
        x, y = zip(*chosen, strict=True)
        return {"pixel_values": torch.stack(x), "labels": torch.tensor(y)}

    return tiny(**({
        "pretrained": model, "targets": find_prunable(model), "steps": 12, "train": RowBatches(rows, collate),
        "validation": RowBatches(rows[:8], collate), "training": TrainingConfig(learning_rate=1e-3, batch_size=8),
        "predict": lambda model, batch: model(pixel_values=batch["pixel_values"]).logits,
    } | changes))  # fmt: skip
