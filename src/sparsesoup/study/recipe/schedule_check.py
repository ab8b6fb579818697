"""Check that methods fit the T of their runs, by a simulation that stops at the first training."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.hub.build import ModelAndDataConfig, OpenedTask, open_task
from sparsesoup.hub.models.loading import load_model
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.hub.tasks.question_answering import QuestionAnswering
from sparsesoup.hub.tasks.splits import training_splits
from sparsesoup.runs.config import RunConfig
from sparsesoup.runs.teacher import dry_run_checks
from sparsesoup.study.cost.estimate import cheap_equivalent, needs_structure, steps_of
from sparsesoup.study.cost.simulator import SimulatedProblem, StateWatcher, empty_rows, make_simulated_problem
from sparsesoup.study.recipe.trial import Trial
from sparsesoup.study.recipe.yaml_lines import RecipeError, at_location
from sparsesoup.training.batching import RowBatches
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.train_cache import TrainingCache

LONG = 100_000  # steps; enough for every method


class TrainingReached(Exception):
    """Raised at the first training: the method has accepted its settings."""


class StopAtTraining(StateWatcher):
    """Stop a run at its first training."""

    def begin(self, label: str, step: int, until: int) -> None:
        """Raise `TrainingReached`."""
        raise TrainingReached


def check_schedules_fit(cells: Iterable[Trial]) -> None:
    """Refuse a row whose method does not fit the T of one of its trials, and an unusable dataset.

    Raises: RecipeError, with the place in the recipe.
    """
    rows: dict[ModelAndDataConfig, tuple[int, bool]] = {}
    models: dict[ModelAndDataConfig, Any] = {}
    for cell in {(c.row, c.column_of): c for c in cells}.values():  # seeds make no difference
        place = replace(cell.settings.place, model="", seed=0)
        if place not in rows:
            with at_location("datasets", place.dataset):
                rows[place] = _count_rows(open_task(cell.settings.place))
        try:
            count, counted = rows[place]
            if counted or cell.settings.amount.steps is not None:
                _check_fit(cell.settings, count)
            if needs_structure(cell.settings.method):
                _fall_apart(cell.settings, models)
        except UserError as error:
            raise RecipeError(f"{cell.describe_trial}: {error}", "methods", cell.row) from error


def _count_rows(opened: OpenedTask) -> tuple[int, bool]:
    """Return (rows that a run trains on, True if that is the exact length of an epoch, which windows only increase)."""
    train, _ = training_splits(opened.source, opened.task, 0)
    # There are at least as many windows as texts, and a T accepted for short epochs is accepted for longer ones.
    return len(train), not isinstance(opened.task, QuestionAnswering)


def _check_fit(settings: RunConfig, rows: int) -> None:
    """Start the method on empty rows."""
    twin = _simulated_problem(settings, rows)
    twin = replace(twin, steps=steps_of(settings, twin))
    try:
        cheap_equivalent(settings.method).run(twin, float(settings.amount.sparsity or 0.0))
    except TrainingReached:
        return


def _simulated_problem(settings: RunConfig, rows: int) -> SimulatedProblem:
    data = empty_rows(RowBatches(range(rows), lambda rows: {}))
    return make_simulated_problem(
        data,
        data,
        settings.train,
        1,
        settings.place.seed,
        meter=CostTracker(),
        watch=StopAtTraining(),
        cache=TrainingCache(),
    )


def _fall_apart(settings: RunConfig, models: dict[ModelAndDataConfig, Any]) -> None:
    """Start the method on the matrices of the real model, whose structures the simulation lacks."""
    where = replace(settings.place, seed=0)
    if where not in models:
        models.clear()  # keep one model in memory
        models[where] = load_model(where.model, open_task(where).task, where.seed, where.trust_remote_code)
    twin = _simulated_problem(settings, 1)
    real = replace(twin, pretrained=models[where], targets=find_prunable(models[where]), steps=LONG)
    dry_run_checks(real, settings)
