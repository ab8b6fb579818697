"""The live table of a study: whatever a row, a dataset or a model is called."""

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from sparsesoup.study.compare import run_study
from sparsesoup.study.execute.executors import InProcess
from sparsesoup.study.execute.jobs import TrialJob
from sparsesoup.study.execute.progress import StudyProgress
from sparsesoup.study.recipe.plan import read_plan

NAMES = ("isp [tuned]", "x [/y]", "[bold]", ":bug:")


@pytest.mark.parametrize("terminal", [True, False])
def test_names_are_shown_as_they_are_and_are_no_markup(place, monkeypatch, tmp_path, terminal):
    for name, known in (("bert [b]", "bert"), ("reviews [r]", "reviews")):
        (tmp_path / name).symlink_to(place / known)
    monkeypatch.chdir(tmp_path)
    recipe = {"models": "bert [b]", "datasets": "reviews [r]", "sparsities": 0.5, "seeds": 0, "steps": 3}
    rows = {name: {"name": "random"} for name in NAMES}
    Path("small.yaml").write_text(yaml.safe_dump(recipe | {"methods": rows}), encoding="utf-8")
    jobs = [TrialJob("train", cell, Path("runs"), Path("studies")) for cell in read_plan(Path("small.yaml")).cells]
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
    with StudyProgress(console, jobs) as board:
        for job in jobs:
            board.begin(job)
    shown = console.file.getvalue()
    assert [f"training {name} on reviews [r], sparsity 0.5, seed 0 (bert [b])" in shown for name in NAMES] == [True] * 4


def test_a_study_in_one_process_has_the_table_on_a_terminal_and_lines_elsewhere(place, monkeypatch, tmp_path):
    for name in ("bert", "reviews"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    recipe = {"models": "bert", "datasets": "reviews", "sparsities": 0.5, "seeds": [0, 1], "methods": ["random"]}
    Path("small.yaml").write_text(yaml.safe_dump(recipe | {"steps": 3}), encoding="utf-8")
    for terminal in (True, False):
        console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
        run_study(read_plan(Path("small.yaml")), Path(f"runs-{terminal}"), console, InProcess())
        shown = console.file.getvalue()
        assert "training random on reviews, sparsity 0.5, seed 1 (bert)" in shown
        assert ("1 done, 0 running, 1 waiting, 0 failed, about " in shown) == terminal
        assert ("2 done, 0 running, 0 waiting, 0 failed, about " in shown) == terminal
        assert ("2 of 2: training" in shown) == (not terminal)
