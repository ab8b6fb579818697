"""Checkpoint + dataset -> Problem, and the one function that opens the test split."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from sparsesoup.data import Batch
from sparsesoup.errors import UserError
from sparsesoup.hub.families import prunable
from sparsesoup.hub.models import load_classifier, load_tokenizer
from sparsesoup.hub.sources import Source, open_splits, open_test, training_splits
from sparsesoup.hub.tasks import Task, find_task, metric
from sparsesoup.hub.text import encode
from sparsesoup.journal import Journal
from sparsesoup.meter import Cost, Meter
from sparsesoup.problem import Observer, Problem, Silent, Training, evaluate


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which model and which data.

    Args:
        model: Hub id, folder, run directory, or minilm (embedded).
        dataset: Hub name, path, name below the data root, or docstrings (embedded).
        data_root: folder of named datasets; default the environment variable SPARSESOUP_DATA.
        dataset_config: configuration of a Hub dataset.
        text_columns: the one or two columns to read; default found.
        label_column: the column to predict; default found.
        max_length: tokens of a row at most; longer ones are cut.
        trust_remote_code: run code that comes with the model.
        seed: of everything random.
    """

    model: str = "minilm"
    dataset: str = "docstrings"
    data_root: str | None = None
    dataset_config: str | None = None
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    max_length: int = 128
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UserError(f"max_length must be at least 2 tokens, got {self.max_length}")


@dataclass(frozen=True)
class Opened:
    """A dataset whose task is known."""

    source: Source
    task: Task


def open_task(place: Place) -> Opened:
    """Find the dataset and its columns."""
    source = open_splits(place.dataset, data_root=place.data_root, config=place.dataset_config)
    task = find_task(source.train, source.name, place.text_columns, place.label_column)
    return Opened(source, task)


def build(
    place: Place,
    opened: Opened,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    training: Training | None = None,
    meter: Meter | None = None,
    journal: Journal | None = None,
    observer: Observer | None = None,
) -> Problem:
    """The problem of pruning a model for a text-classification task; T is `steps` or `epochs`, or else 3 epochs."""
    training, meter = training or Training(), meter or Meter()
    train, validation = training_splits(opened.source, opened.task, place.seed)
    model = load_model(place, opened)
    tokenizer = load_tokenizer(place.model, place.trust_remote_code)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    _check_length(place, model.config)
    rows = encode(train, opened.task, tokenizer, place.max_length)
    per_epoch = max(1, len(rows) // training.batch_size)
    return Problem(
        pretrained=model,
        targets=prunable(model),
        train=rows,
        validation=encode(validation, opened.task, tokenizer, place.max_length),
        predict=_predict,
        criterion=_criterion(opened.task),
        metric=metric(opened.task),
        steps=steps if steps is not None else max(1, round((epochs or 3.0) * per_epoch)),
        training=training,
        seed=place.seed,
        meter=meter,
        journal=journal or Journal(meter),
        observer=observer or Silent(),
    )


def load_model(place: Place, opened: Opened, whole: bool = False) -> Any:
    """The place's model with a head for the task; `whole`: the head must be its own, as a teacher's."""
    return load_classifier(place.model, opened.task, place.seed, place.trust_remote_code, whole)


def _check_length(place: Place, config: Any) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions and "roberta" in str(config.model_type):
        positions -= config.pad_token_id + 1  # its positions begin behind the padding's
    if positions and place.max_length > positions:
        raise UserError(
            f"max_length {place.max_length} is above the {positions} positions of model {place.model}; "
            f"say --max-length {positions} or less"
        )


def score_test(problem: Problem, place: Place, opened: Opened) -> dict[str, Any]:
    """Scores of the problem's model on the test split: the only way there; a method cannot call it."""
    tokenizer = load_tokenizer(place.model, place.trust_remote_code)
    parts = open_test(opened.source, opened.task)
    prepared = problem.accelerator.prepare_model(copy.deepcopy(problem.pretrained), evaluation_mode=True)
    scores = {}
    for name, rows in parts.items():
        data = encode(rows, opened.task, tokenizer, place.max_length)
        scores[name] = evaluate(problem, prepared, data, Cost())
    return next(iter(scores.values())) if len(scores) == 1 else scores


def _predict(model: nn.Module, batch: Batch) -> Tensor:
    return model(**{name: t for name, t in batch.items() if name != "labels"}).logits


def _criterion(task: Task) -> Callable[[Tensor, Batch], Tensor]:
    def classify(outputs: Tensor, batch: Batch) -> Tensor:
        return functional.cross_entropy(outputs.float(), batch["labels"])

    def regress(outputs: Tensor, batch: Batch) -> Tensor:
        return functional.mse_loss(outputs.float().squeeze(-1), batch["labels"])

    return classify if task.labels else regress
