"""Build a Problem from checkpoint and dataset, and score the test split in the only function that opens it."""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsesoup.core.errors import UserError
from sparsesoup.core.settings import TypedSettings
from sparsesoup.hub.models import tokenizer as tokens
from sparsesoup.hub.models.checkpoint import config_of, load_reader, model_files_digest, resolve_model_path
from sparsesoup.hub.models.loading import load_model, meta_model, use_faster_attention_
from sparsesoup.hub.models.padding_probe import probe_padding
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.hub.models.weights import LoadingNotes, check_vocabulary, randomly_drawn_head
from sparsesoup.hub.tasks.images import ImageTask
from sparsesoup.hub.tasks.metrics import MetricFunction
from sparsesoup.hub.tasks.registry import AnyTask, TaskType, describe_task, infer_task, task_type_of
from sparsesoup.hub.tasks.splits import LoadedDataset, open_splits, open_test, training_splits
from sparsesoup.hub.tasks.zero_shot import as_zero_shot_task
from sparsesoup.training.batching import RowBatches
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.cost import Cost, CostTracker
from sparsesoup.training.observer import Observer
from sparsesoup.training.problem import Problem, evaluate_model

EPOCHS = 3.0  # the default


@dataclass(frozen=True, kw_only=True)
class ModelAndDataConfig(TypedSettings):
    """Model and data of a run.

    Args:
        model: model for texts or images: Hub id, folder, run directory, or minilm (embedded).
        dataset: Hub name, path (images too: parquet, or one folder per class), name below the data root, or docstrings
            (embedded).
        data_root: folder of named datasets; default the environment variable SPARSESOUP_DATA.
        dataset_config: configuration of a Hub dataset.
        text_columns: the one or two text columns, as A or as A,B or A B (question, context for question answering); the
            image column may also be set by --image-column; default: inferred.
        label_column: column to predict; default: inferred.
        drop_unlabelled: drop rows without a label (empty, NaN, or -1 among classes), which are otherwise refused.
        max_length: maximum tokens per row; longer texts are truncated, contexts of questions split into windows;
            default 128, for question answering 384, or the model's maximum.
        doc_stride: overlap in tokens of consecutive windows of a long context; default a third of max_length.
        prompts: prompts for the classes of images, for CLIP: a sentence with {} for the class name, or a file with one
            per line; default: common ones for the dataset.
        class_names: class names in prompts: name,name,... or a file with one per line; default: the dataset's own
            names.
        trust_remote_code: run code from the model's repository.
        seed: seed of all random choices.
    """

    model: str = "minilm"
    dataset: str = "docstrings"
    data_root: str | None = None
    dataset_config: str | None = None
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    drop_unlabelled: bool = False
    max_length: int | None = None
    doc_stride: int | None = None
    prompts: str | None = None
    class_names: str | None = None
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"must be at least 2 tokens, got {self.max_length}", "max_length")


@dataclass(frozen=True)
class OpenedTask:
    """A dataset with its task, and the name of the model."""

    source: LoadedDataset
    task: AnyTask
    model: str = ""

    @property
    def model_files(self) -> str:
        """Digest of the files of the model's folder; "" for a Hub id."""
        return model_files_digest(self.model) if self.model else ""


def open_task(model_data: ModelAndDataConfig, source: LoadedDataset | None = None) -> OpenedTask:
    """Find the dataset, unless its rows are in memory, its columns, and its task for the model."""
    source = source or open_splits(model_data.dataset, data_root=model_data.data_root, config=model_data.dataset_config)
    if source.drop_unlabelled != model_data.drop_unlabelled:
        source = replace(source, drop_unlabelled=model_data.drop_unlabelled)
    task = infer_task(
        source.train_split, source.name, model_data.text_columns, model_data.label_column, model_data.doc_stride
    )
    if isinstance(task, ImageTask):
        kind = str(config_of(model_data.model, model_data.trust_remote_code).model_type)
        words = (model_data.prompts, model_data.class_names)
        task = as_zero_shot_task(
            task, kind, Path(resolve_model_path(model_data.model)), source.train_split, source.name, *words
        )
    if task_type_of(task).ready is None and (model_data.prompts is not None or model_data.class_names is not None):
        raise UserError(
            f"prompts and class_names are read by a CLIP that sees images, which model {model_data.model} on "
            f"{source.name} is not; leave them out",
            "prompts" if model_data.prompts is not None else "class_names",
        )
    return OpenedTask(source, task, model_data.model)


@dataclass(frozen=True, kw_only=True)
class LoadedModelAndData:
    """Model and rows as every run begins with them; nothing in it is ever modified.

    Args:
        model: the pre-trained model.
        train, validation: rows for training and for selection.
        metric: metric of the validation rows.
        account: what was found while the weights were loaded.
    """

    model: Any
    train: RowBatches
    validation: RowBatches
    metric: MetricFunction
    account: LoadingNotes


def load_model_and_data(
    model_data: ModelAndDataConfig,
    opened: OpenedTask,
    precision: str = "no",
    whole: bool = False,
    base: LoadedModelAndData | None = None,
) -> LoadedModelAndData:
    """Load a model and encode the rows of its dataset; a `whole` model must have its head.

    Args:
        base: what the run began with whose model is loaded; its rows, which were checked with it, are taken as they
            are.
    """
    kind = task_type_of(opened.task)
    check_head(model_data, opened)
    account = LoadingNotes()
    reader = load_reader(model_data.model, kind.images, model_data.trust_remote_code)
    fixed = {} if kind.images else fit_config_to_rows(model_data, opened.task, reader, account)
    model = load_model(
        model_data.model, opened.task, model_data.seed, model_data.trust_remote_code, whole, account, fixed
    )
    if not kind.images:
        check_vocabulary(model_data.model, model, reader)
    if kind.images:
        use_faster_attention_(model, precision)
    if base is not None:
        return replace(base, model=model, account=account)
    train, validation = training_splits(opened.source, opened.task, model_data.seed)
    length = _row_length(model_data, kind, model, reader)
    rows, _ = kind.encode(train, opened.task, reader, length)
    if not kind.images:
        _check_tokens(rows, train[opened.task.texts[0]][0], reader)
    held_out, judge = kind.encode(validation, opened.task, reader, length)
    probe_padding(model_data.model, kind, model, rows)
    return LoadedModelAndData(model=model, train=rows, validation=held_out, metric=judge, account=account)


def build_problem(
    model_data: ModelAndDataConfig,
    opened: OpenedTask,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    training: TrainingConfig | None = None,
    meter: CostTracker | None = None,
    checkpointer: Checkpointer | None = None,
    observer: Observer | None = None,
    loaded: LoadedModelAndData | None = None,
) -> Problem:
    """Build the problem of pruning a model for a task, T in `steps` or `epochs`, from what is loaded already or now."""
    training, meter, kind = training or TrainingConfig(), meter or CostTracker(), task_type_of(opened.task)
    loaded = loaded or load_model_and_data(model_data, opened, training.mixed_precision)
    per_epoch = max(1, len(loaded.train) // training.rows_per_step)
    return Problem(
        pretrained=loaded.model,
        targets=find_prunable(loaded.model),
        train=loaded.train,
        validation=loaded.validation,
        predict=kind.predict,
        criterion=kind.criterion(opened.task),
        metric=loaded.metric,
        steps=steps if steps is not None else max(1, round((epochs or EPOCHS) * per_epoch)),
        training=training,
        seed=model_data.seed,
        meter=meter,
        checkpointer=checkpointer or Checkpointer(meter),
        observer=observer or Observer(),
        notes=tuple(loaded.account.notes),
        head=() if kind.load else tuple(randomly_drawn_head(loaded.model)),  # a frozen zero-shot head is not trained
        fresh=loaded.account.new,
    )


def fit_config_to_rows(
    model_data: ModelAndDataConfig, task: AnyTask, tokenizer: Any, account: LoadingNotes | None = None
) -> dict[str, Any]:
    """Return changes of a model's config for padded batches of its rows; `account` collects notes on them."""
    config = config_of(model_data.model, model_data.trust_remote_code)
    fixed, own = tokens.config_settings(config, tokenizer), tokens.padding_of(config)
    if fixed["pad_token_id"] != own:
        meta = meta_model(model_data.model, task, model_data.trust_remote_code)
        check_vocabulary(model_data.model, meta, tokenizer)
        tokens.check_padding(model_data.model, meta, tokenizer, own)
    if account is not None:
        account.notes += tokens.config_notes(config, fixed, model_data.model)
    return fixed


def check_head(model_data: ModelAndDataConfig, opened: OpenedTask) -> None:
    """Raise a UserError if the model reads texts and the dataset holds images, or vice versa."""
    kind = task_type_of(opened.task)
    known = model_data.trust_remote_code or kind.load is not None
    if not known and type(config_of(model_data.model)) not in kind.head._model_mapping:
        vision = "a vision model, such as google/vit-base-patch16-224"
        raise UserError(
            f"model {model_data.model} has no head for dataset {opened.source.name}, {describe_task(opened.task)}: "
            f"give {vision if kind.images else 'another model'}, or name other columns"
        )


def check_length(model_data: ModelAndDataConfig, opened: OpenedTask, reader: Any) -> None:
    """Raise a UserError if model or tokenizer do not support max_length or windows; no weights are loaded."""
    kind = task_type_of(opened.task)
    if model_data.max_length is not None or kind.windows:
        model = None if kind.images else meta_model(model_data.model, opened.task, model_data.trust_remote_code)
        kind.fits(reader, _row_length(model_data, kind, model, reader), opened.task)


def _check_tokens(data: RowBatches, text: str, tokenizer: Any) -> None:
    """Raise a UserError if a tokenizer maps every text to special tokens, such as that for unknown words."""
    special = torch.tensor([*tokenizer.all_special_ids])
    if all(torch.isin(data.batch([i])["input_ids"], special).all() for i in range(len(data))):
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} makes nothing but special tokens of every text, such as "
            f"{text[:40]!r}; use the tokenizer that belongs to the model"
        )


def _row_length(model_data: ModelAndDataConfig, kind: TaskType, model: Any, tokenizer: Any) -> int:
    """Return the maximum tokens per row: as set, else the default, capped by the model's maximum."""
    if kind.images:
        if model_data.max_length is not None:
            raise UserError(
                f"{model_data.max_length} tokens are given, and images have none; leave it out", "max_length"
            )
        return 0
    most = max_positions(model)
    if model_data.max_length is None:
        return int(min(kind.length, most, tokenizer.model_max_length))
    if model_data.max_length > most:
        raise UserError(
            f"{model_data.max_length} is above the {most} positions of model {model_data.model}; set "
            f"{min(most, tokenizer.model_max_length)} or less",
            "max_length",
        )
    return model_data.max_length


def max_positions(model: Any) -> float:
    """Return the maximum number of positions of a model, infinite if its config.json sets no limit."""
    most = getattr(model.config, "max_position_embeddings", None) or math.inf
    if most < 0:  # XLNet's value for no limit
        return math.inf
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    for table in tables:  # with a padding row in the table (RoBERTa and others), positions start after it
        if getattr(table, "padding_idx", None) is not None:
            most = min(most, len(table.weight) - table.padding_idx - 1)
    return float(most) if math.isinf(most) else int(most)


def score_test(problem: Problem, model_data: ModelAndDataConfig, opened: OpenedTask) -> dict[str, Any]:
    """Return the scores of the problem's model on the test split: its only access; a method cannot call it."""
    parts, kind = open_test(opened.source, opened.task), task_type_of(opened.task)
    reader = load_reader(model_data.model, kind.images, model_data.trust_remote_code)
    length = _row_length(model_data, kind, problem.pretrained, reader)
    prepared = problem.accelerator.prepare_model(copy.deepcopy(problem.pretrained), evaluation_mode=True)
    scores = {}
    for name, rows in parts.items():
        data, judge = kind.encode(rows, opened.task, reader, length)
        scores[name] = evaluate_model(replace(problem, metric=judge), prepared, data, Cost(), label=name)
    return next(iter(scores.values())) if len(scores) == 1 else scores
