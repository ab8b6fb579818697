"""The tables and figures of the documents are drawn from studies of `sparsesoup compare`, by the real commands."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from sparsesoup.cli.main import main
from sparsesoup.study.recipe.plan import read_plan
from tiny_hub import listing, masks_of, weights_of
from tiny_studies import write_recipe

pytestmark = pytest.mark.integration

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RECIPE = {
    "models": "bert", "datasets": "reviews", "steps": 6, "seeds": [0, 1],
    "methods": {"dense": None, "cut-50": {"name": "one-shot-structured", "sparsities": 0.5},
                "magnitude": {"sparsities": 0.7}, "sparse-chance": {"name": "random", "sparsities": 0.7}},
}  # fmt: skip


def script(name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)


def run(name: str, *words: object) -> None:
    """Run a script's command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"benchmarks/{name}.py", *map(str, words)])
        script(name).main()


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A folder with a finished study in runs/, and one for results."""
    folder = tmp_path_factory.mktemp("evidence")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("bert", "reviews"):
            (folder / name).symlink_to(place / name)
        assert main(["compare", "--config", write_recipe(RECIPE)]) == 0
    (folder / "results").mkdir()
    return folder


@pytest.fixture
def study(finished):
    return json.loads((finished / "runs/studies/small/study.json").read_text())


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((BENCHMARKS / "experiments").glob("*.yaml")) if p.stem != "clip-pretrain"],
    ids=lambda p: p.stem,
)
def test_every_experiment_is_a_recipe_and_the_committed_result_is_of_it(path, place):
    changes = {"models": [str(place / "bert")], "datasets": [str(place / "reviews")]}
    recipe, cells = yaml.safe_load(path.read_text()), read_plan(path, changes).trials
    assert list(dict.fromkeys(cell.row for cell in cells)) == list(recipe["methods"])
    shares = recipe.get("sparsities", 0.5)  # a curve has one in each row
    own = {row: (table or {}).get("name", row) == "dense" for row, table in recipe["methods"].items()}
    runs = sum(1 if dense or not isinstance(shares, list) else len(shares) for dense in own.values())
    assert len(cells) == len(recipe["seeds"]) * runs
    assert len(recipe["seeds"]) >= 3
    if (result := BENCHMARKS / "results" / path.with_suffix(".json").name).exists():
        assert json.loads(result.read_text())["recipe"] == recipe


def test_a_table_of_the_documents_is_drawn_from_what_a_study_writes(study):
    tables = script("tables")
    assert study["command"] == "sparsesoup compare --config small.yaml"
    study["recipe"]["methods"]["late"] = None
    lines = tables.score_rows(study, tables.rows_of(study)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {row}" for row in study["recipe"]["methods"]]
    assert lines[2].endswith("| 6 | 1.00 |")
    assert lines[-1] == "| late | missing | missing | missing | missing |"
    study["runs"] = [each for each in study["runs"] if (each["row"], each["seed"]) != ("magnitude", 1)]
    assert "(1 of 2)" in tables.score_rows(study, tables.rows_of(study))
    assert "magnitude" not in tables.whole_rows(study)
    assert "points over 2 seeds: " in tables.verdicts(study, "sparse-chance")


def test_the_runs_of_a_study_are_timed_beside_their_scores(finished, study, monkeypatch):
    """A timing takes seconds: of a row that is cut, once on both backends and once on torch alone."""
    timed = finished / "runs/studies/timed/study.json"
    study["runs"] = [each for each in study["runs"] if each["row"] == "cut-50"]
    timed.parent.mkdir()
    timed.write_text(json.dumps(study))
    before = listing(finished / "runs")
    words = ["timed", "--out", finished / "runs", "--results", finished / "results", "--rounds", 3]

    def results():
        return json.loads((finished / "results" / "timed.json").read_text())["runs"]

    run("curve", *words, "--seed", 0)
    (first, untimed), backends = results(), {"torch", "onnxruntime"}
    assert untimed.keys() == first.keys() - {"timed", "speed"}
    monkeypatch.setattr(script("curve"), "BACKENDS", ("torch",))
    run("curve", *words, "--seed", 1)
    assert results()[0] == first  # the runs of other seeds keep their speeds
    for found, plain, names in zip(results(), study["runs"], (backends, {"torch"}), strict=True):
        assert {k: v for k, v in found.items() if k not in ("timed", "speed")} == plain
        speed = found["speed"]
        assert speed.keys() == names
        assert speed["torch"]["form"] == "compact"
        assert speed["torch"]["flops_ratio"] > 1.2  # of a tiny model: half of its blocks, and a head that stays
        assert speed["torch"]["quartiles"][0] <= speed["torch"]["faster"] <= speed["torch"]["quartiles"][1]
    assert listing(finished / "runs") == before


def curve_of(*runs: tuple[str, int, float, dict[str, float]]) -> dict[str, Any]:
    """A result with these (row, seed, score, times as fast by backend)."""
    found = [
        {"row": row, "seed": seed, "test": {"f1": score}, "validation": {"f1": score},
         "sparsity": {"reached": 0.5 if row == "cut" else 0.0}, "speed": {k: {"faster": v} for k, v in fast.items()}}
        for row, seed, score, fast in runs
    ]  # fmt: skip
    recipe = {"methods": {"dense": None, "cut": {}, "late": {}}, "seeds": [0, 1, 2], "datasets": "some", "steps": 9}
    return {"recipe": recipe, "runs": found}


def test_the_points_of_a_curve_are_means_and_distances_paired_by_seed():
    dense = [("dense", seed, 0.9 + seed / 100, {}) for seed in range(3)]
    cut = [("cut", seed, 0.88 + seed / 100, {"torch": 1.5 + seed / 4}) for seed in range(3)]
    lines = script("tables").curve_rows(curve_of(*dense, *cut)).splitlines()
    rows = [[entry.strip() for entry in line.split("|")[1:-1]] for line in lines]
    assert len({len(row) for row in rows}) == 1
    assert rows[2][3:5] == ["91.0 ± 1.0", "-"]
    assert rows[3] == ["cut", "50.0 %", "89.0 ± 1.0", "89.0 ± 1.0", "-2.0 ± 0.0", "1.75", "not timed"]
    assert rows[4][:2] == ["late", "missing"]


def test_a_curve_is_drawn_on_the_backend_that_all_rows_were_timed_on(tmp_path):
    figures, tables = script("figures"), script("tables")
    for name, dense in (("a", {"torch": 1.0}), ("b", {})):
        result = curve_of(("dense", 0, 0.9, dense), ("cut", 0, 0.9, {"torch": 1.5, "onnxruntime": 1.6}))
        rows = {row: runs for row, runs in tables.rows_of(result).items() if runs}
        figures.draw_curve(result["recipe"], rows, tmp_path / f"{name}.svg")
    assert "dense, torch" in (tmp_path / "a.svg").read_text()
    assert not (tmp_path / "b.svg").exists()


def kept_of(path: Path) -> dict[str, Tensor]:
    """The weights of a ticket that are not zero, by name."""
    return {name: weights_of(path / "model")[name] != 0 for name in masks_of(path)}


def test_what_tickets_share_is_counted_from_the_weights_that_are_left(finished, study):
    path = finished / "runs/studies/small/study.json"
    run("overlap", path, "--out", finished / "runs", "--results", finished / "results")
    result = json.loads((finished / "results" / "overlap-small.json").read_text())
    found = result["overlap"]
    assert result["command"].startswith(f"python benchmarks/overlap.py {path}")
    assert found.keys() == {"cut-50", "magnitude", "sparse-chance"}  # a dense run has no mask to compare
    runs = {(each["row"], each["seed"]): finished / "runs" / each["run"] for each in study["runs"]}
    first, *others = (kept_of(runs[row, seed]) for row in ("magnitude", "sparse-chance") for seed in (0, 1))
    shares = [
        sum(int((mask & first[name]).sum()) for name, mask in kept.items()) / sum(int(m.sum()) for m in kept.values())
        for kept in (first, *others)
    ]
    assert found["magnitude"]["with magnitude"] == pytest.approx(shares[:2], abs=1e-3)
    assert found["sparse-chance"]["with magnitude"] == pytest.approx(shares[2:], abs=1e-3)
    assert found["magnitude"] == {"with magnitude": [1.0, 1.0], "between seeds": [1.0]}
    assert found["sparse-chance"]["between seeds"][0] == pytest.approx(0.3, abs=0.05)  # its density
    assert 0.2 < shares[2] < 0.4
