"""Runs at true size: what the README and the example promise, at their own numbers of steps. `make slow` runs them."""

import re
import runpy
from collections import Counter
from pathlib import Path

import pytest

from sparsesoup.hub.data.embedded import embedded_dataset
from sparsesoup.report.terminal import read_report

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def commonest_class() -> float:
    """The accuracy of always giving one answer on the test split of the embedded data set."""
    labels = embedded_dataset()["test"]["label"][:]
    return max(Counter(labels).values()) / len(labels)


def test_the_readmes_example_removes_nine_tenths_and_still_tells_classes_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, *_ = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    names = {}
    exec(code, names)
    report = read_report(names["run"].path)
    assert report["steps"] == 200
    assert report["sparsity"]["kept"] == round(0.1 * report["sparsity"]["total"])
    assert report["test"]["accuracy"] > commonest_class() + 0.05


def test_the_demo_shows_what_the_recommended_method_is_worth(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["demo.py", "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / "demo.py"), run_name="__main__")
    reports = {
        path.parents[1].name.rpartition("-")[0]: read_report(path.parent) for path in tmp_path.rglob("report.json")
    }
    assert reports.keys() == {"dense", "gradual", "gradual-obs"}
    scores = {name: report["test"]["accuracy"] for name, report in reports.items()}
    assert scores["dense"] > scores["gradual-obs"] > scores["gradual"] + 0.05
    assert min(scores.values()) > commonest_class() + 0.05
