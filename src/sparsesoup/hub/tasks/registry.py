"""Task types: how each is detected, its head, loss and metric."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from sparsesoup.core.errors import UserError
from sparsesoup.hub.tasks import columns as tasks
from sparsesoup.hub.tasks import images, text, zero_shot
from sparsesoup.hub.tasks import metrics as judging
from sparsesoup.hub.tasks import question_answering as spans
from sparsesoup.hub.tasks.columns import TextTask
from sparsesoup.hub.tasks.images import ImageTask
from sparsesoup.hub.tasks.metrics import Judged
from sparsesoup.hub.tasks.question_answering import QuestionAnswering
from sparsesoup.hub.tasks.zero_shot import ZeroShot
from sparsesoup.training.batching import Batch, RowBatches

AnyTask = TextTask | QuestionAnswering


@dataclass(frozen=True, kw_only=True)
class TaskType:
    """Everything that differs between task types. To add one, define its task dataclass and register a TaskType here.

    Args:
        head: transformers class that loads a model with this head.
        settings: task -> settings of the head in the model's config.json.
        check: (rows, task, split) raises a UserError for an invalid text or label.
        labelled: (rows, task) -> True if any row has a label.
        fits: (tokenizer, max_length, task) raises a UserError if rows of that length are impossible.
        encode: (rows, task, tokenizer or image processor, max_length) -> training data, and the metric.
        predict: (model, batch) -> outputs [rows, ...].
        criterion: task -> (outputs, batch) -> mean loss.
        length: default maximum tokens per row.
        told: task -> description of inputs and outputs.
        images: True if rows hold images, for an image processor; else texts, for a tokenizer.
        load: (options of from_pretrained, task) -> the model; None if `head` loads it.
        ready: task -> origin of a head that needs no training; None if it is randomly initialised.
        beside: (folder pruning/, model, task) writes further files of a saved model.
    """

    head: Any
    settings: Callable[[Any], dict[str, Any]]
    check: Callable[[Dataset, Any, str], object]
    labelled: Callable[[Dataset, Any], bool]
    fits: Callable[[Any, int, Any], object]
    encode: Callable[[Dataset, Any, Any, int], tuple[RowBatches, Judged]]
    predict: Callable[[nn.Module, Batch], Tensor]
    criterion: Callable[[Any], Callable[[Tensor, Batch], Tensor]]
    length: int
    told: Callable[[Any], str]
    images: bool = False
    load: Callable[[Mapping[str, Any], Any], Any] | None = None
    ready: Callable[[Any], str] | None = None
    beside: Callable[[Path, nn.Module, Any], None] | None = None


CLASSES = TaskType(
    head=AutoModelForSequenceClassification,
    settings=lambda task: {
        **_class_names_of(task.labels or ("score",)),
        "problem_type": "single_label_classification" if task.labels else "regression",
    },
    check=text.check_text_rows,
    labelled=tasks.has_labels,
    fits=lambda tokenizer, length, task: text.check_tokenizer(tokenizer, length),
    encode=lambda rows, task, tokenizer, length: (
        text.encode_texts(rows, task, tokenizer, length),
        judging.task_metric(task),
    ),
    predict=judging.predict_logits,
    criterion=judging.task_criterion,
    length=128,
    told=tasks.describe_text_task,
)
IMAGES = replace(
    CLASSES,
    head=AutoModelForImageClassification,
    check=tasks.label_values,
    fits=lambda reader, length, task: None,
    encode=images.encode_images,
    length=0,
    told=lambda task: f"{tasks.describe_text_task(task)} (images)",
    images=True,
)
ZERO_SHOT = replace(
    IMAGES,
    load=zero_shot.load_zero_shot,
    predict=zero_shot.predict_zero_shot,
    told=zero_shot.in_words,
    ready=zero_shot.describe_head,
    beside=zero_shot.save_zero_shot_head,
)
SPANS = TaskType(
    head=AutoModelForQuestionAnswering,
    settings=lambda task: _class_names_of(("start", "end")),
    check=spans.answers_of,
    labelled=spans.has_answers,
    fits=spans.WindowBuilder,
    encode=spans.encode_questions,
    predict=spans.predict_spans,
    criterion=lambda task: spans.span_loss,
    length=384,
    told=lambda task: f"spans of column {task.texts[1]} that answer column {task.texts[0]}",
)


def task_type_of(task: AnyTask) -> TaskType:
    """Return the type of a task."""
    if isinstance(task, QuestionAnswering):
        return SPANS
    if isinstance(task, ZeroShot):
        return ZERO_SHOT
    return IMAGES if isinstance(task, ImageTask) else CLASSES


def describe_task(task: AnyTask) -> str:
    """Describe the inputs and outputs of a task."""
    return task_type_of(task).told(task)


def infer_task(
    train: Dataset, name: str, texts: Sequence[str] | None, label: str | None, stride: int | None = None
) -> AnyTask:
    """Infer the task of a dataset from its name and columns.

    Args:
        train, name: the training split, and the dataset's name as in `LoadedDataset.name`.
        texts, label: columns, to override the inference.
        stride: overlap in tokens of windows of a long context.
    Raises: UserError if the columns are ambiguous or unsuitable, or a stride is set without windows.
    """
    found = spans.find_spans(train, name, texts, label, stride)
    if found is None and stride is not None:
        raise UserError(
            f"doc_stride is {stride}, and {name} asks no questions about contexts, which it is for; leave it out"
        )
    return found or images.find_images(train, name, texts, label) or tasks.find_task(train, name, texts, label)


def _class_names_of(outputs: Sequence[str]) -> dict[str, Any]:
    table = dict(enumerate(outputs))
    return {"num_labels": len(outputs), "id2label": table, "label2id": {name: i for i, name in table.items()}}
