"""An export is asked in a fresh process for the whole test split, and what it says is told as it is."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from sparsesoup import evaluate_on_test, export, load_compact, load_packed, push
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.exports import subprocess_runner
from sparsesoup.exports.runtimes import EXTRAS
from sparsesoup.exports.verify import _compare_predictions, model_in_subprocess
from sparsesoup.hub.models.dummy_inputs import dummy_inputs, forward_outputs
from tiny_exports import close, export_command, refused, saved, stock
from tiny_hub import run_of
from tiny_models import model_of

pytestmark = pytest.mark.integration


def prune(out: Path, *words: object) -> Path:
    assert main(["prune", *map(str, words), "--out", str(out)]) == 0
    return run_of(out)


@pytest.fixture(scope="module")
def run(place, tmp_path_factory) -> Path:
    """A run in heads and units whose test split was not opened."""
    words = ("--model", place / "bert", "--dataset", place / "reviews", "--steps", 150, "--sparsity", 0.7)
    return prune(tmp_path_factory.mktemp("runs"), "hybrid-movement", *words, "--method.attention", "heads")


@pytest.fixture(scope="module")
def spans(place, tmp_path_factory) -> Path:
    """A run on questions."""
    words = ("--model", place / "distilbert", "--dataset", place / "questions", "--steps", 2, "--sparsity", 0.5)
    return prune(tmp_path_factory.mktemp("spans"), "magnitude", *words)


@pytest.fixture(scope="module")
def opened(run, spans, tmp_path_factory):
    """Scores of copies of the runs on the test split."""
    folder = tmp_path_factory.mktemp("opened")
    return {
        name: evaluate_on_test(shutil.copytree(each, folder / name)) for name, each in (("run", run), ("spans", spans))
    }


FORMATS = [
    ("spans", ("dense",), 0, True),
    ("run", ("packed", "--dtype", "bf16"), 0.1, False),
    ("run", ("compact",), 1e-5, False),
    ("run", ("onnx",), 1e-5, True),
    ("run", ("openvino",), 1e-5, True),
]


@pytest.mark.parametrize(("source", "words", "tolerance", "alone"), FORMATS, ids=["-".join(c[1]) for c in FORMATS])
def test_every_export_predicts_the_whole_test_split_as_the_run_does(
    source, words, tolerance, alone, opened, tmp_path, capsys, request
):
    """Classes and spans; what was verified is on the card, with masks where they are."""
    run, out, rows = request.getfixturevalue(source), tmp_path / "out", {"run": 24, "spans": 12}[source]
    assert export_command(run, "--to", *words, "--out", out, "--verify") == 0
    facts = json.loads((out / "export.json").read_text())
    found = facts["verified"]
    assert (found["rows"], found["same"]) == (rows, rows)  # of test.csv, or of validation.jsonl
    assert found["largest_difference"] <= tolerance
    if words[0] == "packed":  # its weights are rounded; others may be equal to the bit, by CPU
        assert found["largest_difference"] > 0
    assert found["scores"] == found["scores_of_source"] == opened[source]
    assert found["without_sparsesoup"] == alone
    assert ("sparsesoup." in facts["load"]) != alone
    said = " ".join(capsys.readouterr().out.split())
    assert f"{rows} of {rows} predictions on the test split are those of the source" in said
    assert ("in a fresh process without sparsesoup" in said) == alone
    config = json.loads((out / "config.json").read_text())["pruning_config"]
    assert "method" in config
    masks = (out / "pruning" / "masks.safetensors").is_file()
    assert ("masks" in config) == masks == (words[0] in ("dense", "compact"))
    push(out, "me/tiny", out=tmp_path / "upload")
    card = ModelCard.load(tmp_path / "upload" / "README.md")
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == opened[source]
    assert {r.dataset_split for r in card.data.eval_results} == {*found["test_splits"].values()}
    assert found["test_splits"] == {"test": "test" if source == "run" else "validation"}
    assert "had not been scored" not in card.text


def test_a_run_in_heads_and_units_is_exported_in_every_form_of_torch(run, tmp_path, capsys):
    model = stock(run / "model")
    batch = dummy_inputs(model)
    expected = [t.numpy() for t in forward_outputs(model, batch)]
    packed, compact = (export(run, to, tmp_path / to) for to in ("packed", "compact"))
    assert close([t.numpy() for t in forward_outputs(load_packed(packed.path), batch)], expected, 0)
    assert close([t.numpy() for t in forward_outputs(load_compact(compact.path), batch)], expected, 1e-5)
    assert compact.facts["source"]["method"] == "hybrid-movement"
    assert compact.facts["sizes"]["parameters"][1] < compact.facts["sizes"]["parameters"][0]
    copy = shutil.copytree(run, tmp_path / "seed-0")
    report = (copy / "report.json").rename(tmp_path / "report.json")
    said = refused(capsys, tmp_path, copy, "--to", "dense", "--out", tmp_path / "new")
    assert "seed-0 is not finished; repeat the `sparsesoup prune` command that started it" in said
    report.rename(copy / "report.json")
    shutil.rmtree(copy / "model" / "pruning")
    assert "no run and no export at" in refused(capsys, tmp_path, copy, "--to", "dense", "--out", tmp_path / "new")


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
    source = saved(tmp_path / "source", model)
    said = refused(capsys, tmp_path, source, "--to", "dense", "--out", tmp_path / "new", "--verify")
    assert "it is not known what data" in said


def test_two_of_four_cannot_be_asked_on_the_cpu_and_nothing_is_written(run, tmp_path, capsys):
    said = refused(capsys, tmp_path, run, "--to", "semi-structured", "--out", tmp_path / "out", "--verify")
    assert "verify --to dense" in said


@pytest.mark.parametrize(
    ("line", "told"),
    [('onnxruntime.InferenceSession("model.onnx")', ".*INVALID_PROTOBUF"), ("builtins.exit(folder)", r"\.$")],
)
def test_an_export_that_does_not_load_or_ends_is_told_in_one_line(line, told, tmp_path):
    (tmp_path / "model.onnx").write_text("no graph")
    with (
        pytest.raises(UserError, match=rf"does not answer in a fresh process: {told}"),
        model_in_subprocess(tmp_path, line),
    ):
        pass


def test_a_process_that_ends_between_two_batches_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "brittle.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def forward(self, x, return_dict):\n"
        "        if len(x) > 1: raise MemoryError('too many rows')\n"
        "        return {'y': 2 * x}\n"
        "def load(folder): return Model()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with model_in_subprocess(tmp_path, "brittle.load(folder)") as (ask, ours):
        assert not ours
        assert ask(x=torch.ones(1, 2)).y.tolist() == [[2, 2]]
        with pytest.raises(UserError, match="does not answer in a fresh process: MemoryError: too many rows"):
            ask(x=torch.ones(2, 500_000))


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
        subprocess_runner.load_from_line("graphs_of_mine.deep.inner.load(folder)")


def test_every_optional_library_is_in_the_extra_that_is_named_and_pinned():
    root = Path(__file__).parents[2]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, extra in EXTRAS.items():
        assert any(line.startswith(f"{name}>=") for line in listed[extra]), name
        assert f"\n{name}==" in (root / "constraints.txt").read_text()
