"""The curve of quality against speed: a small one from end to end, by its real command."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_hub import listing

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def curve(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("curve")


def test_a_curve_is_drawn_once_and_timed_when_asked(curve, place, tmp_path, monkeypatch, capsys):
    study = {
        "model": str(place / "bert"), "dataset": str(place / "reviews"), "steps": 99, "seeds": [0, 1],
        "rows": {"dense": None, "one-shot-50": {"name": "one-shot-structured", "sparsity": 0.5},
                 "weights-30": {"name": "magnitude", "sparsity": 0.3}},
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(study))
    words = ["curve.py", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "out"), "--steps", "4", "--rounds", "3"]
    monkeypatch.setattr(sys, "argv", words)
    curve.main()
    path = tmp_path / "out" / "small-trial.json"
    result = json.loads(path.read_text())
    dense, cut, _ = result["cells"]
    assert "accuracy" in dense["test"].keys() & cut["test"].keys()
    assert "not timed" in capsys.readouterr().out
    before = listing(tmp_path / "out" / "reviews")
    curve.main()
    assert json.loads(path.read_text()) == result
    assert listing(tmp_path / "out" / "reviews") == before
    monkeypatch.setattr(sys, "argv", [*words, "--time"])
    curve.main()
    again = json.loads(path.read_text())["cells"]
    assert [c["speed"]["torch"]["form"] for c in again] == ["as it is", "compact", "as it is"]
    found = again[1]["speed"]
    assert found.keys() == {"torch", "onnxruntime"}
    assert found["torch"]["promise"] > 1.2  # of a tiny model: half of its blocks, and a head that stays
    assert found["torch"]["quartiles"][0] <= found["torch"]["faster"] <= found["torch"]["quartiles"][1]
    assert [c["test"] for c in again] == [c["test"] for c in result["cells"]]


def test_the_points_of_a_curve_are_means_and_distances_paired_by_seed(curve):
    def cell(row: str, seed: int, score: float, times: float | None) -> dict[str, Any]:
        fast = {"torch": {"faster": times}} if times else {}
        gone = {"reached": 0.5 if times else 0.0}
        return {"row": row, "seed": seed, "test": {"f1": score}, "validation": {"f1": score}, "sparsity": gone,
                "speed": fast}  # fmt: skip

    cells = [cell("dense", s, 0.9 + s / 100, None) for s in range(3)]
    cells += [cell("cut", s, 0.88 + s / 100, 1.5 + s / 4) for s in range(3)]
    result = {"study": {"rows": {"dense": None, "cut": {}, "late": {}}, "seeds": [0, 1, 2]}, "cells": cells}
    rows = [[entry.strip() for entry in line.split("|")[1:-1]] for line in curve.points(result)]
    assert len({len(row) for row in rows}) == 1
    assert rows[2][3:5] == ["91.0 ± 1.0", "-"]
    assert rows[3] == ["cut", "50.0 %", "89.0 ± 1.0", "89.0 ± 1.0", "-2.0 ± 0.0", "1.75", "not timed"]
    assert rows[4][:2] == ["late", "missing"]


def test_a_curve_is_drawn_on_what_all_rows_were_timed_on(curve, tmp_path):
    def cell(row: str, on: dict[str, float]) -> dict[str, Any]:
        return {"row": row, "seed": 0, "test": {"f1": 0.9}, "speed": {name: {"faster": x} for name, x in on.items()}}

    cells = [cell("dense", {"torch": 1.0}), cell("one-shot-50", {"torch": 1.5, "onnxruntime": 1.6})]
    study = {"rows": {"dense": None, "one-shot-50": {}}, "seeds": [0], "dataset": "some", "steps": 9}
    curve.figure({"study": study, "cells": cells}, tmp_path / "a.svg")
    curve.figure({"study": study, "cells": [cell("dense", {}), cells[1]]}, tmp_path / "b.svg")
    assert "dense, torch" in (tmp_path / "a.svg").read_text()
    assert not (tmp_path / "b.svg").exists()
