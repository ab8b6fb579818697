"""Check that methods fit the T of their runs, from their plans."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NoReturn

from torch import nn

from sparsesoup.core.errors import UserError
from sparsesoup.hub.build import ModelAndDataConfig, OpenedTask, open_task
from sparsesoup.hub.models.loading import load_model
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.hub.tasks.registry import task_type_of
from sparsesoup.hub.tasks.splits import training_splits
from sparsesoup.runs.config import RunConfig
from sparsesoup.study.cost.estimate import needs_structure, steps_of
from sparsesoup.study.recipe.trial import Trial
from sparsesoup.study.recipe.yaml_lines import RecipeError, at_location
from sparsesoup.training.batching import RowBatches
from sparsesoup.training.driver import dry_run
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize

LONG = 100_000  # steps; enough for every method


def check_schedules_fit(cells: Iterable[Trial]) -> None:
    """Refuse a row whose method does not fit the T of one of its trials, and an unusable dataset.

    Raises: RecipeError, with the place in the recipe.
    """
    rows: dict[ModelAndDataConfig, tuple[int, bool]] = {}
    models: dict[ModelAndDataConfig, nn.Module] = {}
    for cell in {(c.row, c.column_of): c for c in cells}.values():  # seeds make no difference
        place = replace(cell.settings.place, model="", seed=0)
        if place not in rows:
            with at_location("datasets", place.dataset):
                rows[place] = _count_rows(open_task(cell.settings.place))
        try:
            count, counted = rows[place]
            if counted or cell.settings.amount.steps is not None:
                _check_plan(cell.settings, count)
            if needs_structure(cell.settings.method):
                _check_structure(cell.settings, models)
        except UserError as error:
            raise RecipeError(f"{cell.describe_trial}: {error}", "methods", cell.row) from error


def _count_rows(opened: OpenedTask) -> tuple[int, bool]:
    """Return (rows that a run trains on, True if that is the exact length of an epoch, which windows only increase)."""
    train, _ = training_splits(opened.source, opened.task, 0)
    # There are at least as many windows as texts, and a T accepted for short epochs is accepted for longer ones.
    return len(train), not task_type_of(opened.task).windows


def _check_plan(settings: RunConfig, rows: int) -> None:
    """Read the plan of a run, and check its groups as far as that takes no model."""
    sparsity, each = float(settings.amount.sparsity or 0.0), max(1, rows // settings.train.rows_per_step)
    settings.method.plan(RunSize(steps_of(settings, each), each, settings.train, settings.place.seed), sparsity)
    if not needs_structure(settings.method):
        settings.method.groups_of({}, sparsity)


def _check_structure(settings: RunConfig, models: dict[ModelAndDataConfig, nn.Module]) -> None:
    """Check the groups of a run on the matrices of its model."""
    where = replace(settings.place, seed=0)
    if where not in models:
        models.clear()  # keep one model in memory
        models[where] = load_model(where.model, open_task(where).task, where.seed, where.trust_remote_code)
    model, rows = models[where], RowBatches([0], lambda rows: {})
    problem = Problem(
        pretrained=model, targets=find_prunable(model), train=rows, validation=rows, steps=LONG,
        predict=_no_pass, criterion=_no_pass, metric=_no_pass, training=settings.train,
    )  # fmt: skip
    dry_run(settings.method, problem, float(settings.amount.sparsity or 0.0))


def _no_pass(*given: Any) -> NoReturn:
    raise AssertionError("a dry run makes no pass through the model")
