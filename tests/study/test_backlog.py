"""The script for a machine that is lent for minutes draws what is unfinished, the cheapest first, and leaves copies."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tiny_hub import offline

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STUDY = {"dataset": "reviews", "sparsity": 0.5, "steps": 4, "seeds": [0], "train": {"batch_size": 8}}


def test_the_cheapest_unfinished_cells_are_drawn_and_copied(place, tmp_path):
    home = tmp_path / "benchmarks"
    (home / "experiments").mkdir(parents=True)
    for name in ("gpu.sh", "backlog.py", "study.py"):
        shutil.copy(BENCHMARKS / name, home / name)
    for name in ("bert", "reviews"):
        (tmp_path / name).symlink_to(place / name)
    study = STUDY | {"model": "bert", "rows": {"imp": {"method": {"cut": 0.3}}, "dense": None, "isp-code": None}}
    (home / "experiments" / "small.yaml").write_text(yaml.safe_dump(study))
    (home / "experiments" / "other.yaml").write_text("like: small.yaml\nrows: {magnitude: null}\n")
    (home / "experiments" / "clip-pretrain.yaml").write_text("seed: 0\n")  # no experiment of rows
    environment = offline() | {"PYTHON": sys.executable, "WORKERS": "1", "OUT": str(tmp_path / "out")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    line = ["sh", str(home / "gpu.sh"), "300"]
    said = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=True)
    result = home / "results" / "small.json"
    cells = {cell["row"]: cell for cell in json.loads(result.read_text())["cells"]}
    assert not cells["imp"].get("missing")
    assert cells["isp-code"]["missing"]  # refused at so short a T, and told
    assert "isp-code on reviews: 4 steps are too few" in said.stdout
    whole = said.stdout.splitlines()
    assert [text.split()[0] for text in whole if text.endswith("small.json")] == ["1", "2"]
    other = json.loads((home / "results" / "other.json").read_text())
    assert [(cell["row"], cell["steps"]) for cell in other["cells"]] == [("magnitude", 4)]  # as small.yaml says
    assert (tmp_path / "out" / "small.json").read_text() == result.read_text()
    runs = [path.parts[-3] for path in sorted(home.glob("scratch/*/*/*/report.json"), key=lambda p: p.stat().st_mtime)]
    assert [name.partition("-")[0] for name in runs] == ["magnitude", "dense", "imp"]


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_row_of_a_committed_experiment_can_be_drawn(path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    backlog = importlib.import_module("backlog")
    study = backlog.read(path)
    for row, own in study.get("rows", {}).items():
        found = backlog.settings(study, row, own or {}, 1)
        assert (found.name, found.place.seed) == ((own or {}).get("name", row), 1)
        assert found.amount.sparsity == (own or {}).get("sparsity", study.get("sparsity", 0.0))
