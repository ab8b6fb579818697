"""Budgets: at equal total cost no row takes more FLOPs than its reference, on the meter; contradictions are refused."""

from pathlib import Path

import pytest

from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.study.equal_budget import match_budget
from sparsesoup.study.recipe.plan import read_plan
from tiny_studies import study, write_recipe

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("inside")]


TAUGHT = {"name": "gradual", "train": {"distill": {"teacher": "dense"}}}
RECIPE = {
    "models": "bert", "datasets": "reviews", "sparsities": 0.5, "seeds": [0, 1], "steps": 120, "budget": "equal",
    "train": {"batch_size": 4, "learning_rate": 0.003},
    "methods": {"dense": None, "snip": {"method": {"batches": 3}}, "taught": TAUGHT},
}  # fmt: skip


def write(**changes):
    return Path(write_recipe(RECIPE | changes))


def steps_of(**changes):
    """Row -> T, the same for its seeds."""
    plan = match_budget(read_plan(write(**changes)))
    found = {}
    for cell in plan.trials:
        assert found.setdefault(cell.row, cell.settings.budget.steps) == cell.settings.budget.steps
    return found


def test_at_equal_cost_no_run_takes_more_than_the_dense_one_and_hardly_less():
    assert main(["compare", "--config", str(write()), "--threads", "1"]) == 0
    cells = study()["runs"]
    flops = {(c["row"], c["seed"]): sum(cost["flops"] for cost in c["cost"].values()) for c in cells}
    assert {c["steps"] for c in cells if c["row"] == "dense"} == {120}
    assert all(spent <= flops["dense", seed] for (_, seed), spent in flops.items())
    for row in ("snip", "taught"):
        assert max(flops[row, seed] / flops["dense", seed] for seed in (0, 1)) > 0.98
    assert "| taught | " in Path("runs/studies/small/study.md").read_text()


def test_a_budget_is_of_any_row_any_multiple_or_a_number():
    rows = {"dense": None, "imp": {"method": {"cut": 0.5}}}
    assert steps_of(steps=24, methods=rows)["dense"] == 24
    assert steps_of(steps=24, budget={"times": 2}, methods=["dense"], seeds=0)["dense"] in range(48, 53)
    found = steps_of(steps=24, budget={"row": "imp"}, seeds=0, methods=rows)
    assert found["imp"] == 24
    assert found["dense"] in range(48, 53)  # its validation comes once, not twice
    assert steps_of(steps=24, methods=["random"], seeds=0) == {"random": 24}  # beside a dense run that no row is
    assert steps_of(budget={"flops": 4e7}, steps=None, methods=["dense"], seeds=0)["dense"] > 24


def test_a_row_that_no_budget_of_this_size_serves_is_refused_with_the_least_one(capsys):
    methods = {"dense": None, "isp-paper": {"method": {"weak_masks": 1, "weak_steps": 1}}}
    write(methods=methods, seeds=0, steps=20)
    assert main(["compare", "--config", "small.yaml"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert (
        "the budget is too small for isp-paper on reviews, sparsity 0.5, seed 0 (bert): it needs at least 57" in error
    )
    assert not Path("runs").exists()
    times = float(error.split("make the budget ")[1].split(" times")[0])
    assert steps_of(methods=methods, seeds=0, steps=20, budget={"times": times})
    with pytest.raises(UserError, match="too small"):
        steps_of(methods=methods, seeds=0, steps=20, budget={"times": 0.95 * times})


@pytest.mark.parametrize(
    ("changes", "line", "said"),
    [
        ({"budget": "fair"}, "budget:", "budget is paper, equal, {times: 3}"),
        ({"budget": {"times": 0.05}}, "budget:", "the budget is too small for taught on reviews"),
        (
            {"methods": {"dense": {"seeds": [0]}, "snip": None}, "budget": {"row": "dense"}},
            "row:",
            "budget: no row dense to compare snip on reviews, sparsity 0.5, seed 1 (bert) with; name one",
        ),
        (
            {"methods": {"dense": None, "isp-paper": None}, "budget": {"row": "isp-paper"}, "steps": 9},
            "budget:",
            "9 steps are too few",
        ),
        ({"budget": {"flop": 3}}, "flop:", "budget.flop: unknown setting (budget has times, row, flops); did you mean"),
        ({"budget": {"times": 0}}, "times:", "budget.times: must be above 0, got 0"),
        ({"budget": {"flops": "lots"}}, "flops:", "budget.flops: expected a number or null, got 'lots'"),
        (
            {"budget": {"flops": 1e9, "row": "dense"}, "steps": None},
            "flops:",
            "budget.flops: cannot be combined with row",
        ),
        ({"budget": {"row": "imp"}}, "row:", "budget: no row imp; allowed: dense, snip, taught"),
        ({"budget": {"flops": 1e9}}, "steps:", "budget.flops sets how long every row trains and excludes steps"),
        ({"methods": {"dense": {"times": 2}}}, "times:", "row dense has times, but at equal total cost its T follows"),
        ({"methods": {"dense": None, "snip": {"steps": 4}}}, "steps:", "row snip has steps, but at equal total cost"),
        ({"methods": {"snip": None, "on": {"from": "snip"}}}, "from:", "what its ticket cost is not in it"),
    ],
)
def test_a_budget_that_contradicts_is_refused_with_its_line(changes, line, said, capsys):
    write(**changes)
    assert main(["compare", "--config", "small.yaml"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert said in error
    named = int(error.split("line ")[1].split(":")[0])
    assert Path("small.yaml").read_text().splitlines()[named - 1].strip().startswith(line)


def test_the_budget_of_the_paper_is_t_for_every_row():
    assert steps_of(budget="paper") == steps_of(budget=None) == {"dense": 120, "snip": 120, "taught": 120}


def test_a_study_with_a_budget_that_grows_by_a_seed_of_another_t_is_refused_with_the_reason(capsys):
    write(seeds=[0], steps=24, methods={"dense": None, "snip": {"method": {"batches": 3}}})
    assert main(["compare", "--config", "small.yaml"]) == 0
    capsys.readouterr()
    assert main(["compare", "--config", "small.yaml", "--seed", "0", "3"]) == 2  # rows of seed 3 are padded otherwise
    error = capsys.readouterr().err
    assert "(1 of its runs are not in this recipe: T of snip on reviews, sparsity 0.5, seed 0 (bert) was 21" in error
    assert "and is 20, which a budget sets by all seeds of a row, so that another seed can change it); give" in error


def test_a_row_that_costs_more_at_one_sparsity_is_no_budget_for_a_dense_run_beside_both():
    imp = {"imp": {"method": {"cut": 0.5}}}
    both = {"sparsities": [0.5, 0.75], "budget": {"row": "imp"}, "seeds": [0]}
    with pytest.raises(
        UserError, match=r"line \d+: budget: row imp costs .* by sparsity, and dense is compared with all"
    ):
        steps_of(**both, methods={"dense": None, **imp})
    plan = match_budget(read_plan(write(**both, methods={"magnitude": None, **imp})))
    lengths = {cell.sparsity: cell.settings.budget.steps for cell in plan.trials if cell.row == "magnitude"}
    assert 120 < lengths[0.5] < lengths[0.75]
    assert steps_of(**(both | {"sparsities": 0.5}), methods={"dense": None, **imp})["dense"] > 120


def test_of_dense_rows_with_several_settings_the_first_is_the_budget():
    second = {"name": "dense", "train": {"batch_size": 8}}
    found = steps_of(methods={"dense": None, "wide": second}, seeds=[0])
    assert found["dense"] == 120 > found["wide"]
