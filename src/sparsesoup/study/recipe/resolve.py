"""Resolve what a recipe names (models, datasets, teachers, tickets), and check that methods fit their T."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from sparsesoup.core.errors import UserError
from sparsesoup.hub.build import ModelAndDataConfig, OpenedTask, check_head, check_length, open_task
from sparsesoup.hub.models.checkpoint import config_of, load_reader
from sparsesoup.hub.models.loading import load_model
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.hub.tasks.registry import task_type_of
from sparsesoup.hub.tasks.splits import training_splits
from sparsesoup.methods.from_ticket import FromTicket, require_sparser
from sparsesoup.runs.config import RunConfig
from sparsesoup.runs.run import run_folder
from sparsesoup.runs.teacher import DENSE, check_distilled_parts, find_teacher
from sparsesoup.study.cost.estimate import needs_structure, steps_of
from sparsesoup.study.recipe.trial import Trial
from sparsesoup.study.recipe.yaml_lines import Levels, RecipeError, Table, at_location, locate_keys
from sparsesoup.training.batching import RowBatches
from sparsesoup.training.driver import dry_run
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize

LONG = 100_000  # steps; enough for every method


def resolve_all(recipe: Table, trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials with the paths of their runs."""
    tasks: dict[ModelAndDataConfig, OpenedTask] = {}
    taken: dict[Path, Trial] = {}
    placed = []
    for trial in trials:
        model_data = trial.settings.model_data
        if (where := _data_of(trial)) not in tasks:
            tasks[where] = _resolve_trial(recipe, trial)
        name = tasks[where].source.name
        placed.append(replace(trial, path=run_folder(name, trial.portable_settings)))
        other = taken.setdefault(placed[-1].path, trial)
        if other.settings != trial.settings:
            message = (
                f"datasets {other.column_of[1]} and {model_data.dataset} are both called {name}, so their runs would "
                f"be in the same folder; rename one of them"
            )
            raise RecipeError(message, "datasets", model_data.dataset)
    _need_teachers(recipe, trials, tasks)
    _need_tickets(trials, tasks)
    return placed


def _data_of(trial: Trial) -> ModelAndDataConfig:
    return replace(trial.settings.model_data, seed=0)


def _resolve_trial(recipe: Table, trial: Trial) -> OpenedTask:
    """Return the dataset and its task, after checking that dataset and model exist and fit each other."""
    model_data = trial.settings.model_data
    with at_location("models"):
        config_of(model_data.model, model_data.trust_remote_code)
    levels = _recipe_levels(recipe, trial)
    try:
        opened = open_task(model_data)
        check_head(model_data, opened)
    except UserError as error:
        raise RecipeError(
            error, *(locate_keys(levels, error.field.split(".")) or ["datasets", model_data.dataset])
        ) from error
    with at_location("models"):
        reader = load_reader(model_data.model, task_type_of(opened.task).images, model_data.trust_remote_code)
    try:
        check_length(model_data, opened, reader)
    except UserError as error:
        raise RecipeError(error, *(locate_keys(levels, error.field.split(".")) or ["models"])) from error
    return opened


def _need_teachers(recipe: Table, trials: Sequence[Trial], tasks: Mapping[ModelAndDataConfig, OpenedTask]) -> None:
    """Refuse a teacher that is missing, or whose model does not fit."""
    for (where, distill), trial in {(_data_of(c), c.settings.train.distill): c for c in reversed(trials)}.items():
        if distill.teacher not in ("", DENSE):
            named = ["train", "distill", "teacher"]
            with at_location(*(locate_keys(_recipe_levels(recipe, trial), named) or named)):
                teacher = find_teacher(where, tasks[where], distill.teacher)
                if distill.hidden or distill.attention:
                    check_distilled_parts(_load_model_config(where, tasks), teacher, distill)


def _need_tickets(trials: Sequence[Trial], tasks: Mapping[ModelAndDataConfig, OpenedTask]) -> None:
    """Refuse a ticket that is missing, too sparse or of another model, unless the study itself makes it."""
    given = [(c, c.settings.method) for c in trials if not c.needs]
    tickets = [(trial, method) for trial, method in given if isinstance(method, FromTicket)]
    for trial, method in {(c.row, c.sparsity): (c, m) for c, m in tickets}.values():
        with at_location("methods", trial.row, "method", "ticket"):
            require_sparser(method.load_given()[0], float(trial.sparsity or 0.0))
    for (row, where), method in {(c.row, _data_of(c)): m for c, m in tickets}.items():
        with at_location("methods", row, "method", "ticket"):
            method.masks_for_model(model := _load_model_config(where, tasks), find_prunable(model))


def _load_model_config(where: ModelAndDataConfig, tasks: Mapping[ModelAndDataConfig, OpenedTask]) -> Any:
    return load_model(where.model, tasks[where].task, where.seed, where.trust_remote_code)


def _recipe_levels(recipe: Table, trial: Trial) -> Levels:
    """Return the levels of the recipe with settings of a trial; a row with tickets has its source in its name."""
    rows, datasets = (table if isinstance(table := recipe.get(key), dict) else {} for key in ("methods", "datasets"))
    row, dataset = max((row for row in rows if trial.row.startswith(row)), key=len, default=""), trial.column_of[1]
    return [((), recipe), (("datasets", dataset), datasets.get(dataset)), (("methods", row), rows.get(row))]


def check_schedules_fit(trials: Iterable[Trial]) -> None:
    """Refuse a row whose method does not fit the T of one of its trials, and an unusable dataset."""
    rows: dict[ModelAndDataConfig, tuple[int, bool]] = {}
    models: dict[ModelAndDataConfig, nn.Module] = {}
    for trial in {(c.row, c.column_of): c for c in trials}.values():  # seeds make no difference
        model_data = replace(trial.settings.model_data, model="", seed=0)
        if model_data not in rows:
            with at_location("datasets", model_data.dataset):
                rows[model_data] = _count_rows(open_task(trial.settings.model_data))
        try:
            count, counted = rows[model_data]
            if counted or trial.settings.budget.steps is not None:
                _check_plan(trial.settings, count)
            if needs_structure(trial.settings.method):
                _check_structure(trial.settings, models)
        except UserError as error:
            raise RecipeError(f"{trial.describe_trial}: {error}", "methods", trial.row) from error


def _count_rows(opened: OpenedTask) -> tuple[int, bool]:
    """Return (rows that a run trains on, True if that is the exact length of an epoch, which windows only increase)."""
    train, _ = training_splits(opened.source, opened.task, 0)
    # There are at least as many windows as texts, and a T accepted for short epochs is accepted for longer ones.
    return len(train), not task_type_of(opened.task).windows


def _check_plan(settings: RunConfig, rows: int) -> None:
    """Read the plan of a run, and check its groups as far as that takes no model."""
    sparsity, each = float(settings.budget.sparsity or 0.0), max(1, rows // settings.train.rows_per_step)
    settings.method.plan(RunSize(steps_of(settings, each), each, settings.train, settings.model_data.seed), sparsity)
    if not needs_structure(settings.method):
        settings.method.groups_of({}, sparsity)


def _check_structure(settings: RunConfig, models: dict[ModelAndDataConfig, nn.Module]) -> None:
    """Check the groups of a run on the matrices of its model."""
    where = replace(settings.model_data, seed=0)
    if where not in models:
        models.clear()  # keep one model in memory
        models[where] = load_model(where.model, open_task(where).task, where.seed, where.trust_remote_code)
    model, rows = models[where], RowBatches([0], lambda rows: {})
    problem = Problem(
        pretrained=model, targets=find_prunable(model), train=rows, validation=rows, steps=LONG,
        predict=_no_pass, criterion=_no_pass, metric=_no_pass, training=settings.train,
    )  # fmt: skip
    dry_run(settings.method, problem, float(settings.budget.sparsity or 0.0))


def _no_pass(*given: Any) -> NoReturn:
    raise AssertionError("a dry run makes no pass through the model")
