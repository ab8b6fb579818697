"""The live table of a study: whatever a row, a dataset or a model is called."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from sparsesoup.study.compare import run_study
from sparsesoup.study.execute.executors import InProcess, gpu_environment, gpu_names
from sparsesoup.study.execute.jobs import TrialJob
from sparsesoup.study.execute.progress import StudyProgress
from sparsesoup.study.recipe.plan import read_plan
from tiny_studies import RECIPE, write_recipe

pytestmark = pytest.mark.usefixtures("inside")

SHORT = RECIPE | {"sparsities": 0.5, "steps": 3}
NAMES = ("isp [tuned]", "x [/y]", "[bold]", ":bug:")


@pytest.mark.parametrize("terminal", [True, False])
def test_names_are_shown_as_they_are_and_are_no_markup(place, tmp_path, terminal):
    for name, known in (("bert [b]", "bert"), ("reviews [r]", "reviews")):
        (tmp_path / name).symlink_to(place / known)
    rows = {name: {"name": "random"} for name in NAMES}
    write_recipe(SHORT | {"models": "bert [b]", "datasets": "reviews [r]", "seeds": 0, "methods": rows})
    jobs = [TrialJob(cell, Path("runs"), Path("studies")) for cell in read_plan(Path("small.yaml")).trials]
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
    with StudyProgress(console, jobs) as board:
        for job in jobs:
            board.begin(job)
    shown = console.file.getvalue()
    assert [f"training {name} on reviews [r], sparsity 0.5, seed 0 (bert [b])" in shown for name in NAMES] == [True] * 4


def test_a_study_in_one_process_has_the_table_on_a_terminal_and_lines_elsewhere():
    write_recipe(SHORT | {"methods": ["random"]})
    for terminal in (True, False):
        console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
        run_study(read_plan(Path("small.yaml")), Path(f"runs-{terminal}"), console, InProcess())
        shown = console.file.getvalue()
        assert "training random on reviews, sparsity 0.5, seed 1 (bert)" in shown
        assert ("1 done, 0 running, 1 waiting, 0 failed, about " in shown) == terminal
        assert ("2 done, 0 running, 0 waiting, 0 failed, about " in shown) == terminal
        assert ("2 of 2: training" in shown) == (not terminal)


@pytest.mark.parametrize(
    ("environment", "count", "names"),
    [
        ({}, 0, []), ({}, 3, ["0", "1", "2"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, []), ({"CUDA_VISIBLE_DEVICES": "-1"}, 0, []),
        ({"CUDA_VISIBLE_DEVICES": "2, GPU-8932f937"}, 2, ["2", "GPU-8932f937"]),
        ({"CUDA_VISIBLE_DEVICES": "2,-1,3"}, 1, ["2"]),
        ({"ACCELERATE_TORCH_DEVICE": "cuda:1"}, 2, []),
    ],
)  # fmt: skip
def test_gpus_are_those_that_this_process_sees_unless_one_device_is_set_for_all(environment, count, names) -> None:
    assert gpu_names(environment, count) == names
    given = [gpu_environment(k, names).get("CUDA_VISIBLE_DEVICES") for k in range(5)]
    assert given == [names[k % len(names)] if names else None for k in range(5)]
