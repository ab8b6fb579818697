"""A run of pela from end to end: what its sparsity is refused for, what it says of itself, what it may be made into."""

import json
import shutil
from pathlib import Path

import pytest

import sparsesoup
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.hub.models.tickets import SparsityCallback
from sparsesoup.report.format import format_percent
from sparsesoup.report.terminal import read_report
from sparsesoup.study.recipe.plan import read_plan
from tiny_studies import study, write_recipe

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("inside")]

PLACE = ["--model", "bert", "--dataset", "reviews", "--steps", "6", "--train.batch-size", "8"]
WANTED = "method.compression 4"  # with dashes on the command line
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
    for file in ("study.md", "study.html"):
        assert " % removed by rank)" in Path("runs/studies/small", file).read_text()


def trained(*more: str) -> Path:
    """A run of pela, and a dense one of the same settings."""
    for method in ("dense", "pela"):
        assert main(["prune", method, *PLACE, *(more if method == "pela" else [])]) == 0
    (found,) = Path("runs").glob("*/pela-*/seed-*")
    return found


def test_a_run_says_what_it_removed_by_rank(capsys: pytest.CaptureFixture[str]) -> None:
    run = trained("--method.compression", "4")
    low = read_report(run)["notes"]["low_rank"]
    share = format_percent(low["removed"])
    closing = capsys.readouterr().out
    assert (
        f"pela: {low['left']:,} of {low['weights']:,} weights left by rank (compression 4), {share} removed" in closing
    )
    assert "\ndense   validation accuracy" in closing[closing.index("pela:") :]
    assert main(["show", str(run)]) == 0
    shown, page = " ".join(capsys.readouterr().out.split()), (run / "report.html").read_text()
    for text in (shown, page):
        assert f"by pela: {share} of {low['weights']:,} prunable weights removed by rank (compression 4)" in text
        assert "times a dense run" in text
        assert "Training FLOPs are those of the thin layers" in text
        assert "FLOPs are those of the dense model" not in text
        assert "prunable weights kept" not in text
        assert "0.0 % pruned" not in text
        assert "Sparsity by layer and role" not in text
    assert f"<b>{share}</b><span>of the weights removed by rank" in page
    assert "dense, estimated" in page


def test_its_card_says_what_it_removed_by_rank(capsys: pytest.CaptureFixture[str]) -> None:
    run = trained()
    assert main(["push", str(run), "me/thin", "--dry-run", "--out", "card"]) == 0
    card = Path("card/README.md").read_text()
    assert "| compression by rank | 2 |" in card
    assert "**pela**" in card
    assert "low rank" in card
    assert "sparsesoup apply" not in card
    assert "sparsesoup export --to low-rank" in card


def test_what_needs_masks_is_refused_with_what_low_rank_can_be_made_into(capsys: pytest.CaptureFixture[str]) -> None:
    run = trained()
    for line, said in (
        (["export", str(run), "--to", "compact"], "use --to low-rank"),
        (["apply", str(run), "--model", "bert"], "its masks keep every weight, so there is nothing to apply"),
        (["prune", "ticket", "--method.ticket", str(run), *PLACE], f"{run} is of low rank, and its masks keep every"),
    ):
        capsys.readouterr()
        assert main([*line, "--out", "out"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert said in error
        assert not Path("out").exists()


def test_what_a_run_is_stands_in_its_ticket_whatever_its_method_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    run = trained()
    shutil.copytree(run / "model" / "pruning", "alone/pruning")
    place = Path("alone/pruning/ticket.json")
    facts = json.loads(place.read_text())
    assert facts["low_rank"] == read_report(run)["notes"]["low_rank"]
    del facts["digest"]
    place.write_text(json.dumps(facts | {"method": "thin-by-somebody"}))
    with pytest.raises(UserError, match="of low rank"):
        SparsityCallback("alone")
    capsys.readouterr()
    assert main(["apply", "alone", "--model", "bert", "--out", "out"]) == 2
    assert "its masks keep every weight" in capsys.readouterr().err
