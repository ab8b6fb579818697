"""Rows and outputs of objects as users have them: tables with texts left in, outputs of any form."""

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from transformers import DataCollatorWithPadding

from conftest import same
from sparsesoup import Observer, UserError, prune
from tiny_hub import tokenizer
from tiny_objects import VALIDATION, accuracy, model_of, trainer_of


@dataclass
class Found:
    """Outputs of a model as a dataclass, with one that is not there."""

    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class Several(nn.Module):
    """A model whose outputs have a form of their own."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.form = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)), form

    def forward(self, x: torch.Tensor) -> Any:
        return self.form(self.layers(x))


def _loss_of_first(model: nn.Module, batch: Any) -> torch.Tensor:
    found = model(batch["x"])
    return nn.functional.cross_entropy(found.logits if isinstance(found, Found) else found[0], batch["labels"])


SMALL = [{"x": torch.randn(6), "labels": i % 2} for i in range(24)]
Pair = namedtuple("Pair", ["logits", "rest"])


@pytest.mark.parametrize("form", [Found, lambda logits: (logits, None), lambda logits: Pair(logits, None)])
def test_outputs_as_dataclass_or_named_tuple_or_with_none_are_scored(form: Any) -> None:
    given: Any = {"model": Several(form), "train_dataset": SMALL, "loss": _loss_of_first, "steps": 8}

    def metrics(found: Any) -> dict[str, float]:
        first = found.predictions["logits"] if isinstance(found.predictions, dict) else found.predictions[0]
        return {"rows": float(first.shape[0])}

    found = prune("gradual", **given, compute_metrics=metrics, sparsity=0.5, progress=False)
    assert found.metrics["rows"] == 24


def test_outputs_that_cannot_be_scored_are_refused_before_the_first_step() -> None:
    steps = list[Any]()

    class Steps(Observer):
        def step(self, record: Any) -> None:
            steps.append(record)

    given: Any = {"model": Several(lambda logits: (logits, "text")), "train_dataset": SMALL, "loss": _loss_of_first}
    with pytest.raises(UserError, match=r"outputs are tensors, or .*, got a str; let loss=\.\.\. return \(loss, outp"):
        prune("gradual", **given, compute_metrics=accuracy, steps=8, sparsity=0.5, progress=False, observer=Steps())
    assert not steps


def test_columns_that_the_model_does_not_take_are_left_out_before_a_collator_of_transformers(tmp_path: Path) -> None:
    """Tokenized tables keep their texts; the Trainer leaves these out of lists and streams too."""
    plain, named = tokenizer(pairs=True), [dict(row) | {"text": "a b", "words": ["a"]} for row in VALIDATION]
    given: Any = {"sparsity": 0.5, "steps": 8, "progress": False}
    whole = prune("gradual", model=model_of(), train_dataset=[*VALIDATION], processing_class=plain, **given)
    for rows in (named, datasets.Dataset.from_list(named)):
        found = prune("gradual", model=model_of(), train_dataset=rows, processing_class=plain, **given)
        assert same(found.masks, whole.masks)
        assert same(found.ticket.weights, whole.ticket.weights)
    trainer = trainer_of(tmp_path, [], max_steps=8, save_strategy="no")
    trainer.data_collator = DataCollatorWithPadding(plain)
    trainer.train_dataset = datasets.Dataset.from_list(named).to_iterable_dataset()  # type: ignore[assignment]
    assert prune("gradual", trainer=trainer, sparsity=0.5, progress=False).metrics.keys() == {"negative_loss"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a b", "labels": 1}, r"text is text\); encode it first, as dataset.map\(lambda row: tokenizer\(row"),
        (
            {"input_ids": [3, 4], "labels": [0, 1]},
            r"labels has \d and \d values\); give data_collator=DataCollatorForTok",
        ),
    ],
)
def test_rows_that_cannot_be_stacked_name_the_column(row: dict[str, Any], says: str) -> None:
    rows = [row, {k: v if isinstance(v, str | int) else [*v, *v] for k, v in row.items()}] * 8
    with pytest.raises(UserError, match=rf"cannot be stacked to a batch \({says}"):
        prune("gradual", model=model_of(), train_dataset=rows, processing_class=tokenizer(pairs=True), steps=8)
