"""A run of pela from end to end: what its sparsity is refused for, what it says of itself, what it may be made into."""

from pathlib import Path

import pytest

import sparsesoup
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.study.recipe.plan import read_plan
from tiny_studies import study, write_recipe

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("inside")]

PLACE = ["--model", "bert", "--dataset", "reviews", "--steps", "6", "--train.batch-size", "8"]
WANTED = "a share of 0.75 with --method.compression 4"
STUDY = {
    "models": "bert", "datasets": "reviews", "sparsities": [0.5, 0.8], "seeds": [0], "steps": 6,
    "train": {"batch_size": 8}, "methods": {"dense": None, "pela": None, "magnitude": None},
}  # fmt: skip


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_sparsity_is_refused_on_the_command_line(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "pela", "--sparsity", "0.75", *PLACE, *more]) == 2
    out, said = capsys.readouterr()
    assert out == ""
    assert said.count("\n") == 1
    assert WANTED in said
    assert not Path("runs").exists()


def test_a_sparsity_is_refused_in_python() -> None:
    with pytest.raises(UserError, match=WANTED):
        sparsesoup.prune("pela", model="bert", dataset="reviews", sparsity=0.75, steps=6)
    assert not Path("runs").exists()


def test_a_sparsity_of_its_row_is_refused_in_a_recipe() -> None:
    recipe = write_recipe(STUDY | {"methods": {"pela": {"sparsities": [0.75]}}})
    with pytest.raises(UserError, match=WANTED) as caught:
        read_plan(Path(recipe))
    assert "small.yaml, line" in str(caught.value)


def test_a_study_trains_it_once_beside_rows_at_several_sparsities() -> None:
    assert main(["compare", "--config", write_recipe(STUDY)]) == 0
    rows = [run["row"] for run in study()["runs"]]
    assert {row: rows.count(row) for row in rows} == {"dense": 1, "pela": 1, "magnitude": 2}
