"""A tiny BERT of random weights as a problem, its sentences of unequal length padded by batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from conftest import tiny
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.training.batching import Batch, RowBatches
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.problem import Problem
from tiny_hub import CONFIGS


def sentences(count: int, seed: int, extra: int = 0) -> RowBatches:
    """Rows of 3 to 9 word numbers; `extra` padding tokens are put behind the longest of each batch."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (count,), generator=draw).tolist()
    rows = [torch.randint(5, 64, (n,), generator=draw) for n in lengths]
    labels = [int(row.sum()) % 2 for row in rows]

    def collate(chosen: Sequence[tuple[Tensor, int]]) -> Batch:
        width = max(len(ids) for ids, _ in chosen) + extra
        ids = torch.stack([functional.pad(ids, (0, width - len(ids))) for ids, _ in chosen])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([y for _, y in chosen])}

    return RowBatches(list(zip(rows, labels, strict=True)), collate, tuple(lengths))


def bert(
    dtype: torch.dtype = torch.float32, family: Any = "bert", attention: str = "sdpa", extra: int = 0, **changes: Any
) -> Problem:
    """Two classes of random sentences; the model computes attention fused unless told otherwise, or unable to."""
    config = CONFIGS[family]() if isinstance(family, str) else family
    attention = "eager" if family == "deberta-v2" else attention
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.2)
    plain: dict[str, Any] = {
        "pretrained": model.to(dtype),
        "targets": find_prunable(model),
        "train": sentences(24, 1, extra),
        "validation": sentences(12, 2),
        "predict": lambda model, batch: model(**{n: t for n, t in batch.items() if n != "labels"}).logits,
        "steps": 8,
        "training": TrainingConfig(learning_rate=1e-3, batch_size=8),
    }
    return tiny(**(plain | changes))
