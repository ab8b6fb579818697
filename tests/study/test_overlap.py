"""What the tickets of a study have in common, as the benchmark tells it, against the zeros of their weights."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from tiny_hub import masks_of, weights_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def kept_of(run: Path) -> dict[str, Tensor]:
    """The weights of a ticket that are not zero, by name."""
    return {name: weights_of(run / "model")[name] != 0 for name in masks_of(run)}


def test_what_tickets_share_is_counted_from_the_weights_that_are_left(place, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    study, overlap = (importlib.import_module(name) for name in ("study", "overlap"))
    small: dict[str, Any] = {
        "model": str(place / "bert"), "dataset": str(place / "reviews"), "steps": 6, "seeds": [0, 1], "sparsity": 0.7,
        "rows": {"dense": None, "magnitude": None, "sparse-chance": {"name": "random"}},
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(overlap, "HERE", tmp_path)
    out, result = tmp_path / "out", tmp_path / "results" / "small.json"
    monkeypatch.setattr(sys, "argv", ["study.py", str(tmp_path / "small.yaml"), "--out", str(out)])
    study.main()
    monkeypatch.setattr(sys, "argv", ["overlap.py", str(result), "--out", str(out)])
    overlap.main()
    found = json.loads((tmp_path / "results" / "overlap-small.json").read_text())["overlap"]
    assert found.keys() == {"magnitude", "sparse-chance"}  # a dense product has no mask to compare
    runs = {(c["row"], c["seed"]): out / c["run"] for c in json.loads(result.read_text())["cells"]}
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
