"""Task types: how each is detected, its head, loss and metric."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from sparsesoup.core.errors import UserError
from sparsesoup.core.plugins import load_plugins
from sparsesoup.hub.tasks import images, metrics, text, zero_shot
from sparsesoup.hub.tasks import question_answering as spans
from sparsesoup.hub.tasks.columns import find_task
from sparsesoup.hub.tasks.labels import TextTask, describe_text_task, has_labels, label_values
from sparsesoup.hub.tasks.metrics import MetricFunction
from sparsesoup.training.batching import Batch, RowBatches


class AnyTask(Protocol):
    """Parts of every task: the columns to read and that of the answers; `labels` too if these are classes."""

    @property
    def texts(self) -> tuple[str, ...]: ...

    @property
    def label(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class TaskType:
    """Everything that differs between task types. To add one, see docs/guides/extend.md.

    Args:
        task: class of its tasks, a frozen dataclass that is an `AnyTask`.
        find: (training split, dataset's name, text columns, label column) -> the task, or None for other datasets;
            raises a UserError if columns are missing. A column is None unless the user names it.
        head: transformers class that loads a model with this head.
        settings: task -> settings of the head in the model's config.json.
        check: (rows, task, split) raises a UserError for an invalid text or label.
        labelled: (rows, task) -> True if any row has a label.
        fits: (tokenizer, max_length, task) raises a UserError if rows of that length are impossible.
        encode: (rows, task, tokenizer or image processor, max_length) -> training data, and the metric.
        predict: (model, batch) -> outputs [rows, ...].
        criterion: task -> (outputs, batch) -> mean loss.
        length: default maximum tokens per row.
        describe: task -> description of inputs and outputs.
        images: True if rows hold images, for an image processor; else texts, for a tokenizer.
        windows: True if a row of the dataset may become several rows of tokens.
        load: (options of from_pretrained, task) -> the model; None if `head` loads it.
        ready: task -> origin of a head that needs no training; None if it is randomly initialised.
        save_extras: (folder pruning/, model, task) writes further files of a saved model.
    """

    task: type[Any]
    find: Callable[[Dataset, str, Sequence[str] | None, str | None], Any | None]
    head: Any
    settings: Callable[[Any], dict[str, Any]]
    check: Callable[[Dataset, Any, str], object]
    labelled: Callable[[Dataset, Any], bool] = has_labels
    fits: Callable[[Any, int, Any], object] = lambda tokenizer, length, task: text.check_tokenizer(tokenizer, length)
    encode: Callable[[Dataset, Any, Any, int], tuple[RowBatches, MetricFunction]]
    predict: Callable[[nn.Module, Batch], Tensor] = metrics.predict_logits
    criterion: Callable[[Any], Callable[[Tensor, Batch], Tensor]]
    length: int = 128
    describe: Callable[[Any], str]
    images: bool = False
    windows: bool = False
    load: Callable[[Mapping[str, Any], Any], Any] | None = None
    ready: Callable[[Any], str] | None = None
    save_extras: Callable[[Path, nn.Module, Any], None] | None = None


def head_settings(outputs: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a model's config.json that name its outputs."""
    table = dict(enumerate(outputs))
    return {"num_labels": len(outputs), "id2label": table, "label2id": {name: i for i, name in table.items()}}


SPANS = TaskType(
    task=spans.QuestionAnswering,
    find=spans.find_spans,
    head=AutoModelForQuestionAnswering,
    settings=lambda task: head_settings(("start", "end")),
    check=spans.answers_of,
    labelled=spans.has_answers,
    fits=spans.WindowBuilder,
    encode=spans.encode_questions,
    predict=spans.predict_spans,
    criterion=lambda task: spans.span_loss,
    length=384,
    describe=lambda task: f"spans of column {task.texts[1]} that answer column {task.texts[0]}",
    windows=True,
)
CLASSES = TaskType(
    task=TextTask,
    find=find_task,
    head=AutoModelForSequenceClassification,
    settings=lambda task: {
        **head_settings(task.labels or ("score",)),
        "problem_type": "single_label_classification" if task.labels else "regression",
    },
    check=lambda rows, task, split: [
        label_values(rows, task, split),
        *(text.text_column(rows, column, split) for column in task.texts),
    ],
    encode=lambda rows, task, tokenizer, length: (
        text.encode_texts(rows, task, tokenizer, length),
        metrics.task_metric(task),
    ),
    criterion=metrics.task_criterion,
    describe=describe_text_task,
)
IMAGES = replace(
    CLASSES,
    task=images.ImageTask,
    find=images.find_images,
    head=AutoModelForImageClassification,
    check=label_values,
    fits=lambda reader, length, task: None,
    encode=images.encode_images,
    length=0,
    describe=lambda task: f"{describe_text_task(task)} (images)",
    images=True,
)
ZERO_SHOT = replace(
    IMAGES,
    task=zero_shot.ZeroShot,
    find=lambda train, name, columns, label: None,  # `as_zero_shot_task` makes it of a task of images
    load=zero_shot.load_zero_shot,
    predict=zero_shot.predict_zero_shot,
    describe=zero_shot.in_words,
    ready=zero_shot.describe_head,
    save_extras=zero_shot.save_zero_shot_head,
)
# In the order in which they are looked for; texts are the last, since they refuse what they cannot read.
TASKS = {"question-answering": SPANS, "zero-shot": ZERO_SHOT, "images": IMAGES, "texts": CLASSES}


def task_type_of(task: AnyTask) -> TaskType:
    """Return the type of a task."""
    return next(kind for kind in TASKS.values() if kind.task is type(task))


def describe_task(task: AnyTask) -> str:
    """Describe the inputs and outputs of a task."""
    return task_type_of(task).describe(task)


def infer_task(
    train: Dataset, name: str, texts: Sequence[str] | None, label: str | None, stride: int | None = None
) -> AnyTask:
    """Infer the task of a dataset from its name and columns; columns that are named override the inference."""
    tasks = (kind.find(train, name, texts, label) for kind in TASKS.values())
    task: AnyTask = next(found for found in tasks if found is not None)
    if stride is None:
        return task
    if not isinstance(task, spans.QuestionAnswering):
        raise UserError(
            f"{name} is not a question answering dataset, for which it is meant, got {stride}; leave it out",
            "doc_stride",
        )
    return replace(task, stride=stride)


TASKS = load_plugins("sparsesoup.tasks", TaskType, TASKS) | TASKS  # at the end, since plugins import this module
