"""Equal total cost: find the T of each row whose total FLOPs match those of a reference."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.core.schedules import MOST_STEPS, min_feasible_steps
from sparsesoup.report.format import format_count
from sparsesoup.runs.config import RunConfig
from sparsesoup.runs.run import run_folder
from sparsesoup.runs.teacher import DENSE, dense_config
from sparsesoup.study.cost.estimate import CostEstimator
from sparsesoup.study.recipe.budget import FlopsBudget, read_budget
from sparsesoup.study.recipe.plan import StudyPlan
from sparsesoup.study.recipe.trial import Trial
from sparsesoup.study.recipe.yaml_lines import RecipeError, add_location

NEAR, LONG = 0.998, 1024  # share of the budget at which a search for such a large T stops


def match_budget(plan: StudyPlan) -> StudyPlan:
    """Return the plan with T of each row set so that no run exceeds its budget, and almost none falls short.

    All seeds of a row have the same T. Nothing is timed, so every machine finds the same.
    """
    budget = read_budget(plan.recipe.get("budget"))
    if budget is None:
        return plan
    estimator, groups = CostEstimator(timed=False), dict[Any, list[Trial]]()
    for trial in plan.trials:
        groups.setdefault((trial.column_of, trial.row), []).append(trial)
    trials = []
    with add_location(plan.location):
        for group in groups.values():
            steps = _common_steps(plan, group, budget, estimator)
            trials += [_with_steps(trial, steps) for trial in group]
    return replace(plan, trials=trials)


def _common_steps(plan: StudyPlan, group: Sequence[Trial], budget: FlopsBudget, estimator: CostEstimator) -> int:
    """Return the largest T at which no seed of a row exceeds its allowance."""
    steps = 0
    try:
        allowed = [_allowed_flops(plan, trial, budget, estimator) for trial in group]
        for trial, most in zip(group, allowed, strict=True):
            found = _longest_steps(trial, most, estimator, steps)
            steps = min(steps or found, found)
    except UserError as error:
        raise RecipeError(f"{group[0].describe_trial}: {error}", "methods", group[0].row) from error
    return steps


def _allowed_flops(plan: StudyPlan, trial: Trial, budget: FlopsBudget, estimator: CostEstimator) -> float:
    """Return the FLOPs that a trial may use."""
    if budget.flops is not None:
        return budget.flops
    try:
        runs = _reference_trials(plan, trial, budget)
        costs = [estimator.estimate_uncached(settings).total_cost.flops for settings in runs]
    except UserError as error:
        raise RecipeError(f"the reference of the budget for {trial.describe_trial}: {error}", "budget") from error
    if min(costs) < NEAR * max(costs):
        raise RecipeError(
            f"budget: row {budget.row} costs {format_count(min(costs))} to {format_count(max(costs))} by sparsity, and "
            f"{trial.row} is compared with all of them; name another row, one sparsity, or leave {trial.row} out",
            "budget", "row",
        )  # fmt: skip
    return budget.times * costs[0]


def _reference_trials(plan: StudyPlan, trial: Trial, budget: FlopsBudget) -> list[RunConfig]:
    """Return the runs whose cost a trial may match; several if it counts at several sparsities."""
    model, dataset, sparsity = trial.column_of
    same_column = [
        other for other in plan.trials if other.column_of[:2] == (model, dataset) and other.seed == trial.seed
    ]
    named = [
        other for other in same_column if other.row == budget.row or (not budget.row and other.settings.name == DENSE)
    ]
    named = [other for other in named if sparsity is None or other.sparsity in (None, sparsity)]
    if budget.row and not named:
        raise RecipeError(
            f"budget: no row {budget.row} to compare {trial.describe_trial} with; name one of the same model, dataset "
            f"and seed",
            "budget",
            "row",
        )
    if not named:
        return [dense_config(same_column[0].settings)]
    if not budget.row:  # the first of dense rows with several settings
        named = named[:1]
    return [other.settings for other in named]


def _longest_steps(trial: Trial, allowed: float, estimator: CostEstimator, guess: int) -> int:
    """Return the largest T at which a trial costs at most `allowed`."""

    def cost(steps: int) -> float | None:
        """Return the FLOPs; None if the method refuses such a short T."""
        try:
            return estimator.estimate_uncached(_with_steps(trial, steps).settings).total_cost.flops
        except UserError:
            return None

    low, high, steps = 0, None, guess or estimator.real_problem(trial.settings).steps
    while high is None or high - low > 1:
        found = cost(steps)
        if found is not None and found > allowed:
            high = steps
        elif found is not None and found >= NEAR * allowed and steps > LONG:
            return steps
        elif found is None and steps > MOST_STEPS:
            break
        else:
            low = steps
        aim = round(steps * allowed / found) if found else 2 * steps
        steps = max(low + 1, min(aim, high - 1) if high is not None else aim)
    if low and cost(low) is not None:
        return low
    raise _too_little(trial, allowed, cost)


def _too_little(trial: Trial, allowed: float, cost: Callable[[int], float | None]) -> RecipeError:
    least = min_feasible_steps(lambda steps: cost(steps) is not None, 0)
    needs = cost(least) if least else None
    if needs is None:
        return RecipeError(
            f"no budget is enough for {trial.describe_trial}; choose less extreme settings", "methods", trial.row
        )
    return RecipeError(
        f"the budget is too small for {trial.describe_trial}: it needs at least {least} steps, {format_count(needs)}, "
        f"and gets {format_count(allowed)}; make the budget {math.ceil(100 * needs / allowed) / 100:g} times as large",
        "budget",
    )


def _with_steps(trial: Trial, steps: int) -> Trial:
    """Return the trial with that T."""
    settings = replace(trial.settings, budget=replace(trial.settings.budget, steps=steps, epochs=None))
    return replace(trial, settings=settings, path=run_folder(str(trial.path.parent.parent), settings))
