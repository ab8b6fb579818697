"""Models, datasets and Trainers in memory, pruned by our loop: any method, and what comes out works elsewhere."""

import copy
import re
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from conftest import same
from sparsesoup import InstantSoup, TrainingConfig, UserError, export, load_masks, prune
from sparsesoup.core.files import load_table
from sparsesoup.core.masks import count_kept, count_total
from sparsesoup.loops.objects import prune_model, prune_trainer
from sparsesoup.loops.trainer_arguments import HARMLESS, HONOURED, ignored_parts, trackers_of
from tiny_hub import tokenizer
from tiny_objects import TRAIN, VALIDATION, accuracy, model_of

ARGS = TrainingConfig(learning_rate=5e-3, batch_size=8)


@pytest.mark.parametrize("method", ["isp", "imp", "movement", "platon", "snip", "lottery-pools"])
def test_a_model_of_transformers_is_pruned_as_an_object(method: str) -> None:
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    chosen: Any = InstantSoup(stages=2, weak_masks=2) if method == "isp" else method
    found = prune_model(chosen, model, TRAIN, VALIDATION, sparsity=0.5, steps=30, train=ARGS, compute_metrics=accuracy)
    assert same(model.state_dict(), before)
    assert 2 * count_kept(found.masks) == count_total(found.masks)
    params = dict(found.model.named_parameters())
    assert not any(bool(params[name][~mask].any()) for name, mask in found.masks.items())
    assert list(found.metrics) == ["accuracy", "negative_loss"]
    logits = torch.cat([found.model(**_row(row)).logits for row in VALIDATION]).argmax(-1)
    assert found.metrics["accuracy"] == pytest.approx(
        float((logits == torch.tensor(VALIDATION["labels"])).float().mean())
    )
    assert found.cost["validation"]["examples"] >= len(VALIDATION)


def test_the_second_pass_of_metrics_is_charged_where_there_is_one() -> None:
    """The logits for `compute_metrics` take a pass beside that of a loss that returns none."""
    given: dict[str, Any] = {"sparsity": 0.5, "steps": 4, "train": ARGS}

    def flops(**more: Any) -> float:
        return prune_model("magnitude", model_of(), TRAIN, VALIDATION, **given, **more).cost["validation"]["flops"]

    def both(model: nn.Module, batch: Any) -> Any:
        found = model(**batch)
        return found.loss, found.logits

    plain = flops()
    assert flops(compute_metrics=accuracy) == plain
    assert flops(compute_metrics=accuracy, loss=both) == plain
    assert flops(compute_metrics=accuracy, loss=lambda model, batch: model(**batch).loss) == 2 * plain


def _row(row: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(value)[None] for name, value in row.items() if name != "labels"}


def test_tokens_with_dynamic_padding_and_metrics_of_ones_own() -> None:
    """Named entities: one label a token, padded with -100, logits of batches of other lengths."""
    draw = np.random.default_rng(0)
    rows = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [i % 3 for i in ids]}
        for ids in (draw.integers(10, 40, size=int(draw.integers(4, 17))).tolist() for _ in range(48))
    ]
    seen = []

    def right(found: Any) -> dict[str, float]:
        seen.append((found.predictions.shape, found.label_ids.shape))
        known = found.label_ids != -100
        return {"token_accuracy": float((found.predictions == found.label_ids)[known].mean())}

    found = prune_model(
        "gradual", model_of(AutoModelForTokenClassification, num_labels=3), rows, rows[:20], sparsity=0.6, steps=40,
        train=ARGS, data_collator=DataCollatorForTokenClassification(tokenizer(pairs=True)), compute_metrics=right,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )  # fmt: skip
    longest = max(len(row["labels"]) for row in rows[:20])
    assert seen[-1] == ((20, longest), (20, longest))
    assert 0 <= found.metrics["token_accuracy"] <= 1


def test_several_labels_a_row() -> None:
    rows = TRAIN.map(lambda row: {"labels": [float(row["labels"]), 1.0 - row["labels"], 1.0]})
    model = model_of(num_labels=3, problem_type="multi_label_classification")
    found = prune_model("isp-no-soup", model, rows, sparsity=0.5, steps=20, train=ARGS)
    assert list(found.metrics) == ["negative_loss"]
    assert found.metrics["negative_loss"] < 0


def test_a_plain_module_on_tuples_and_on_a_stream() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(96, 8, generator=draw)
    y = x[:, :2].argmax(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        features, labels = batch
        return functional.cross_entropy(model(features), labels)

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(x, y, strict=True)

    rows = torch.utils.data.TensorDataset(x, y)
    whole = prune_model("imp", model, rows, sparsity=0.6, steps=24, train=ARGS, loss=loss, head=("4.weight", "4.bias"))
    assert set(whole.masks) == {"0.weight", "2.weight"}
    streamed = prune_model("imp", model, stream(), sparsity=0.6, steps=12, train=ARGS, loss=loss)
    listed = prune_model("imp", model, list(zip(x, y, strict=True)), sparsity=0.6, steps=12, train=ARGS, loss=loss)
    assert same(streamed.masks, listed.masks)
    with pytest.raises(UserError, match="has no length; give steps"):
        prune_model("imp", model, stream(), sparsity=0.6, train=ARGS, loss=loss)


def test_what_is_saved_loads_elsewhere_and_exports(tmp_path: Path) -> None:
    found = prune_model("magnitude", model_of(), TRAIN, sparsity=0.5, steps=4, train=ARGS)
    folder = found.save(tmp_path / "pruned")
    again = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert same(again.state_dict(), found.model.state_dict())
    masks, facts = load_masks(folder)
    assert same(masks, found.masks)
    assert facts["method"] == "magnitude"
    export(folder, "packed", tmp_path / "packed")
    assert (tmp_path / "packed").is_dir()


class Smoothed(Trainer):
    """A Trainer with a loss of its own."""

    calls = 0

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        Smoothed.calls += 1
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = functional.cross_entropy(outputs.logits, labels, label_smoothing=0.3)
        return (loss, outputs) if return_outputs else loss


def trainer_of(folder: Path, kind: type[Trainer] = Trainer, **changes: Any) -> Trainer:
    given: dict[str, Any] = {"max_steps": 20, "learning_rate": 5e-3, "per_device_train_batch_size": 8}
    given |= {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "seed": 3}
    arguments = TrainingArguments(**(given | changes))
    return kind(
        model_of(), arguments, train_dataset=TRAIN, eval_dataset=VALIDATION, compute_metrics=accuracy
    )  # fmt: skip


def test_a_trainer_gives_all_that_is_needed(tmp_path: Path) -> None:
    found = prune_trainer("imp", trainer_of(tmp_path), sparsity=0.5)
    training = TrainingConfig(learning_rate=5e-3, batch_size=8, weight_decay=0.0, warmup_ratio=0.0)
    same_by_hand = prune_model(
        "imp", model_of(), TRAIN, VALIDATION, sparsity=0.5, steps=20, train=training, seed=3, compute_metrics=accuracy
    )
    assert same(found.masks, same_by_hand.masks)
    assert found.metrics == same_by_hand.metrics


def test_a_trainers_own_loss_is_what_is_trained(tmp_path: Path) -> None:
    Smoothed.calls = 0
    found = prune_trainer("gradual", trainer_of(tmp_path, Smoothed), sparsity=0.5)
    assert Smoothed.calls > 20
    plain = prune_trainer("gradual", trainer_of(tmp_path), sparsity=0.5)
    assert found.metrics["negative_loss"] != plain.metrics["negative_loss"]


def test_a_loss_of_another_model_is_refused() -> None:
    model, rows = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), [{"x": torch.randn(4)} for _ in range(8)]
    with pytest.raises(UserError, match="does not use the model that it is given"):
        prune_model("gradual", model, rows, sparsity=0.5, steps=20, loss=lambda _, batch: model(batch["x"]).mean())


def test_arguments_that_are_not_honoured_are_named_before_the_first_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lr_scheduler_type="cosine", adam_beta2=0.95)
    with pytest.warns(UserWarning, match=r"not honoured while pruning: adam_beta2=0.95, lr_scheduler_type=cosine"):
        prune_trainer("magnitude", trainer, sparsity=0.5)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"report_to": "tensorboard"}, "report_to=tensorboard"),
        ({"metric_for_best_model": "accuracy", "greater_is_better": False}, "greater_is_better=False, metric_for"),
        ({"include_for_metrics": ["inputs"]}, r"include_for_metrics=\['inputs'\]"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches=False"),
        ({"eval_strategy": "epoch", "eval_delay": 3, "eval_on_start": True}, "eval_delay=3, eval_on_start=True"),
        ({"push_to_hub": True}, "push_to_hub=True"),
        ({"data_seed": 3}, "data_seed=3"),
        ({"save_strategy": "steps", "save_steps": 8}, "save_steps=8"),
    ],
)
def test_no_argument_is_ignored_in_silence(given: Any, named: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.args = TrainingArguments(str(tmp_path), use_cpu=True, **({"report_to": "none"} | given))
    assert re.search(named, ", ".join(ignored_parts(trainer, [])))


def test_what_is_honoured_or_harmless_is_not_named(tmp_path: Path) -> None:
    calm = {"save_strategy": "no", "label_names": ["labels"], "dataloader_num_workers": 1,
            "per_device_eval_batch_size": 4, "weight_decay": 0.1, "eval_strategy": "epoch"}  # fmt: skip
    trainer = trainer_of(tmp_path, **calm)
    assert ignored_parts(trainer, []) == []
    trainer.args.report_to = ["wandb"]
    assert ignored_parts(trainer, trackers_of(trainer.args, folder=False)) == []


def test_names_of_arguments_are_those_of_transformers() -> None:
    known = {field.name for field in fields(TrainingArguments)}
    assert (HONOURED | HARMLESS) - known <= {"warmup_ratio", "overwrite_output_dir", "local_rank"}  # of older ones
    assert not HONOURED & HARMLESS


def test_a_loop_of_ones_own_inside_a_trainer_is_named(tmp_path: Path) -> None:
    class Mine(Trainer):
        def training_step(self, *given: Any, **more: Any) -> Any:
            return super().training_step(*given, **more)

    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Mine(model, args, train_dataset=TRAIN, optimizers=(optimizer, None))
    assert ignored_parts(trainer, []) == ["optimizer", "Mine.training_step"]


def test_a_trainers_trackers_are_ours_where_the_run_has_a_folder(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "trainer", report_to="tensorboard", max_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = prune_trainer("magnitude", trainer, sparsity=0.5, out=tmp_path / "runs")
    assert found.path is not None
    assert list((found.path / "tensorboard").glob("events*"))


def test_labels_are_those_that_the_trainer_names(tmp_path: Path) -> None:
    seen: list[Any] = []
    trainer = trainer_of(tmp_path, label_names=["token_type_ids"], max_steps=2)
    trainer.compute_metrics = lambda found: {"one": float(len(seen.append(found.label_ids.shape) or "1"))}
    prune_trainer("magnitude", trainer, sparsity=0.5)
    assert seen[-1] == (24, 24)


def test_the_call_that_repeats_a_trainers_run_names_the_trainer(tmp_path: Path) -> None:
    found = prune_trainer("magnitude", trainer_of(tmp_path), sparsity=0.5, steps=4)
    said = found.report["command"]
    assert said.startswith("sparsesoup.prune('magnitude', trainer=trainer, ")
    assert not re.search("loss=|data_collator=|model=|train_dataset=", said)
    assert found.report["task"].startswith("objects in memory (trainer),")


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"eval_strategy": "steps", "eval_steps": 6}, [6, 12, 18]),
        ({"eval_strategy": "steps", "eval_steps": 0.25}, [5, 10, 15, 20]),
        ({"eval_strategy": "epoch"}, [8, 16]),  # of 64 rows, 4 * 2 of them a step
        ({}, []),
    ],
)
def test_a_trainer_is_validated_when_its_arguments_say_so(given: Any, steps: list[int], tmp_path: Path) -> None:
    found = prune_trainer("magnitude", trainer_of(tmp_path, **given), sparsity=0.5)
    assert [row["step"] for row in found.evaluations] == steps
    assert all("negative_loss" in row["scores"] for row in found.evaluations)


def test_callbacks_that_are_not_called_are_named_before_the_first_step(tmp_path: Path) -> None:
    class Mine(TrainerCallback):
        pass

    trainer = trainer_of(tmp_path)
    trainer.add_callback(Mine())
    trainer.add_callback(EarlyStoppingCallback(2))
    with pytest.warns(UserWarning, match="not honoured while pruning: Mine, EarlyStoppingCallback"):
        prune_trainer("magnitude", trainer, sparsity=0.5)


def test_early_stopping_of_objects_ends_at_the_best_validation(tmp_path: Path) -> None:
    training = TrainingConfig(learning_rate=0.05, batch_size=8, eval_steps=1, early_stopping_patience=2)
    found = prune_trainer("gradual", trainer_of(tmp_path), sparsity=0.5, steps=40, train=training)
    note = found.ticket.notes["early_stopping"]
    assert found.metrics["accuracy"] == note["best"]
    assert note["step"] >= 28
    assert sum(int(m.sum()) for m in found.masks.values()) * 2 == sum(m.numel() for m in found.masks.values())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model": None}, "give model=... and train_dataset=..., both as objects"),
        ({"model": nn.Linear(4, 4)}, "Linear brings no loss"),
        ({"train_dataset": []}, "has no rows"),
        ({"sparsity": "0.5"}, "sparsity: expected a number or null, got '0.5'"),
        ({"steps": "10"}, "steps: expected a whole number or null, got '10'"),
        ({"steps": 2.5}, r"steps: expected a whole number or null, got 2\.5"),
        ({"steps": None, "epochs": "3"}, "epochs: expected a number or null, got '3'"),
        ({"method": "nonsense"}, "unknown method 'nonsense'"),
        ({"train_dataset": TRAIN.remove_columns("labels")}, "returned no loss"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(given: dict[str, Any], says: str) -> None:
    table: dict[str, Any] = {"method": "gradual", "model": model_of(), "train_dataset": TRAIN, "steps": 20}
    with pytest.raises(UserError, match=says) as caught:
        prune_model(**(table | given))
    assert "\n" not in str(caught.value)


def test_settings_of_objects_are_read_as_those_of_names() -> None:
    given: dict[str, Any] = {"model": model_of(), "train_dataset": TRAIN, "steps": 4, "sparsity": 0.5}
    found = prune("magnitude", train={"batch_size": 8, "learning_rate": 5e-3}, **given)
    assert same(found.masks, prune_model("magnitude", train=ARGS, **given).masks)
    with pytest.raises(UserError, match=r"learning_rte.*learning_rate"):
        prune("magnitude", train={"learning_rte": 1.0}, **given)
    with pytest.raises(UserError, match="sope"):
        prune("magnitude", method={"sope": "row"}, **given)


def test_objects_report_to_trackers_and_have_the_curve(tmp_path: Path) -> None:
    training = TrainingConfig(learning_rate=5e-3, batch_size=8, eval_steps=5)
    given: dict[str, Any] = {"sparsity": 0.5, "steps": 10, "train": training, "compute_metrics": accuracy}
    found = prune("magnitude", model=model_of(), train_dataset=TRAIN, eval_dataset=VALIDATION, out=tmp_path,
                  report_to="tensorboard", progress=False, **given)  # fmt: skip
    assert list((found.path / "tensorboard").glob("events*"))
    assert [row["step"] for row in found.evaluations] == [5, 10]
    plain = prune_model("magnitude", model_of(), TRAIN, VALIDATION, progress=False, **given)
    assert plain.evaluations == found.evaluations
    assert same(plain.masks, found.masks)
    with pytest.raises(UserError, match="report_to: tensorboard writes into the directory of the run"):
        prune_model("magnitude", model_of(), TRAIN, VALIDATION, report_to=["tensorboard"], progress=False, **given)


class Plain(nn.Module):
    """A module of its own: [4] -> 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.end = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(torch.relu(self.inside(x)))


PAIRS = [(x, i % 3) for i, x in enumerate(torch.randn(24, 4, generator=torch.Generator().manual_seed(1)))]


def pair_loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    outputs = model(batch[0])
    return nn.functional.cross_entropy(outputs, batch[1]), outputs


def test_metrics_get_the_last_part_of_pairs_as_labels() -> None:
    seen = []

    def right(found: Any) -> dict[str, float]:
        seen.append(found.label_ids.tolist())
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    given: dict[str, Any] = {"loss": pair_loss, "compute_metrics": right, "steps": 200, "train": ARGS}
    found = prune_model("magnitude", Plain(), PAIRS, sparsity=0.0, progress=False, **given)
    assert seen[-1] == [label for _, label in PAIRS]
    with torch.no_grad():
        answers = found.model(torch.stack([x for x, _ in PAIRS])).argmax(-1)
    assert found.metrics["accuracy"] == sum(map(int, answers == torch.arange(24) % 3)) / 24 > 0.3


def test_labels_under_a_name_of_ones_own_are_found_or_missed_aloud() -> None:
    seen, rows = [], [{"x": x, "target": label} for x, label in PAIRS]
    given: dict[str, Any] = {
        "loss": lambda model, batch: pair_loss(model, (batch["x"], batch["target"])), "steps": 2, "train": ARGS,
        "compute_metrics": lambda found: seen.append(found.label_ids) or {"seen": 1.0},
    }  # fmt: skip
    with pytest.warns(
        UserWarning, match=r"gets no labels: a batch has x, target, .* as labels; .*label_names=\[\.\.\.\]"
    ):
        prune_model("magnitude", Plain(), rows, sparsity=0.5, progress=False, **given)
    assert seen[-1] is None
    found = prune_model("magnitude", Plain(), rows, sparsity=0.5, progress=False, label_names=["target"], **given)
    assert seen[-1].tolist() == [label for _, label in PAIRS]
    loss = f"negative_loss {found.metrics['negative_loss']:.4g}"
    assert repr(found) == f"<Plain pruned by magnitude: 32 of 64 weights kept; seen 1, {loss}>"


def frozen() -> nn.Module:
    return Plain().requires_grad_(False)


def half_frozen() -> nn.Module:
    model = Plain()
    model.inside.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"loss": lambda model, batch: 1.0}, "loss: the loss of a batch must be a tensor of one number.*got 1.0"),
        ({"loss": lambda model, batch: None}, "got None"),
        ({"loss": lambda model, batch: model(batch[0])}, r"got a tensor of shape \(8, 3\)"),
        ({"loss": lambda model, batch: pair_loss(model, batch)[0].detach()}, "loss: it has no gradient"),
        ({"loss": "cross_entropy"}, "loss: must be a function, got 'cross_entropy'"),
        (
            {"loss": nn.CrossEntropyLoss()},
            r"loss: is a function of \(model, batch\), and CrossEntropyLoss takes \(outputs",
        ),
        ({"loss": functional.mse_loss}, r"loss=lambda model, batch: mse_loss\(model\(batch\[0\]\), batch\[1\]\)$"),
        ({"compute_metrics": "accuracy"}, "compute_metrics: must be a function, got 'accuracy'"),
        ({"compute_metrics": lambda found: 0.5}, "compute_metrics: must be a function that returns a dict.*got 0.5"),
        ({"prunable": ["inside.weight"]}, "prunable: must be a function"),
        ({"model": Plain}, "model: must be a module, or a name or folder, got <class"),
        ({"model": half_frozen()}, r"inside.weight is to be pruned and frozen \(1 such weights of 1\)"),
        ({"model": frozen()}, r"model: all weights of Plain are frozen; call model.requires_grad_\(True\)"),
        ({"eval_dataset": "validation"}, r"eval_dataset: must be rows, as .*, got 'validation'"),
        ({"eval_dataset": 0.1}, "eval_dataset: must be rows, as .*, got '0.1'"),
        ({"eval_dataset": []}, "eval_dataset: the dataset has no rows"),
        ({"train_dataset": DataLoader(PAIRS, batch_size=8)}, "train_dataset: it is a DataLoader; give its dataset"),
        ({"train_dataset": Path("reviews.csv")}, "train_dataset: must be rows"),
        ({"model": model_of(), "loss": None}, "a row is a tuple, whose parts have no names; give mappings"),
        (
            {"model": model_of(), "loss": None, "train_dataset": [{"input_ids": [5] * n, "labels": 0} for n in (3, 4)]},
            r"batch \(input_ids has 3 and 4 values\); give data_collator=.*, or processing_class=tokenizer, which pads",
        ),
        (
            {"train_dataset": [(torch.ones(n), 0) for n in (3, 4)]},
            "cannot be stacked to a batch.*give data_collator=",
        ),
        ({"train_dataset": pandas.DataFrame({"a": [1]})}, "train_dataset: it is a table of pandas; give datasets"),
        (
            {"prunable": lambda name: True},
            r"prunable: it is called with \(name, parameter\), and is a function of \(name",
        ),
        ({"loss": lambda batch: 0.0}, r"loss: it is called with \(model, batch\), and is a function of \(batch\)"),
        (
            {"loss": lambda model, batch: (pair_loss(model, batch)[0], None), "compute_metrics": len},
            "outputs are needed",
        ),
        (
            {"train": TrainingArguments("out", report_to="none")},
            "train: must be a TrainingConfig.*got TrainingArguments",
        ),
        ({"args": ARGS}, r"args: give train=TrainingConfig\(...\), or trainer=Trainer\(model, args"),
        ({"batch_size": 8}, "batch_size: unknown setting; did you mean train.batch_size"),
    ],
)
def test_slips_with_objects_are_refused_in_one_line(given: dict[str, Any], says: str) -> None:
    table: dict[str, Any] = {"model": Plain(), "train_dataset": PAIRS, "steps": 6, "loss": pair_loss, "train": ARGS}
    table = {**table, "compute_metrics": None, "progress": False, **given}
    before = copy.deepcopy(table["model"].state_dict()) if isinstance(table["model"], nn.Module) else {}
    with pytest.raises(UserError, match=says) as caught:
        prune("gradual", sparsity=0.5, **table)
    assert "\n" not in str(caught.value)
    assert not before or same(before, table["model"].state_dict())


def test_scores_that_are_no_numbers_are_left_out_aloud(tmp_path: Path) -> None:
    def metrics(found: Any) -> dict[str, Any]:
        table = {"f1": torch.tensor(0.5), "hits": np.float64(0.25), "correlation": float("nan")}
        return {**table, "confusion": [[1, 2], [3, 4]], "kind": "good"}

    given: dict[str, Any] = {"train_dataset": PAIRS, "steps": 4, "loss": pair_loss, "train": ARGS}
    with pytest.warns(UserWarning, match="compute_metrics: .* is no finite number") as said:
        found = prune_model("magnitude", Plain(), sparsity=0.5, progress=False, compute_metrics=metrics, **given)
    assert sorted(str(one.message).split()[1] for one in said) == ["confusion", "correlation", "kind"]
    assert [*found.metrics] == ["f1", "hits", "negative_loss"]
    assert [*found.metrics.values()][:2] == [0.5, 0.25]
    assert load_table(found.save(tmp_path / "run") / "report.json")["validation"] == found.metrics


def test_a_compiled_or_wrapped_model_is_pruned_inside() -> None:
    given: dict[str, Any] = {"train_dataset": PAIRS, "steps": 4, "loss": pair_loss, "progress": False}
    for wrapped in (torch.compile(Plain(), backend="eager"), nn.DataParallel(Plain())):
        found = prune("magnitude", model=wrapped, sparsity=0.5, **given)
        assert type(found.model) is Plain
        assert [*found.masks] == ["inside.weight"]


def test_a_trainer_must_be_one_with_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trainer: must be a Trainer of transformers, got Plain"):
        prune("gradual", trainer=Plain(), sparsity=0.5)
    trainer = trainer_of(tmp_path)
    trainer.train_dataset = None
    with pytest.raises(UserError, match="trainer: it has no train_dataset"):
        prune("gradual", trainer=trainer, sparsity=0.5)
