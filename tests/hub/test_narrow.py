"""A compact model is a model to start from: it is trained, scored, pruned on and exported again, its head kept."""

import json
from pathlib import Path

import pytest
import torch

from conftest import same
from sparsesoup import evaluate_on_test, export, load_compact, prune
from sparsesoup.cli.main import main
from sparsesoup.core.targets import attention_head_groups, feed_forward_groups
from sparsesoup.core.ticket import load_masks, save_masks
from sparsesoup.exports.source import masks_from_zeros
from sparsesoup.hub.build import ModelAndDataConfig, build_problem, open_task
from sparsesoup.hub.models.cut_layers import layer_widths
from sparsesoup.hub.models.dummy_inputs import dummy_inputs, forward_outputs
from sparsesoup.hub.models.loading import load_model
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.hub.quiet import quiet_libraries
from sparsesoup.hub.tasks.registry import infer_task
from sparsesoup.hub.tasks.splits import open_splits
from tiny_hub import reviews, tokenizer
from tiny_models import HEADS, UNITS, killed, model_of

pytestmark = pytest.mark.integration

PLAN = {"heads": [["stays", "out", "in", "stays"], ["in"] * HEADS], "units": [["in"] * UNITS, ["stays", "out"] * 3]}
WIDTHS = [{"heads": 2, "units": 0}, {"heads": 0, "units": 3}, {"heads": HEADS, "units": UNITS}]


def exported(folder: Path, family: str) -> Path:
    """A compact classifier on the disk, with its tokenizer, one layer without heads and one without units."""
    model = killed(model_of(family, dtype=torch.float32), PLAN)
    model.config.problem_type = "single_label_classification"
    with quiet_libraries():
        model.save_pretrained(folder / "pruned")
    tokenizer(family in ("bert", "electra")).save_pretrained(folder / "pruned")
    save_masks(folder / "pruned" / "pruning", masks_from_zeros(model), {"method": "magnitude"})
    return export(folder / "pruned", "compact", folder / "compact").path


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
def test_a_compact_model_is_loaded_to_be_trained_with_its_widths_and_its_head(family: str, tmp_path: Path) -> None:
    folder = exported(tmp_path, family)
    source = open_splits(str(reviews(tmp_path / "reviews")))
    task = infer_task(source.train_split, source.name, None, None)
    one, other = (load_model(str(folder), task, seed) for seed in (0, 1))
    assert [*layer_widths(one).values()] == WIDTHS
    assert same(one.state_dict(), other.state_dict())  # no head was drawn from the seed
    plain = load_compact(folder)
    assert same(one.state_dict(), plain.state_dict())
    assert type(one) is type(plain)
    batch = dummy_inputs(one)
    assert all(
        a.equal(b) for a, b in zip(forward_outputs(one.eval(), batch), forward_outputs(plain, batch), strict=True)
    )
    targets = find_prunable(one)
    shapes = {name: target.shape for name, target in targets.items()}
    assert [tie.num_groups(shapes) for tie in attention_head_groups(targets)] == [2, HEADS]
    assert [tie.num_groups(shapes) for tie in feed_forward_groups(targets)] == [3, UNITS]


def test_the_whole_way_from_a_run_to_a_compact_model_and_on_to_a_smaller_one(place: Path, tmp_path: Path) -> None:
    """By the command line: prune in groups, export, prune the export on, score it, export it again."""
    data = ["--dataset", str(place / "reviews"), "--seed", "3"]
    first = ["--model", str(place / "bert"), "--steps", "30", "--sparsity", "0.4", "--out", str(tmp_path / "first")]
    structure = ["--method.structure", "heads-and-units"]
    assert main(["prune", "magnitude", *data, *first, *structure]) == 0
    (run,) = (tmp_path / "first").glob("*/*/seed-3")
    small = export(run, "compact", tmp_path / "small").path
    second = ["--model", str(small), "--steps", "40", "--sparsity", "0.3", "--out", str(tmp_path / "second")]
    assert main(["prune", "gradual", *data, *second, *structure, "--train.distill.teacher", str(run)]) == 0
    (run,) = (tmp_path / "second").glob("*/gradual-*/seed-3")
    problem = build_problem(
        place_ := ModelAndDataConfig(model=str(run), dataset=str(place / "reviews"), seed=3), open_task(place_), steps=1
    )
    assert problem.validate(problem.pretrained) == json.loads((run / "report.json").read_text())["validation"]
    _, facts = load_masks(run)
    assert facts["sparsity"]["reached"] >= 0.3
    assert evaluate_on_test(run) is not None
    smaller = export(run, "compact", tmp_path / "smaller").path
    before, after = (sum(p.numel() for p in load_compact(folder).parameters()) for folder in (small, smaller))
    assert after < before
    one, other = load_compact(smaller), load_model(str(run), open_task(place_).task, 3).eval()
    batch = dummy_inputs(one)
    assert all(
        torch.allclose(a, b, atol=1e-5)
        for a, b in zip(forward_outputs(one, batch), forward_outputs(other, batch), strict=True)
    )


def test_a_layer_without_heads_and_one_without_units_are_trained_like_the_others(tmp_path: Path) -> None:
    folder = exported(tmp_path, "bert")
    reviews(tmp_path / "reviews")
    run = prune("dense", model=str(folder), dataset=str(tmp_path / "reviews"), steps=4, out=tmp_path, progress=False)
    before, after = load_compact(folder).state_dict(), load_compact(run.path / "model").state_dict()
    assert before.keys() == after.keys()
    moved = {name.split("layer.")[1] for name, t in after.items() if "layer." in name and not t.equal(before[name])}
    assert {"0.output.dense.bias", "1.attention.output.dense.bias", "2.attention.self.query.weight"} <= moved
    assert run.report["sparsity"]["total"] == sum(t.numel() for n, t in before.items() if n in prunable_names(folder))
    again = load_compact(export(run.path, "compact", tmp_path / "again").path)
    assert same(again.state_dict(), after)


def prunable_names(folder: Path) -> set[str]:
    return {*find_prunable(load_compact(folder))}
