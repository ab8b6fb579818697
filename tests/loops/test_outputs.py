"""Evaluation of objects: outputs of any shape, batches without labels, metrics that keep nothing, padded tokens."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    GPT2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from sparsesoup import TrainingConfig, UserError
from sparsesoup.loops.objects import prune_model
from tiny_hub import tokenizer
from tiny_objects import model_of

ARGS = TrainingConfig(learning_rate=5e-3, batch_size=4)
SHORT: dict[str, Any] = {"sparsity": 0.5, "steps": 6, "train": ARGS, "progress": False}
COLLATE = DataCollatorForTokenClassification(tokenizer(pairs=True))


def token_rows(count: int = 30) -> list[dict[str, Any]]:
    """Rows of 3 to 17 tokens, with a label for all but the first and every fourth."""
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        ids = draw.integers(10, 40, size=int(draw.integers(3, 18))).tolist()
        labels = [-100 if i % 4 == 0 else number % 3 for i, number in enumerate(ids)]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def alone(model: nn.Module, row: dict[str, Any]) -> Tensor:
    """Logits of the labelled tokens of a row on its own."""
    given = {name: torch.tensor(value)[None] for name, value in row.items() if name != "labels"}
    with torch.no_grad():
        logits: Tensor = model(**given).logits[0]
    return logits[torch.tensor(row["labels"]) != -100]


def token_accuracy(found: Any) -> dict[str, float]:
    known = found.label_ids != -100
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids)[known].mean())}


@pytest.mark.parametrize("batch_size", [1, 4, 30])
def test_padded_tokens_score_as_each_row_alone(batch_size: int) -> None:
    rows = token_rows()
    found = prune_model(
        "magnitude", model_of(AutoModelForTokenClassification, num_labels=3), rows, data_collator=COLLATE,
        compute_metrics=token_accuracy, **(SHORT | {"train": TrainingConfig(batch_size=batch_size), "steps": 0}),
    )  # fmt: skip
    logits = torch.cat([alone(found.model, row) for row in rows])
    labels = torch.cat([torch.tensor(row["labels"]) for row in rows])
    labels = labels[labels != -100]
    assert found.metrics["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
    loss = float(nn.functional.cross_entropy(logits, labels))
    assert found.metrics["negative_loss"] == pytest.approx(-loss, rel=1e-5)


class Accumulated:
    """Right and all labelled tokens so far; the last batch of an evaluation gives the result."""

    def __init__(self) -> None:
        self.right, self.all, self.calls, self.largest = 0, 0, 0, 0

    def __call__(self, found: Any, compute_result: bool) -> dict[str, float]:
        known = found.label_ids != -100
        self.right += int((found.predictions.argmax(-1) == found.label_ids)[known].sum())
        self.all, self.calls = self.all + int(known.sum()), self.calls + 1
        self.largest = max(self.largest, found.predictions.numel())
        if not compute_result:
            return {}
        result = {"accuracy": self.right / self.all}
        self.right = self.all = 0
        return result


def test_metrics_that_accumulate_keep_no_outputs() -> None:
    given: dict[str, Any] = {
        "model": model_of(AutoModelForTokenClassification, num_labels=3), "train_dataset": token_rows(),
        "data_collator": COLLATE, **SHORT,
    }  # fmt: skip
    whole = prune_model("gradual", compute_metrics=token_accuracy, **given)
    metric = Accumulated()
    found = prune_model("gradual", compute_metrics=metric, batch_eval_metrics=True, **given)
    assert found.metrics["accuracy"] == pytest.approx(whole.metrics["accuracy"])
    assert metric.calls == 4  # batches of 8 rows, of 30
    assert metric.largest <= 8 * 17 * 3


def test_several_outputs_and_several_labels_come_as_tuples() -> None:
    rows = [
        {"input_ids": [7, 9, i % 40, 8], "attention_mask": [1] * 4, "start_positions": i % 3, "end_positions": 3}
        for i in range(18)
    ]
    seen = []

    def exact(found: Any) -> dict[str, float]:
        (start, end), (first, last) = found.predictions, found.label_ids
        seen.append((start.shape, end.shape, first.shape, last.shape))
        return {"exact": float(((start.argmax(-1) == first) & (end.argmax(-1) == last)).mean())}

    found = prune_model("gradual", model_of(AutoModelForQuestionAnswering), rows, compute_metrics=exact, **SHORT)
    assert seen == [((18, 4), (18, 4), (18,), (18,))]
    assert list(found.metrics) == ["exact", "negative_loss"]


class Twins(nn.Module):
    """An autoencoder with two outputs by name, one of which has no row of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.outside, self.end = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.outside(torch.relu(self.inside(x))))
        return {"again": self.end(hidden), "hidden": hidden.reshape(len(x), 3, 2, 2)}


def error(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"])["again"] - batch["x"]).square().mean()


@pytest.mark.parametrize("method", ["gradual", "wanda", "sparsegpt", "isp-no-soup", "snip"])
def test_batches_without_labels_and_outputs_by_name(method: str) -> None:
    rows = [{"x": row} for row in torch.randn(22, 6, generator=torch.Generator().manual_seed(0))]
    seen = []

    def spread(found: Any) -> dict[str, float]:
        again, hidden = found.predictions
        seen.append((again.shape, hidden.shape, found.label_ids))
        return {"spread": float(again.std())}

    found = prune_model(method, Twins(), rows, loss=error, compute_metrics=spread, **(SHORT | {"steps": 20}))
    assert seen[-1] == ((22, 6), (22, 3, 2, 2), None)
    assert found.metrics["negative_loss"] < 0
    with_teacher = prune_model("magnitude", Twins(), rows, loss=error, teacher=found.model, **SHORT)
    assert with_teacher.metrics["negative_loss"] < 0


@pytest.mark.parametrize("kind", ["tokens", "by name"])
def test_pins_teaches_itself_on_objects(kind: str) -> None:
    """Its teacher needs outputs beside the loss; a second pass of the student is not made."""
    passes = 0

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        nonlocal passes
        outputs = model(batch["x"])
        passes += isinstance(model, Twins) and model.training
        return (outputs["again"] - batch["x"]).square().mean(), outputs

    settings: dict[str, Any] = {**SHORT, "steps": 40}
    if kind == "tokens":
        model = model_of(AutoModelForTokenClassification, num_labels=3)
        found = prune_model("pins", model, token_rows(), data_collator=COLLATE, **settings)
    else:
        rows = [{"x": row} for row in torch.randn(22, 6, generator=torch.Generator().manual_seed(0))]
        found = prune_model("pins", Twins(), rows, loss=loss, **settings)
        assert passes == 41  # one of them for the report, which counts a step without a teacher
    assert found.ticket.notes["teachers"]
    assert found.ticket.sparsity == pytest.approx(0.5, abs=0.01)


def test_the_certainty_of_tokens_leaves_padding_out() -> None:
    from sparsesoup.methods.pins import answer_certainty

    outputs = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert torch.allclose(answer_certainty(outputs, mask)[:1], answer_certainty(outputs[:1, :3]))
    assert torch.allclose(answer_certainty(outputs, mask)[1:], answer_certainty(outputs[1:]))


def test_a_language_model_is_scored_by_its_tokens() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=32, pad_token_id=0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(1, 64, (20, 9)).tolist()]

    def accuracy(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions[:, :-1] == found.label_ids[:, 1:]).mean())}

    found = prune_model(
        "sparsegpt", AutoModelForCausalLM.from_config(config), rows, compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1), **(SHORT | {"steps": 0}),
    )  # fmt: skip
    ids = torch.tensor([row["input_ids"] for row in rows])
    with torch.no_grad():
        loss = float(found.model(input_ids=ids, labels=ids).loss)
    assert found.metrics["negative_loss"] == pytest.approx(-loss, rel=1e-5)


def test_an_encoder_and_decoder_of_padded_rows() -> None:
    torch.manual_seed(0)
    config = T5Config(
        d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=40, decoder_start_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    rows = [
        {"input_ids": [5 + i % 7] * (2 + i % 3), "attention_mask": [1] * (2 + i % 3), "labels": [6, 7 + i % 9, 1]}
        for i in range(16)
    ]

    def collate(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in some)
        padded = {
            name: torch.tensor([row[name] + [0] * (longest - len(row[name])) for row in some])
            for name in ("input_ids", "attention_mask")
        }
        return padded | {"labels": torch.tensor([row["labels"] for row in some])}

    def accuracy(found: Any) -> dict[str, float]:
        logits, hidden = found.predictions
        assert logits.shape == (16, 3, 40)
        assert hidden.shape == (16, 4, 16)  # the encoder's, padded
        return {"accuracy": float((logits.argmax(-1) == found.label_ids).mean())}

    model = T5ForConditionalGeneration(config)
    found = prune_model("gradual", model, rows, data_collator=collate, compute_metrics=accuracy, **SHORT)
    assert 0 <= found.metrics["accuracy"] <= 1


def test_outputs_that_cannot_be_joined_are_refused_with_the_remedy() -> None:
    class Square(nn.Module):
        """Outputs as wide as the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.second(self.first(x))
            return (hidden @ hidden.T)[:, :, None, None].expand(-1, -1, len(x), 2)

    rows = [{"x": row} for row in torch.randn(11, 4)]
    with pytest.raises(UserError, match=r"cannot be joined .*batch_eval_metrics=True") as caught:
        prune_model(
            "magnitude", Square(), rows, loss=lambda model, batch: model(batch["x"]).square().mean(),
            compute_metrics=lambda found: {"one": 1.0}, **SHORT,
        )  # fmt: skip
    assert "\n" not in str(caught.value)


def test_a_batch_that_holds_no_tensor_is_named() -> None:
    rows = [{"x": row, "id": "a"} for row in torch.randn(8, 6)]

    def collate(some: list[dict[str, Any]]) -> dict[str, Any]:
        return {"x": torch.stack([row["x"] for row in some]), "id": [row["id"] for row in some]}

    with pytest.raises(UserError, match="a batch has list as 'id'"):
        prune_model("magnitude", Twins(), rows, loss=error, data_collator=collate, **SHORT)
