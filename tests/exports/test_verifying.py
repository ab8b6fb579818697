"""An export is asked in a fresh process for the whole test split, and what it says is told as it is."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

from sparsesoup import evaluate_on_test, export
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.core.ticket import save_masks
from sparsesoup.exports import subprocess_runner as alone
from sparsesoup.exports.runtimes import EXTRAS
from sparsesoup.exports.source import masks_from_zeros
from sparsesoup.exports.verify import SubprocessModel, _compare_predictions
from sparsesoup.hub.models.checkpoint import quiet_transformers
from test_export import command, refused
from tiny_hub import run_of
from tiny_models import model_of


def prune(out: Path, *words: object) -> Path:
    assert main(["prune", *map(str, words), "--out", str(out)]) == 0
    return run_of(out)


@pytest.fixture(scope="module")
def run(place, tmp_path_factory) -> Path:
    """A run in heads and units."""
    words = ("--model", place / "bert", "--dataset", place / "reviews", "--steps", 150, "--sparsity", 0.7)
    return prune(tmp_path_factory.mktemp("runs"), "hybrid-movement", *words, "--method.attention", "heads")


FORMATS = [
    (("dense",), 0, True),
    (("packed", "--dtype", "bf16"), 0.1, False),
    (("compact",), 1e-5, False),
    (("onnx",), 1e-5, True),
    (("openvino",), 1e-5, True),
]


@pytest.mark.parametrize(("words", "tolerance", "alone"), FORMATS, ids=["-".join(case[0]) for case in FORMATS])
def test_every_export_predicts_the_whole_test_split_as_the_run_does(run, words, tolerance, alone, tmp_path, capsys):
    assert command(run, "--to", *words, "--out", tmp_path / "out", "--verify") == 0
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    found = facts["verified"]
    assert (found["rows"], found["same"]) == (24, 24)  # all rows of test.csv
    assert found["largest_difference"] <= tolerance
    assert (found["largest_difference"] > 0) == bool(tolerance)
    assert found["scores"] == found["scores_of_source"] == evaluate_on_test(run)
    assert found["without_sparsesoup"] == alone
    assert ("sparsesoup." in facts["load"]) != alone
    said = " ".join(capsys.readouterr().out.split())
    assert "24 of 24 predictions on the test split are those of the source" in said
    assert ("in a fresh process without sparsesoup" in said) == alone


def test_spans_are_compared_too(place, tmp_path):
    words = ("--model", place / "distilbert", "--dataset", place / "asked", "--steps", 2, "--sparsity", 0.5)
    source = prune(tmp_path / "runs", "magnitude", *words)
    found = export(source, "dense", tmp_path / "out", verify=True).facts["verified"]
    assert found["rows"] == found["same"] > 0
    assert found["largest_difference"] == 0
    assert found["scores"] == evaluate_on_test(source)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ([[1.0, 2.0], [3.0, 0.0]], [[0.0, 2.5], [1.0, 1.1]], 1),  # classes: the second row has another
        ([[1.0], [2.0], [3.0]], [[1.0005], [2.5], [3.0]], 2),  # numbers
        ([[[1.0, 2.0], [0.0, 5.0]], [[1.0, 2.0], [0.0, 5.0]]], [[[1.0, 2.0], [0.0, 5.0]], [[1.0, 2.0], [6.0, 5.0]]], 1),
    ],
)
def test_predictions_that_differ_are_counted(one, other, same):
    found = _compare_predictions(({"f1": 0.5}, torch.tensor(one)), ({"f1": 0.6}, torch.tensor(other)))
    assert (found["rows"], found["same"]) == (len(one), same)
    assert found["largest_difference"] == float((torch.tensor(one) - torch.tensor(other)).abs().max())
    assert (found["scores_of_source"], found["scores"]) == ({"f1": 0.5}, {"f1": 0.6})


def test_a_model_whose_data_are_not_known_is_refused_before_it_is_exported(tmp_path, capsys):
    model = model_of("bert", dtype=torch.float32)
    with quiet_transformers():
        model.save_pretrained(tmp_path / "source")
    save_masks(tmp_path / "source" / "pruning", masks_from_zeros(model), {})
    said = refused(capsys, tmp_path, tmp_path / "source", "--to", "dense", "--out", tmp_path / "new", "--verify")
    assert "it is not known what data" in said


def test_two_of_four_cannot_be_asked_on_the_cpu_and_nothing_is_written(run, tmp_path, capsys):
    said = refused(capsys, tmp_path, run, "--to", "semi-structured", "--out", tmp_path / "out", "--verify")
    assert "verify --to dense" in said


def test_an_export_that_does_not_load_is_told_in_one_line(run, tmp_path):
    written = export(run, "dense", tmp_path / "out")
    shutil.copy(written.path / "config.json", written.path / "model.safetensors")
    with pytest.raises(UserError, match=r"does not answer in a fresh process: .*[Ee]rror"):
        SubprocessModel(written.path, written.facts["load"])


def test_a_line_may_name_what_lies_deep_in_a_package(tmp_path, monkeypatch):
    (tmp_path / "graphs_of_mine" / "deep").mkdir(parents=True)
    for name, text in (
        ("__init__", ""),
        ("deep/__init__", ""),
        ("deep/inner", "def load(folder): raise OSError(folder)"),
    ):
        (tmp_path / "graphs_of_mine" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OSError, match=r"^\.$"):
        alone.load_from_line("graphs_of_mine.deep.inner.load(folder)")


def test_every_optional_library_is_in_the_extra_that_is_named_and_pinned():
    root = Path(__file__).parents[2]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, extra in EXTRAS.items():
        assert any(line.startswith(f"{name}>=") for line in listed[extra]), name
        assert f"\n{name}==" in (root / "constraints.txt").read_text()
