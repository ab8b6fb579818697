"""Exports of low rank: exact for what pela leaves, stated where not, merged back, pruned on, refused elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsesoup import export, load_low_rank, load_packed
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.core.low_rank import merge_layers_, rank_at, split_layers_
from sparsesoup.hub.models.dummy_inputs import dummy_inputs, forward_outputs
from sparsesoup.hub.models.prunable import find_prunable
from tiny_exports import pruned, refused, saved, stock
from tiny_hub import run_of
from tiny_models import model_of


def of_rank(folder: Path, name: str, compression: float = 1.5) -> Path:
    """The folder of a model whose matrices have the ranks that pela leaves."""
    model = model_of(name, dtype=torch.float32)
    names = {n.removesuffix(".weight"): rank_at(t.shape, compression) for n, t in find_prunable(model).items()}
    split_layers_(model, names)
    merge_layers_(model, names)
    return saved(folder, model, method="pela", model=name, seed=0)


def apart(one: Any, other: Any) -> float:
    batch = dummy_inputs(one)
    pairs = zip(forward_outputs(one, batch), forward_outputs(other, batch), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_an_export_of_low_rank_answers_as_the_model_and_merges_back(name: str, tmp_path: Path) -> None:
    source = of_rank(tmp_path / "source", name)
    before, thin = stock(source), export(source, "low-rank", tmp_path / "thin")
    model = load_low_rank(thin.path)
    assert apart(model, before) < 1e-4
    facts = thin.facts["low_rank"]
    targets = find_prunable(before)
    assert facts["left"] == sum(rank_at(t.shape, 1.5) * sum(t.shape) for t in targets.values())
    assert facts["left"] == sum(model.get_parameter(n).numel() for n in find_prunable(model))
    whole, left = thin.facts["sizes"]["parameters"]
    assert whole - left == facts["weights"] - facts["left"]
    merged = export(thin.path, "dense", tmp_path / "merged")
    assert apart(stock(merged.path), before) < 1e-4
    assert "low_rank_config" not in json.loads((merged.path / "config.json").read_text())
    packed = export(thin.path, "packed", tmp_path / "packed")
    assert apart(load_packed(packed.path), model) == 0.0


def test_a_compression_that_is_asked_for_changes_the_answers_and_says_so(tmp_path: Path) -> None:
    source = pruned(tmp_path / "source", "bert")
    thin = export(source, "low-rank", tmp_path / "thin", compression=2.0)
    assert apart(load_low_rank(thin.path), stock(source)) > 1e-3
    assert any("no longer those of the source" in note for note in thin.facts["notes"])
    assert any("zeros" in note and "are gone" in note for note in thin.facts["notes"])
    assert thin.facts["low_rank"]["removed"] >= 0.5


@pytest.mark.parametrize("to", ["compact", "semi-structured", "low-rank"])
def test_what_cannot_be_made_of_it_is_refused_in_one_line(to: str, tmp_path: Path) -> None:
    thin = export(of_rank(tmp_path / "source", "bert"), "low-rank", tmp_path / "thin")
    with pytest.raises(UserError, match="low rank") as caught:
        export(thin.path, to, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_model_of_full_rank_is_refused_unless_a_compression_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path / "source", model_of("bert", dtype=torch.float32), method="dense")
    said = refused(capsys, tmp_path, source, "--to", "low-rank", "--out", tmp_path / "out")
    assert "no matrix is of low rank" in said
    with pytest.raises(UserError, match="no layers of low rank"):
        load_low_rank(source)


@pytest.mark.integration
def test_a_run_of_pela_is_exported_and_pruned_on_under_masks(place: Path, tmp_path: Path) -> None:
    line = [
        "--dataset",
        str(place / "reviews"),
        "--steps",
        "6",
        "--train.batch-size",
        "8",
        "--out",
        str(tmp_path / "runs"),
    ]
    assert main(["prune", "pela", "--model", str(place / "bert"), "--method.compression", "4", *line]) == 0
    run = run_of(tmp_path / "runs")
    report = json.loads((run / "report.json").read_text())
    assert report["notes"]["low_rank"]["compression"] == 4.0
    assert report["sparsity"]["kept"] == report["sparsity"]["total"]
    thin = export(run, "low-rank", tmp_path / "thin")
    assert thin.facts["low_rank"]["removed"] == pytest.approx(report["notes"]["low_rank"]["removed"])
    out = tmp_path / "again"
    assert main(["prune", "gradual", "--model", str(thin.path), "--sparsity", "0.5", *line[:-1], str(out)]) == 0
    again = run_of(out)
    model = load_low_rank(again / "model")
    weights = [model.get_parameter(name) for name in find_prunable(model)]
    assert sum(int((w == 0).sum()) for w in weights) == round(sum(w.numel() for w in weights) / 2)
