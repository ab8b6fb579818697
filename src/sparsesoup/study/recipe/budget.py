"""The budget of a study: the paper's settings, or equal FLOPs for every row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.settings import TypedSettings, fill_settings
from sparsesoup.study.recipe.yaml_lines import RecipeError, Table

FORMS = "paper, equal, {times: 3}, {row: imp} or {flops: 2e15}"


@dataclass(frozen=True)
class FlopsBudget(TypedSettings):
    """FLOPs per run, including search, teacher, scoring and selection."""

    times: float = 1.0  # factor on the reference's FLOPs
    row: str | None = (
        None  # the reference row; default the dense row, or a dense run with the settings of the first row
    )
    flops: float | None = None  # absolute FLOPs, instead of a reference

    def __post_init__(self) -> None:
        require(0 < self.times < 1e30, "times", "above 0", self.times)
        require(self.flops is None or 0 < self.flops < 1e30, "flops", "above 0", self.flops)


def read_budget(given: Any) -> FlopsBudget | None:
    """Read the budget of a recipe; None for the paper's: T steps for every row, plus its search."""
    if given in (None, "paper"):
        return None
    if given == "equal":
        return FlopsBudget()
    if not isinstance(given, Mapping) or not given:
        raise UserError(f"budget is {FORMS}, got {given!r}")
    if "flops" in given and len(given) > 1:
        raise UserError(f"cannot be combined with {' or '.join(given.keys() - {'flops'})}", "budget.flops")
    return fill_settings(FlopsBudget(), given, "budget")


def check_budget(recipe: Table, datasets: Mapping[str, Table]) -> None:
    """Refuse a budget of unknown form, and settings that contradict it."""
    try:
        budget = read_budget(recipe.get("budget"))
    except UserError as error:
        raise RecipeError(error, *(error.field or "budget").split(".")) from error
    if budget is None:
        return
    if budget.row and budget.row not in (names := [*map(str, recipe["methods"])]):
        raise RecipeError(f"budget: no row {budget.row}; allowed: {', '.join(names)}", "budget", "row")
    for row, own in recipe["methods"].items() if isinstance(recipe["methods"], dict) else ():
        for key in {"times", "steps", "epochs", "from"} & (own or {}).keys():
            why = "what its ticket cost is not in it" if key == "from" else "its T follows from the budget"
            message = f"row {row} has {key}, but at equal total cost {why}; leave out {key} or the budget"
            raise RecipeError(message, "methods", row, key)
    if budget.flops is not None:
        for path, table in [((), recipe), *((("datasets", name), table) for name, table in datasets.items())]:
            for key in {"steps", "epochs"} & table.keys():
                message = f"budget.flops sets how long every row trains and excludes {key}; leave one out"
                raise RecipeError(message, *path, key)
