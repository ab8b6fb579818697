"""The front door: the names of `import sparsesoup`, methods as objects, and what other packages add."""

import ast
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sparsesoup
from sparsesoup import (
    METHODS,
    GradualPruning,
    InstantSoup,
    MethodInfo,
    OneShot,
    TrainingConfig,
    UserError,
    compare,
    prune,
)
from sparsesoup.cli.main import main
from sparsesoup.core.granularity import Block
from sparsesoup.core.plugins import load_plugins
from sparsesoup.methods import TABLE, row_of
from sparsesoup.training.config import DistillConfig
from tiny_hub import offline, sentences, write_rows

ROOT = Path(__file__).parents[2]
HOME = Path(sparsesoup.__file__)
SHORT = {"model": "bert", "dataset": "reviews", "sparsity": 0.5, "steps": 40, "progress": False}
TRAIN = TrainingConfig(batch_size=8, learning_rate=3e-3)


def test_every_public_name_is_there_typed_and_offered_for_completion() -> None:
    typed = {
        alias.name
        for node in ast.walk(ast.parse(HOME.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("sparsesoup.")
        for alias in node.names
        if alias.name == alias.asname
    }
    assert typed == {*sparsesoup.__all__} - {"__version__"}
    assert {*sparsesoup.__all__} <= {*dir(sparsesoup)}
    assert not {"Any", "import_module"} & {*dir(sparsesoup)}
    assert all(getattr(sparsesoup, name) is not None for name in sparsesoup.__all__)
    assert sparsesoup.__version__
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        sparsesoup.prun  # noqa: B018
    for method in METHODS.values():
        assert type(method).__name__ in sparsesoup.__all__


def test_a_method_as_an_object_is_the_run_of_its_name_and_settings(place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    own = {"stages": 2, "weak_masks": 2, "look_ahead": 0.05}
    one = prune(InstantSoup(**own), train=TRAIN, out=tmp_path, **SHORT)
    other = prune("isp", method=own, train={"batch_size": 8, "learning_rate": 3e-3}, out=tmp_path, **SHORT)
    assert one.path == other.path
    with pytest.raises(UserError, match="put the settings into the method"):
        prune(InstantSoup(), method=own, out=tmp_path, **SHORT)


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("gradual", {"train": GradualPruning()}, "^train: must be a TrainingConfig, or a table"),
        ("gradual", {"method": "isp"}, "^method: must be a table of settings, got 'isp'"),
        (InstantSoup, {}, "a method is a name such as 'isp', or an object such as"),
    ],
)
def test_wrong_settings_of_objects_are_refused_before_anything_runs(name, more, said, objects) -> None:
    for own in ({"model": "minilm"}, objects):
        with pytest.raises(UserError, match=said):
            prune(name, sparsity=0.5, steps=4, **own, **more)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: OneShot(score="abs"), "^score: expected one of magnitude, .*, got 'abs'"),
        (lambda: GradualPruning(scope="globl"), "^scope: expected one of global"),
        (lambda: GradualPruning(start="early"), "^start: expected a number, got 'early'"),
        (lambda: InstantSoup(stages="many"), "^stages: expected a whole number, got 'many'"),
        (lambda: TrainingConfig(learning_rate="high"), "^learning_rate: expected a number, got 'high'"),
        (lambda: TrainingConfig(precision="fp8"), "^precision: expected one of"),
        (lambda: TrainingConfig(batch_size=2.5), "^batch_size: expected a whole number"),
        (lambda: TrainingConfig(optimizer="adamm"), "^optimizer: expected one of"),
        (lambda: TrainingConfig(distill="dense"), "^distill: expected a table of teacher"),
        (lambda: TrainingConfig(distill={"alpha": "much"}), "^distill.alpha: expected a number, got 'much'"),
        (lambda: Block(rows="two"), "^rows: expected a whole number, got 'two'"),
    ],
)
def test_a_value_of_another_type_is_refused_when_the_object_is_made(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


def test_a_value_is_of_the_type_of_its_setting_however_it_is_given() -> None:
    made = TrainingConfig(learning_rate=1, distill={"teacher": "dense"}, batch_size=np.int64(8))
    assert made == TrainingConfig(learning_rate=1.0, distill=DistillConfig(teacher="dense"), batch_size=8)
    assert [type(made.learning_rate), type(made.batch_size)] == [float, int]


def test_a_method_keeps_the_name_that_it_was_called_by(objects) -> None:
    found = prune("imp-rewind", method={"rewind": 0.0}, sparsity=0.5, steps=20, **objects)
    assert found.method == found.report["method"] == "imp-rewind"


@pytest.fixture
def objects() -> dict[str, Any]:
    """A module, rows and a loss."""
    model, rows = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), [*torch.randn(32, 4)]
    return {
        "model": model,
        "train_dataset": rows,
        "loss": lambda model, batch: model(batch[0]).square().mean(),
        "progress": False,
    }


@pytest.mark.parametrize("name", METHODS)
def test_the_default_of_a_row_is_found_under_its_name(name: str) -> None:
    assert row_of(METHODS[name]) == name


def test_a_study_is_run_from_a_table(place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    recipe = {
        "models": "bert", "datasets": "reviews", "sparsities": 0.5, "seeds": 0, "steps": 20,
        "train": {"batch_size": 8}, "methods": ["dense", "magnitude"],
    }  # fmt: skip
    found = compare(recipe, out=tmp_path, progress=False)
    assert [cell["row"] for cell in found.facts["runs"]] == ["dense", "magnitude"]
    assert (found.path / "study.html").is_file()
    assert f"--config {found.path / 'study.yaml'}" in found.facts["command"]  # which is there
    with pytest.raises(UserError, match=r"^methods\.magnitud: unknown method 'magnitud'"):
        compare(recipe | {"methods": ["magnitud"]}, out=tmp_path, progress=False)


PLUGIN = '''
from dataclasses import dataclass
from functools import partial
from sparsesoup import Method, MethodInfo, Phase

@dataclass(frozen=True, kw_only=True)
class Halves(Method):
    """Prune half of it, train, prune the rest.

    Args:
        first: share pruned at once.
    """

    first: float = 0.5

    def plan(self, size, sparsity):
        phases = []
        for number, goal in enumerate((self.first * sparsity, sparsity)):
            phases.append(Phase(name=f"prune-{number}", end=partial(self._prune, goal)))
            phases.append(Phase(name=f"train-{number}", steps=size.steps // 2))
        return phases

    def _prune(self, goal, run):
        run.state.set_masks_(self.select_masks(run.state, goal, within=run.state.masks))

ROW = MethodInfo(method=Halves(), family="own", score="|w|", summary="in two halves")
'''


PLANLESS = """
from dataclasses import dataclass
from sparsesoup.methods import Method, MethodInfo

@dataclass(frozen=True)
class Planless(Method):
    def run(self, problem, sparsity):
        return None

ROW = MethodInfo(method=Planless(), family="x", score="x", summary="x")
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A folder with an installed package that adds a method."""
    return installed(tmp_path / "site", "halves", PLUGIN, "[sparsesoup.methods]\nhalves = halves:ROW\n")


def installed(folder: Path, name: str, code: str, points: str) -> Path:
    """A folder with an installed package of one module and these entry points."""
    facts = folder / f"{name}-1.0.dist-info"
    facts.mkdir(parents=True)
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (facts / "entry_points.txt").write_text(points, encoding="utf-8")
    return folder


def run_with(
    folder: Path, *words: object, cwd: Path, start: tuple[str, ...] = ("-m", "sparsesoup")
) -> subprocess.CompletedProcess[str]:
    """The command line, or something else, with a folder of installed packages more."""
    environment = offline()
    environment["PYTHONPATH"] = f"{folder}:{environment.get('PYTHONPATH', '')}"
    line = [sys.executable, *start, *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


CALLS = """
import json, sys
from sparsesoup.cli.main import main
print(json.dumps([main(words) for words in json.loads(sys.argv[1])]))
"""


@pytest.mark.integration
def test_a_method_and_a_task_of_other_packages_work_like_ours(plugin: Path, place: Path, tmp_path: Path) -> None:
    """The task is the guide's own example: a file, one line."""
    guide = (ROOT / "docs" / "guides" / "extend.md").read_text(encoding="utf-8")
    code = next(block.split("```")[0] for block in guide.split("```python\n") if "class Tagging" in block)
    installed(plugin, "tagging", code, "[sparsesoup.tasks]\ntagging = tagging:TAGGING\n")
    for split, count in (("train", 80), ("test", 20)):
        rows = [(text, ["long"] * (len(text) > 40) + ["good"] * label) for text, label in sentences(count, count)]
        write_rows(tmp_path / "tagged" / f"{split}.jsonl", ("text", "tags"), rows)
    write_rows(tmp_path / "wrong" / "train.jsonl", ("text", "tags"), [*rows, ("so it goes", None)])
    recipe = tmp_path / "study.yaml"
    recipe.write_text(
        f"models: {place / 'bert'}\ndatasets: {tmp_path / 'tagged'}\nmethods: [dense, halves]\nsteps: 150\n"
        "seeds: 0\nsparsities: 0.5\ntrain: {batch_size: 8, learning_rate: 0.003}\n"
    )
    tagged, wrong = (
        ["--model", str(place / "bert"), "--dataset", str(tmp_path / name), "--out", str(tmp_path / "more")]
        for name in ("tagged", "wrong")
    )
    calls = [
        ["methods"],
        ["compare", "--config", str(recipe), "--out", str(tmp_path / "runs")],
        ["prune", "halves", *tagged, "--steps", "4", "--sparsity", "0.5", "--method.first", "0.25"],
        ["prune", "halves", "--method.frist", "1"],
        ["prune", "dense", *wrong, "--steps", "1"],
    ]
    done = run_with(plugin, json.dumps(calls), cwd=tmp_path, start=("-c", CALLS))
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 0, 0, 2, 2], done.stderr
    assert "\nhalves " in done.stdout
    assert "data: 2 tags in column tags from column text" in done.stderr
    refusals = done.stderr.splitlines()[-2:]
    assert "--method.first" in refusals[0]
    assert "row 20 has None" in refusals[1]
    (alone,) = (tmp_path / "more").glob("*/halves-*/seed-0")
    assert (alone / "report.html").is_file()
    (run,) = (tmp_path / "runs").rglob("halves-*/seed-0")
    report = json.loads((run / "report.json").read_text())
    assert report["task"] == "2 tags in column tags from column text"
    assert 0.6 < report["test"]["micro_f1"] <= 1
    assert "micro_f1" in (run / "report.html").read_text()
    config = json.loads((run / "model" / "config.json").read_text())
    assert (config["problem_type"], config["id2label"]["0"]) == ("multi_label_classification", "good")
    assert main(["prune", "dense", *tagged, "--steps", "1"]) == 2  # not without the plugin


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("halves = halves:NONE", "cannot be imported"),
        ("halves = halves:Halves", "is a type, where a MethodInfo is needed"),
        ("isp = halves:ROW", "a name in use"),
        ("idle = planless:ROW", r"planless:ROW .* Planless\(\) is no method: .* a plan\(size, sparsity\) is needed"),
    ],
)
def test_a_plugin_that_is_none_is_refused(plugin: Path, entry: str, said: str, monkeypatch) -> None:
    points = plugin / "halves-1.0.dist-info" / "entry_points.txt"
    points.write_text(f"[sparsesoup.methods]\n{entry}\n", encoding="utf-8")
    (plugin / "planless.py").write_text(PLANLESS, encoding="utf-8")
    monkeypatch.syspath_prepend(plugin)
    with pytest.raises(UserError, match=said) as caught:
        load_plugins("sparsesoup.methods", MethodInfo, TABLE)
    assert "\n" not in str(caught.value)


@pytest.mark.integration
def test_a_wrong_plugin_is_one_line_on_the_command_line(plugin: Path, place: Path) -> None:
    points = plugin / "halves-1.0.dist-info" / "entry_points.txt"
    points.write_text("[sparsesoup.methods]\nhalves = halves:NONE\n", encoding="utf-8")
    done = run_with(plugin, "methods", cwd=place)
    assert done.returncode == 2, done.stderr
    assert "cannot be imported" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.integration
def test_the_first_help_needs_no_module_that_unix_alone_has(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules.update(fcntl=None, resource=None)"
    for words in (["--help"], ["compare", "--help"]):
        code = f"{hidden}; import sparsesoup; from sparsesoup.cli.main import main; sys.exit(main({words}))"
        line = [sys.executable, "-c", code]
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=offline(), check=False)
        assert done.returncode == 0, done.stderr


def test_no_method_has_a_name_of_two_rows() -> None:
    assert len({id(row.method) for row in TABLE.values()}) == len(TABLE)


@pytest.mark.parametrize("module", ["sparsesoup", "sparsesoup.cli"])
def test_python_m_runs_the_command_line(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not ended.value.code
    assert "prune" in capsys.readouterr().out
