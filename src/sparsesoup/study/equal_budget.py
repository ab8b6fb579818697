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
    for cell in plan.trials:
        groups.setdefault((cell.column_of, cell.row), []).append(cell)
    cells = []
    with add_location(plan.place):
        for group in groups.values():
            steps = _common_steps(plan, group, budget, estimator)
            cells += [_with_steps(cell, steps) for cell in group]
    return replace(plan, trials=cells)


def _common_steps(plan: StudyPlan, group: Sequence[Trial], budget: FlopsBudget, estimator: CostEstimator) -> int:
    """Return the largest T at which no seed of a row exceeds its allowance."""
    steps = 0
    try:
        allowed = [_allowed_flops(plan, cell, budget, estimator) for cell in group]
        for cell, most in zip(group, allowed, strict=True):
            found = _longest_steps(cell, most, estimator, steps)
            steps = min(steps or found, found)
    except UserError as error:
        raise RecipeError(f"{group[0].describe_trial}: {error}", "methods", group[0].row) from error
    return steps


def _allowed_flops(plan: StudyPlan, cell: Trial, budget: FlopsBudget, estimator: CostEstimator) -> float:
    """Return the FLOPs that a trial may use."""
    if budget.flops is not None:
        return budget.flops
    try:
        costs = [
            estimator.estimate_uncached(settings).total_cost.flops for settings in _reference_trials(plan, cell, budget)
        ]
    except UserError as error:
        raise RecipeError(f"what the budget is beside {cell.describe_trial}: {error}", "budget") from error
    if min(costs) < NEAR * max(costs):
        raise RecipeError(
            f"budget: row {budget.row} costs {format_count(min(costs))} to {format_count(max(costs))} by sparsity, and "
            f"{cell.row} stands beside all of them; name another row, one sparsity, or leave {cell.row} out",
            "budget", "row",
        )  # fmt: skip
    return budget.times * costs[0]


def _reference_trials(plan: StudyPlan, cell: Trial, budget: FlopsBudget) -> list[RunConfig]:
    """Return the runs whose cost a trial may match; several if it counts at several sparsities."""
    model, dataset, sparsity = cell.column_of
    beside = [other for other in plan.trials if other.column_of[:2] == (model, dataset) and other.seed == cell.seed]
    named = [other for other in beside if other.row == budget.row or (not budget.row and other.settings.name == DENSE)]
    named = [other for other in named if sparsity is None or other.sparsity in (None, sparsity)]
    if budget.row and not named:
        raise RecipeError(
            f"budget: no row {budget.row} beside {cell.describe_trial}; name one that is there for it", "budget", "row"
        )
    if not named:
        return [dense_config(beside[0].settings)]
    if not budget.row:  # the first of dense rows with several settings
        named = named[:1]
    return [other.settings for other in named]


def _longest_steps(cell: Trial, allowed: float, estimator: CostEstimator, guess: int) -> int:
    """Return the largest T at which a trial costs at most `allowed`."""

    def cost(steps: int) -> float | None:
        """Return the FLOPs; None if the method refuses such a short T."""
        try:
            found = estimator.estimate_uncached(_with_steps(cell, steps).settings).total_cost.flops
        except UserError:
            return None
        return found

    low, high, steps = 0, None, guess or estimator.real_problem(cell.settings).steps
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
    raise _too_little(cell, allowed, cost)


def _too_little(cell: Trial, allowed: float, cost: Callable[[int], float | None]) -> RecipeError:
    least = min_feasible_steps(lambda steps: cost(steps) is not None, 0)
    needs = cost(least) if least else None
    if needs is None:
        return RecipeError(
            f"no budget is enough for {cell.describe_trial}; choose less extreme settings", "methods", cell.row
        )
    return RecipeError(
        f"the budget is too small for {cell.describe_trial}: it needs at least {least} steps, "
        f"{format_count(needs)}, and gets "
        f"{format_count(allowed)}; make the budget {math.ceil(100 * needs / allowed) / 100:g} times as large",
        "budget",
    )


def _with_steps(cell: Trial, steps: int) -> Trial:
    """Return the trial with that T."""
    settings = replace(cell.settings, amount=replace(cell.settings.amount, steps=steps, epochs=None))
    return replace(cell, settings=settings, path=run_folder(str(cell.path.parent.parent), settings))
