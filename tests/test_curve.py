"""The curve of quality against speed: a small one from end to end, by its real command."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_hub import listing

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def curve(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("curve")


def test_a_curve_is_drawn_once_and_timed_as_often_as_asked(curve, place, tmp_path, monkeypatch, capsys):
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
    dense, cut, weights = result["cells"]
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
    curve.main()
    once_more = json.loads(path.read_text())["cells"]
    assert once_more[1]["speed"] != found
    assert {**once_more[1], "speed": 0, "timed": 0} == {**again[1], "speed": 0, "timed": 0}


def test_the_points_of_a_curve_are_means_and_distances_paired_by_seed(curve):
    def cell(row: str, seed: int, score: float, times: float | None) -> dict[str, Any]:
        fast = {"torch": {"faster": times}} if times else {}
        gone = {"reached": 0.5 if times else 0.0}
        return {"row": row, "seed": seed, "test": {"f1": score}, "validation": {"f1": score}, "sparsity": gone,
                "speed": fast}  # fmt: skip

    cells = [cell("dense", s, 0.9 + s / 100, None) for s in range(3)]
    cells += [cell("cut", s, 0.88 + s / 100, 1.5 + s / 4) for s in range(3)]
    lines = curve.points({"study": {"rows": {"dense": None, "cut": {}, "late": {}}}, "cells": cells})
    assert lines[2].split() == ["cut", "50.0%", "89.0", "89.0", "-2.0", "±", "0.0", "1.75", "on", "torch"]
    assert lines[1].endswith("not timed")
    assert lines[3].split() == ["late", "missing"]
