"""Every snippet of the guide on one's own code, run on tiny models."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from transformers import AutoModelForTokenClassification

from tiny_hub import tokenizer
from tiny_objects import ROWS, STEPS, TRAIN, VALIDATION, accuracy, classifier, model_of, trainer_of

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "own-code.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.M | re.S)


def cycle(loader: Any, count: int) -> Iterator[Any]:
    return itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), count)


def surroundings(folder: Path) -> dict[str, Any]:
    """What a reader has: a model, its optimizer, rows, a Trainer."""
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = [{name: torch.tensor(value) for name, value in ROWS[i].items()} for i in range(len(ROWS))]
    loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True)  # type: ignore[arg-type]
    tokens = [{"input_ids": [7, 9, i % 50], "attention_mask": [1, 1, 1], "labels": [0, 1, -100]} for i in range(16)]
    x = torch.randn(64, 8)
    return {
        "model": model, "optimizer": optimizer, "loader": loader, "batches": list(cycle(loader, STEPS)),
        "steps": STEPS, "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer), "cycle": cycle,
        "trainer": trainer_of(folder / "trainer", [], max_steps=150, save_strategy="no"), "folder": folder / "pruned",
        "train_rows": TRAIN, "eval_rows": VALIDATION, "compute_metrics": accuracy,
        "network": nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)),
        "pairs": list(zip(x, x[:, :2].argmax(1), strict=True)), "inputs": x, "answers": x[:, :2].argmax(1),
        "small": folder / "small",
        "raw_texts": datasets.Dataset.from_dict({"text": [f"text {i % 7}" for i in range(64)], "label": [0, 1] * 32}),
        "tagger": model_of(AutoModelForTokenClassification, num_labels=2), "tokens": tokens,
        "tokenizer": tokenizer(pairs=True), "token_metrics": lambda found: {"mean": float(found.predictions.mean())},
    }  # fmt: skip


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_of_the_guide_runs_and_prunes(number: int, tmp_path: Path) -> None:
    given = surroundings(tmp_path)
    lines = [line for line in SNIPPETS[number].splitlines() if line and not line.startswith(("from ", "import "))]
    assert len(lines) <= 15
    exec(compile(SNIPPETS[number], GUIDE.name, "exec"), given)
    masks = given["masks"] if "masks" in given else getattr(given.get("pruned"), "masks", None)
    if masks is not None:
        removed = sum(int((~m).sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
        assert removed == pytest.approx(0.5 if "2:4" in SNIPPETS[number] else 0.7, abs=0.01)
