"""Settings and problem of a run of objects, from the arguments of `prune_model`."""

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import find_labels

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.settings import fill_settings
from sparsesoup.hub.build import EPOCHS, ModelAndDataConfig, build_problem, open_task
from sparsesoup.hub.models.checkpoint import load_reader, load_tokenizer
from sparsesoup.hub.models.loading import load_as_saved
from sparsesoup.hub.tasks.registry import task_type_of
from sparsesoup.hub.tasks.splits import SELECTION, LoadedDataset
from sparsesoup.loops.attach import find_targets, named_method, require_unattached, unwrapped
from sparsesoup.loops.gradients import check_requires_grad
from sparsesoup.loops.losses import check_function, check_loss
from sparsesoup.loops.object_data import check_row_source, loss_functions, rows_of
from sparsesoup.loops.object_problem import ObjectProblem
from sparsesoup.loops.object_source import ObjectSource, check_dataset_name, object_name
from sparsesoup.loops.object_teacher import teacher_name
from sparsesoup.methods import row_of
from sparsesoup.report.escaping import SafeConsole
from sparsesoup.runs.config import BudgetConfig, RunConfig
from sparsesoup.runs.options import RuntimeOptions
from sparsesoup.runs.run import fill_default_sparsity
from sparsesoup.runs.trackers import TrackerConfig, check_installed
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.problem import Problem

OBJECTS = (
    "model", "train_dataset", "eval_dataset", "data_collator", "loss", "compute_metrics",
    "preprocess_logits_for_metrics", "teacher", "prunable",
)  # fmt: skip
FUNCTIONS = {
    "data_collator": ("rows",), "preprocess_logits_for_metrics": ("logits", "labels"),
    "prunable": ("name", "parameter"),
}  # fmt: skip
ENCODED = {"input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features"}
LABELS = ("label", "label_ids")  # which collators of transformers rename
Given = Mapping[str, Any]


def object_source(given: Given) -> ObjectSource:
    """Return the source of a run of objects.

    Args:
        given: the arguments of `prune_model`.
    Raises: UserError if one is missing or does not fit.
    """
    if isinstance(given["model"], nn.Module):
        given = {**given, "model": unwrapped(given["model"])}
    settings, model, reader = _settings_of(given), given["model"], given["processing_class"]
    for name in ("train_dataset", "eval_dataset"):
        if given[name] is not None:
            check_row_source(given[name], name)
    for name, parameters in FUNCTIONS.items():
        check_function(given[name], name, *parameters)
    metrics = given["compute_metrics"]  # with batch_eval_metrics it is told of the last batch
    require(metrics is None or callable(metrics), "compute_metrics", "a function", repr(metrics))
    check_loss(given["loss"])
    if raw := _is_raw(given):
        problem, reader = _raw_problem(settings, given)
    elif not isinstance(model, nn.Module):
        model, reader = load_as_saved(str(model)).float(), reader or _tokenizer_of(str(model))
    if not raw:
        _refuse_columns(given)
        problem = _make_problem(settings, model, reader, given)
    if given["out"] is None and given["save_every"] != RuntimeOptions.save_every:
        raise UserError("a run in memory saves nothing; give out=... too", "save_every")
    own = {name: given[name] for name in ("observer", "snapshots", "save_every")}
    outside = RuntimeOptions(SafeConsole(stderr=True, quiet=not given["progress"]), **own)
    return ObjectSource(
        settings=settings, problem=problem, outside=outside,
        out=None if given["out"] is None else Path(given["out"]), teacher=_teacher_of(given), processing_class=reader,
    )  # fmt: skip


def _is_raw(given: Given) -> bool:
    """Return True for a table of texts or images that is to be encoded for a model by name."""
    rows, own = given["train_dataset"], (given["loss"], given["data_collator"], given["compute_metrics"])
    table = isinstance(rows, Dataset) and not isinstance(given["model"], nn.Module)
    return table and all(part is None for part in own) and not ENCODED & {*rows.column_names}


def _refuse_columns(given: Given) -> None:
    if columns := given["columns"]:
        raise UserError("it is for tables of texts or images and a model by name, which encodes them", min(columns))


def _raw_problem(settings: RunConfig, given: Given) -> tuple[Problem, Any]:
    """Return the problem of a table in memory and a model by name, and its tokenizer or image processor."""
    splits = {"train": given["train_dataset"]}
    splits |= {} if given["eval_dataset"] is None else {SELECTION: given["eval_dataset"]}
    opened = open_task(settings.model_data, LoadedDataset(settings.model_data.dataset, splits, tested=False))
    budget, model_data = settings.budget, settings.model_data
    problem = build_problem(model_data, opened, steps=budget.steps, epochs=budget.epochs, training=settings.train)
    return problem, load_reader(model_data.model, task_type_of(opened.task).images, model_data.trust_remote_code)


def _teacher_of(given: Given) -> Any:
    named = given["train"].distill.teacher if given["train"] is not None else ""
    return given["teacher"] if given["teacher"] is not None else named or None


def _settings_of(given: Given) -> RunConfig:
    """Return the settings of a run of objects."""
    method, model, train = named_method(given["method"]), given["model"], given["train"] or TrainingConfig()
    require(isinstance(train, TrainingConfig), "train", "a TrainingConfig, or a table of its settings", repr(train))
    if model is None or given["train_dataset"] is None:
        raise UserError("give model=... and train_dataset=..., both as objects, or both by name")
    if not isinstance(model, nn.Module | str | Path):
        raise UserError(f"must be a module, or a name or folder, got {model!r}", "model")
    if (teacher := _teacher_of(given)) is not None:
        train = replace(train, distill=replace(train.distill, teacher=teacher_name(teacher)))
    name = object_name(model) if isinstance(model, nn.Module) else str(model)
    named = given["report_to"]
    tracking = TrackerConfig(report_to=tuple(named.split(",") if isinstance(named, str) else named))
    check_installed(tracking.report_to)
    train.check_device()
    settings = RunConfig(
        name=given["row"] or row_of(method), method=method, train=train,
        budget=BudgetConfig(sparsity=given["sparsity"], steps=given["steps"], epochs=given["epochs"]),
        model_data=fill_settings(
            ModelAndDataConfig(model=name, dataset=check_dataset_name(given["dataset"]), seed=given["seed"]),
            given["columns"] or {},
        ),
        tracking=tracking, objects=_names_of_objects(given),
    )  # fmt: skip
    return fill_default_sparsity(settings)


def _names_of_objects(given: Given) -> tuple[str, ...]:
    """Return the arguments that were objects; a Trainer stands for all that it brought."""
    names = tuple(key for key in OBJECTS if not isinstance(given[key], str | Path | None))
    if "trainer" not in given:
        return names
    own = {"model", *given["brought"]}
    return ("trainer", *(key for key in names if key not in own))


def _tokenizer_of(model: str) -> Any:
    """Return the tokenizer of a model by name; None if it has none."""
    with contextlib.suppress(UserError):
        return load_tokenizer(model)
    return None


def _make_problem(settings: RunConfig, model: nn.Module, reader: Any, given: Given) -> ObjectProblem:
    """Return the problem of objects."""
    require_unattached(model)
    training, budget = settings.train, settings.budget
    if given["loss"] is None and not isinstance(model, PreTrainedModel):
        raise UserError(f"{type(model).__name__} brings no loss; give loss=lambda model, batch: ...")
    if budget.steps != 0 and not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"all weights of {type(model).__name__} are frozen; call model.requires_grad_(True)", "model")
    labels = tuple(given["label_names"] or find_labels(type(model)) or ["labels"])
    taken = None if given["loss"] is not None else {*inspect.signature(model.forward).parameters, *labels, *LABELS}
    collate = (given["data_collator"], budget.steps, training, reader, taken)
    rows = rows_of(given["train_dataset"], *collate)
    evaluation = rows if given["eval_dataset"] is None else rows_of(given["eval_dataset"], *collate)
    total = budget.steps
    if total is None:
        total = max(1, round((budget.epochs or EPOCHS) * max(1, len(rows) // training.rows_per_step)))
    targets = find_targets(model, given["prunable"])
    if budget.steps != 0:
        check_requires_grad(model, targets)
    own_loss, answer = loss_functions(given["loss"], rows)
    return ObjectProblem(
        pretrained=model, targets=targets, train=rows, validation=evaluation,
        steps=total, training=training, predict=lambda model, batch: own_loss(model, batch)[None], own_loss=own_loss,
        answer=answer, criterion=lambda outputs, batch: outputs.mean(), metric=lambda outputs, labels: {},
        head=tuple(given["head"]), seed=given["seed"], compute_metrics=given["compute_metrics"],
        preprocess_logits=given["preprocess_logits_for_metrics"], batch_eval_metrics=given["batch_eval_metrics"],
        label_names=labels,
    )  # fmt: skip
