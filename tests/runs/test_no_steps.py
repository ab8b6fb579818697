"""`prune METHOD --steps 0`: pruned once and not trained, an ordinary run; the same mechanism as prune_once."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import same, tiny
from sparsesoup import METHODS, SparseGpt, UserError, Wanda, load_masks, prune_model, prune_once
from sparsesoup.cli.main import main
from sparsesoup.core.files import load_table
from sparsesoup.methods import TABLE, OneShot
from tiny_hub import run_of, weights_of
from tiny_objects import TRAIN, model_of

UNTRAINED = ["dense", "random", "magnitude", "snip", "grasp", "wanda", "sparsegpt", "one-shot-structured"]


@pytest.mark.parametrize("method", ["dense", "magnitude", "snip", "wanda", "sparsegpt"])
def test_a_run_without_training_is_an_ordinary_run(
    method: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["prune", method, "--model", str(place / "bert"), "--dataset", str(place / "reviews"), "--steps", "0"]
    line += [] if method == "dense" else ["--sparsity", "0.5"]
    line += ["--method.batches", "2"] if hasattr(METHODS[method], "batches") else []
    assert main([*line, "--train.batch-size", "8"]) == 0
    run = run_of(tmp_path / "runs")
    report, weights = load_table(run / "report.json"), weights_of(run / "model")
    assert report["steps"] == 0
    assert {label: cost["steps"] for label, cost in report["cost"].items() if cost["steps"]} == {}
    assert report["sparsity"]["kept"] == (4096 if method == "dense" else 2048)
    assert (run / "report.html").stat().st_size > 9_000
    assert main(["show", str(run)]) == 0
    assert "head is randomly initialised and not trained" in " ".join(capsys.readouterr().out.split())
    before = weights_of(place / "bert")
    for name, mask in load_masks(run)[0].items():
        old = before[name.removeprefix("bert.")] if name not in before else before[name]
        assert torch.equal(weights[name] * ~mask, torch.zeros_like(old))
        assert torch.equal(weights[name], old * mask) == (method != "sparsegpt")
    assert main([*line, "--train.batch-size", "8"]) == 0  # is read
    assert main([*line, "--train.batch-size", "8", "--dry-run"]) == 0
    assert "T = 0: 0 steps" in capsys.readouterr().out


def test_methods_that_need_training_refuse_it_in_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in TABLE if name not in (*UNTRAINED, "ticket")]:
        with pytest.raises(UserError, match="0 steps are too few") as caught:
            METHODS[name].run(tiny(steps=0), 0.0 if TABLE[name].dense else 0.5)
        assert "\n" not in str(caught.value)
    line = ["prune", "isp", "--model", str(place / "bert"), "--dataset", str(place / "reviews"), "--steps", "0"]
    assert main(line) == 2
    assert capsys.readouterr().err.splitlines()[-1].count("0 steps are too few") == 1
    assert not [*(tmp_path / "runs").rglob("report.json")]
    with pytest.raises(UserError, match="isp does not prune without training"):
        prune_once(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), [torch.randn(4, 8)], "isp")


def test_a_ticket_is_put_on_without_training_but_not_pruned_further(tmp_path: Path) -> None:
    run = prune_model("magnitude", model_of(), TRAIN, sparsity=0.5, steps=0, progress=False).save(tmp_path / "half")
    method: Any = METHODS["ticket"]
    given = type(method)(ticket=str(run))
    found = prune_model(given, model_of(), TRAIN, steps=0, progress=False)
    assert same(found.masks, load_masks(run)[0])
    with pytest.raises(UserError, match="0 steps are too few to prune the ticket further"):
        prune_model(given, model_of(), TRAIN, sparsity=0.7, steps=0, progress=False)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("magnitude", OneShot(scope="tensor")),
        ("random", OneShot(score="random", scope="tensor")),
        ("wanda", Wanda(inputs="pruned", batches=3)),
        ("sparsegpt", SparseGpt(batches=3)),
    ],
)
def test_prune_once_is_a_run_without_steps(name: str, method: Any) -> None:
    """The batches are those of the run: rows in its own order of calibration."""
    from sparsesoup import TrainingConfig

    rows = TRAIN.select(range(24))
    found = prune_model(
        method, model_of(), rows, sparsity=0.5, steps=0, train=TrainingConfig(batch_size=8), progress=False
    )
    model = model_of()
    batch = {key: torch.tensor(rows[key]) for key in ("input_ids", "attention_mask", "token_type_ids", "labels")}
    masks = prune_once(model, [{key: t[i : i + 8] for key, t in batch.items()} for i in (0, 8, 16)], name, 0.5)
    assert all(2 * int(mask.sum()) == mask.numel() for mask in masks.values())
    agree = sum(int((masks[n] == found.masks[n]).sum()) for n in masks) / sum(m.numel() for m in masks.values())
    assert agree > 0.999  # sums over rows in another order
    own = dict(found.model.named_parameters())
    for parameter, mask in ((p, masks[n] & found.masks[n]) for n, p in model.named_parameters() if n in masks):
        assert parameter.shape == mask.shape
    for name_, mask in masks.items():
        both = mask & found.masks[name_]
        assert torch.allclose(dict(model.named_parameters())[name_][both], own[name_][both], atol=1e-3)


def test_wanda_behind_pruned_blocks_needs_a_scope_within_a_matrix() -> None:
    with pytest.raises(UserError, match="scope row, tensor or N:M"):
        Wanda(inputs="pruned", scope="global")


def closed_form(w: Tensor, x: Tensor, keep: Tensor) -> Tensor:
    """The best weights of one row on a mask, least squares of the outputs, in float64."""
    wanted, inside = x.double() @ w.double(), x.double()[:, keep]
    found = torch.zeros_like(w, dtype=torch.float64)
    found[keep] = torch.linalg.lstsq(inside, wanted[:, None]).solution[:, 0]
    return found.float()


def test_an_update_of_the_rest_holds_its_masks_and_beats_pruning_alone() -> None:
    """A second-order method of another kind: prune by OBS saliency, update by the closed form, train on."""
    problem = tiny(steps=20)
    run, plain = problem.start_run(), copy.deepcopy(problem.start_run())
    seen: dict[str, Tensor] = {}
    first = next(iter(problem.targets))
    owner = run.model.get_submodule(first.rpartition(".")[0])
    handle = owner.register_forward_pre_hook(lambda module, given: seen.update(x=given[0].detach()))
    problem.predict(run.model, problem.train.batch(list(range(len(problem.train)))))
    handle.remove()
    weight, x = run.prunable_parameters()[first].detach().clone(), seen["x"]
    diagonal = torch.linalg.inv(x.T.double() @ x.double() + 1e-3 * torch.eye(x.shape[1])).diagonal()
    keep = torch.zeros_like(weight, dtype=torch.bool)
    keep.scatter_(1, (weight.square() / diagonal.float()).topk(weight.shape[1] // 2).indices, True)
    new = torch.stack([closed_form(row, x, kept) for row, kept in zip(weight, keep, strict=True)])
    run.prune_and_update_({first: keep}, {first: new})
    plain.set_masks_({**plain.masks, first: keep})

    def error(state: Any) -> float:
        return float(((state.prunable_parameters()[first].detach() - weight) @ x.T).square().sum())

    assert error(run) < 0.5 * error(plain)
    assert not bool(run.prunable_parameters()[first][~keep].any())
    assert all(bool(mask.all()) for name, mask in run.masks.items() if name != first)
    from sparsesoup.training.loop import train

    train(run, problem, 5)
    assert not bool(run.prunable_parameters()[first][~keep].any())


@pytest.mark.parametrize(
    ("masks", "weights", "says"),
    [
        ({"nothing": torch.ones(2, 2, dtype=torch.bool)}, {}, "the mask of nothing"),
        ({}, {"first": torch.ones(1, 1)}, r"first has shape \(1, 1\)"),
        ({}, {"first": torch.tensor(float("nan"))}, "has NaN or infinite values"),
    ],
)
def test_an_update_that_does_not_fit_changes_nothing(
    masks: dict[str, Tensor], weights: dict[str, Tensor], says: str
) -> None:
    problem = tiny(steps=4)
    state = problem.start_run()
    first, before = next(iter(problem.targets)), copy.deepcopy(state.model.state_dict())
    shape = state.masks[first].shape
    given = dict.fromkeys([first], weights["first"].expand(shape)) if says.startswith("has NaN") else weights
    with pytest.raises(UserError, match=says):
        state.prune_and_update_(masks, given)
    assert same(state.model.state_dict(), before)
    assert all(bool(mask.all()) for mask in state.masks.values())
