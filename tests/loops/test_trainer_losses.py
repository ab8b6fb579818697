"""The losses of Trainers: what they are given, and which of their parts are named or refused."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.nn import functional
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from conftest import same
from sparsesoup import PruningCallback, UserError, prune
from sparsesoup.loops.trainer_arguments import ignored_parts
from tiny_objects import ROWS, VALIDATION, accuracy, classifier, trainer_of


class SumLoss(Trainer):
    """A loss that is a sum over the labels, divided by their number, as the Trainer gives it."""

    outputs = 0

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found = model(**inputs)
        loss = functional.cross_entropy(found.logits, inputs["labels"], reduction="sum") / num_items_in_batch
        SumLoss.outputs += return_outputs
        return (loss, found) if return_outputs else loss


def test_a_loss_gets_the_number_of_labels_as_from_the_trainer(tmp_path: Path) -> None:
    def loss_of(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    given: Any = {"sparsity": 0.5, "steps": 8, "progress": False}
    plain = prune("gradual", trainer=trainer_of(tmp_path, [], save_strategy="no"), **given)
    function = trainer_of(tmp_path, [], save_strategy="no")
    function.compute_loss_func = loss_of
    for trainer in (trainer_of(tmp_path, [], SumLoss, save_strategy="no"), function):
        found = prune("gradual", trainer=trainer, **given)
        assert found.metrics == pytest.approx(plain.metrics, rel=1e-4)


def test_outputs_are_made_only_where_they_are_scored(tmp_path: Path) -> None:
    """In TRL's Trainers they cost another pass through the head, with the logits of all tokens in memory."""
    SumLoss.outputs = 0
    trainer = trainer_of(tmp_path, [], SumLoss, save_strategy="no")
    prune("gradual", trainer=trainer, sparsity=0.5, steps=8, progress=False)
    assert not SumLoss.outputs
    trainer.compute_metrics = accuracy
    prune("gradual", trainer=trainer, sparsity=0.5, steps=8, progress=False)
    batches = len(ROWS) // 8
    assert SumLoss.outputs == batches + 2  # two before the first step, which show that they can be scored


def test_other_evaluation_rows_take_the_place_of_the_trainers(tmp_path: Path) -> None:
    found = prune(
        "gradual",
        trainer=trainer_of(tmp_path, [], save_strategy="no"),
        eval_dataset=VALIDATION,
        sparsity=0.5,
        progress=False,
    )
    own = prune("gradual", trainer=trainer_of(tmp_path, [], save_strategy="no"), sparsity=0.5, progress=False)
    assert same(found.masks, own.masks)
    assert found.report["settings"]["objects"] == ["trainer", "eval_dataset"]
    assert found.metrics != own.metrics


def test_recomputed_activations_are_honoured_under_both_names(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer = trainer_of(tmp_path, [], gradient_checkpointing=True, save_strategy="no")
    assert not ignored_parts(trainer, ())


def test_an_evaluator_is_named(tmp_path: Path) -> None:
    trainer: Any = trainer_of(tmp_path, [], save_strategy="no")
    trainer.evaluator = lambda model: {"similarity": 1.0}
    assert ignored_parts(trainer, ()) == ["evaluator"]


def test_metrics_of_generated_tokens_are_refused_before_the_first_step(tmp_path: Path) -> None:
    arguments = Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, use_cpu=True, report_to="none")
    trainer = Seq2SeqTrainer(classifier(), arguments, train_dataset=ROWS, compute_metrics=accuracy)
    with pytest.raises(UserError, match=r"compute_metrics: this one is for generated tokens .* it would get logits"):
        prune("gradual", trainer=trainer, sparsity=0.5, steps=8, progress=False)


class LogitsAlone(nn.Module):
    """A model that returns its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = classifier()

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        return self.inside(input_ids=input_ids, attention_mask=attention_mask).logits


class LogitsLoss(Trainer):
    """The loss of such a model."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        logits = model(inputs["input_ids"], inputs["attention_mask"])
        loss = functional.cross_entropy(logits, inputs["labels"])
        return (loss, logits) if return_outputs else loss


def test_a_callback_whose_model_returns_no_loss_asks_for_the_trainers(tmp_path: Path) -> None:
    arguments = trainer_of(tmp_path, [], save_strategy="no", remove_unused_columns=False).args

    def trained(**given: Any) -> PruningCallback:
        pruning = PruningCallback("gradual-obs", sparsity=0.5, **given)
        LogitsLoss(LogitsAlone(), arguments, train_dataset=ROWS, callbacks=[pruning]).train()
        return pruning

    with pytest.raises(
        UserError, match=r"LogitsAlone returns no loss, .* as PruningCallback\(\.\.\., loss=lambda model"
    ):
        trained()

    def loss_of(model: nn.Module, batch: Any) -> Any:
        return functional.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    pruner = trained(loss=loss_of).pruner
    assert pruner is not None
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)
