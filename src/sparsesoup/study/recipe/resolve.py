"""Resolve the models, datasets, teachers and tickets of a recipe before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.hub.build import ModelAndDataConfig, OpenedTask, check_head, check_length, open_task
from sparsesoup.hub.models.checkpoint import config_of, load_reader
from sparsesoup.hub.models.loading import load_model
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.hub.tasks.registry import task_type_of
from sparsesoup.methods.from_ticket import FromTicket, require_sparser
from sparsesoup.runs.run import run_folder
from sparsesoup.runs.teacher import DENSE, check_blocks, find_teacher
from sparsesoup.study.recipe.trial import Trial
from sparsesoup.study.recipe.yaml_lines import Levels, RecipeError, Table, at_location, place_of


def resolve_all(recipe: Table, trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials with the paths of their runs.

    Raises: RecipeError if a model, dataset, teacher or ticket is missing, or does not fit the others.
    """
    tasks: dict[ModelAndDataConfig, OpenedTask] = {}
    taken: dict[Path, Trial] = {}
    placed = []
    for trial in trials:
        place = trial.settings.place
        if (where := _data_of(trial)) not in tasks:
            tasks[where] = _resolve_trial(recipe, trial)
        name = tasks[where].source.name
        placed.append(replace(trial, path=run_folder(name, trial.portable_settings)))
        other = taken.setdefault(placed[-1].path, trial)
        if other.settings != trial.settings:
            raise RecipeError(f"datasets {other.column_of[1]} and {place.dataset} are both called {name}, so "
                f"their runs "
                         f"would be in the same folder; rename one of them", "datasets", place.dataset)  # fmt: skip
    _need_teachers(recipe, trials, tasks)
    _need_tickets(trials, tasks)
    return placed


def _data_of(trial: Trial) -> ModelAndDataConfig:
    return replace(trial.settings.place, seed=0)


def _resolve_trial(recipe: Table, trial: Trial) -> OpenedTask:
    """Return the dataset and its task, after checking that dataset and model exist and fit each other."""
    place = trial.settings.place
    with at_location("models"):
        config_of(place.model, place.trust_remote_code)
    levels = _recipe_levels(recipe, trial)
    try:
        opened = open_task(place)
        check_head(place, opened)
    except UserError as error:
        raise RecipeError(error, *(place_of(levels, error.field.split(".")) or ["datasets", place.dataset])) from error
    with at_location("models"):
        reader = load_reader(place.model, task_type_of(opened.task).images, place.trust_remote_code)
    try:
        check_length(place, opened, reader)
    except UserError as error:
        raise RecipeError(error, *(place_of(levels, error.field.split(".")) or ["models"])) from error
    return opened


def _need_teachers(recipe: Table, trials: Sequence[Trial], tasks: Mapping[ModelAndDataConfig, OpenedTask]) -> None:
    """Refuse a teacher that is missing, or whose model does not fit."""
    for (where, distill), trial in {(_data_of(c), c.settings.train.distill): c for c in reversed(trials)}.items():
        if distill.teacher not in ("", DENSE):
            named = ["train", "distill", "teacher"]
            with at_location(*(place_of(_recipe_levels(recipe, trial), named) or named)):
                teacher = find_teacher(where, tasks[where], distill.teacher)
                if distill.hidden:
                    check_blocks(_load_model_config(where, tasks), teacher)


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
