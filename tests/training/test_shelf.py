"""Trainings that runs have in common are done once, charged to each, and change no bit of any result."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import same, tiny
from processes import kill_after, start_command
from sparsesoup.cli.main import main
from sparsesoup.core import tensor_files
from sparsesoup.core.tensor_files import TensorFile
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods import METHODS
from sparsesoup.methods.imp import IterativeMagnitudePruning
from sparsesoup.methods.lottery_pools import LotteryPools
from sparsesoup.methods.one_shot import DenseFinetuning
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.cost import Cost
from sparsesoup.training.problem import Problem
from sparsesoup.training.train_cache import CachedTraining, TrainingCache
from tiny_hub import arguments, costs_of, log_of, masks_of, run_of, weights_of

pytestmark = pytest.mark.integration

STEPS = 20


class Counted:
    """A problem on a cache that counts the steps that were really trained."""

    def __init__(self, folder: Path | None, identity: str = "here", **changes: Any) -> None:
        self.trained = 0
        problem = tiny(steps=STEPS, **changes)
        plain = problem.criterion

        def criterion(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
            self.trained += torch.is_grad_enabled()
            return plain(outputs, batch)

        self.problem: Problem = replace(problem, criterion=criterion, cache=TrainingCache(folder, {"where": identity}))


def counts(ticket: Ticket) -> dict[str, dict[str, float]]:
    own = ("seconds", "shared")
    return {label: {k: v for k, v in cost.items() if k not in own} for label, cost in ticket.cost.items()}


def alike(one: Ticket, other: Ticket) -> bool:
    return (
        same(one.masks, other.masks)
        and same(one.weights, other.weights)
        and counts(one) == counts(other)
        and one.metrics == other.metrics
        and one.notes == other.notes
    )


@pytest.mark.parametrize(
    ("first", "second", "own"),
    [
        # (a run, one that follows, the steps that the second has to train itself)
        (("dense", 0.0), (IterativeMagnitudePruning(cut=0.5), 0.75), 2 * STEPS),
        (("dense", 0.0), (IterativeMagnitudePruning(cut=0.5, back="rate"), 0.5), STEPS),
        (
            (IterativeMagnitudePruning(cut=0.5, rewind=0.1), 0.75),
            (IterativeMagnitudePruning(cut=0.5, rewind=0.1), 0.9),
            2 * 18,
        ),
        (
            (IterativeMagnitudePruning(cut=0.5, rewind=0.1), 0.75),
            (LotteryPools(cut=0.5, rewind=0.1, beyond=1), 0.75),
            18,
        ),
        ((IterativeMagnitudePruning(cut=0.5), 0.75), (DenseFinetuning(), 0.0), 0),
        ((IterativeMagnitudePruning(cut=0.5), 0.75), (IterativeMagnitudePruning(cut=0.4), 0.75), 3 * STEPS),
        (
            (IterativeMagnitudePruning(cut=0.5, rewind=0.1), 0.5),
            (IterativeMagnitudePruning(cut=0.5, rewind=0.2), 0.5),
            4 + 2 * 16,
        ),
    ],
)
def test_what_two_runs_share_is_trained_once_and_charged_to_both(
    first: Any, second: Any, own: int, tmp_path: Path
) -> None:
    method, sparsity = first
    (METHODS[method] if isinstance(method, str) else method).run(Counted(tmp_path).problem, sparsity)
    alone, beside = Counted(None), Counted(tmp_path)
    plain, shared = (second[0].run(c.problem, second[1]) for c in (alone, beside))
    assert alike(plain, shared)
    assert beside.trained == own
    assert sum(cost["shared"] for cost in shared.cost.values()) == alone.trained - own
    assert sum(cost["seconds"] for cost in shared.cost.values()) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"training": TrainingConfig(learning_rate=0.02, batch_size=8)},
        {"identity": "elsewhere"},
    ],
)
def test_nothing_is_shared_with_a_run_that_differs(changes: dict[str, Any], tmp_path: Path) -> None:
    DenseFinetuning().run(Counted(tmp_path).problem, 0.0)
    other = Counted(tmp_path, **changes)
    DenseFinetuning().run(other.problem, 0.0)
    assert other.trained == STEPS


def test_a_training_with_a_teacher_is_not_shared(tmp_path: Path) -> None:
    for _ in range(2):
        counted = Counted(tmp_path)
        problem = counted.problem

        def objective(model: Any, batch: Any, problem: Problem = problem) -> torch.Tensor:
            return problem.criterion(problem.predict(model, batch), batch)

        DenseFinetuning().run(replace(problem, objective=objective), 0.0)
        assert counted.trained == STEPS
    assert not list(tmp_path.iterdir())


def test_a_damaged_product_is_made_again(tmp_path: Path) -> None:
    plain = DenseFinetuning().run(Counted(tmp_path).problem, 0.0)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    again = Counted(tmp_path)
    assert alike(DenseFinetuning().run(again.problem, 0.0), plain)
    assert again.trained == STEPS
    assert len(file.read_bytes()) == len(whole)


def report_of(out: Path) -> Any:
    return report_at(run_of(out))


def report_at(run: Path) -> Any:
    return json.loads((run / "report.json").read_text())


def test_killed_at_any_moment_a_run_with_a_shelf_ends_like_one_without(place: Path, tmp_path: Path) -> None:
    cache = ["--cache-dir", str(tmp_path / "cache")]
    plain, other, last = (tmp_path / name / "runs" for name in ("plain", "other", "last"))
    assert main(arguments(place, "imp-rewind", plain)) == 0
    line = [*arguments(place, "imp-rewind", other), *cache]
    assert [kill_after(line, other, after) for after in (1, 7, 20)] == [-9, -9, -9]
    assert main(line) == 0
    assert main([*arguments(place, "imp-rewind", last), *cache]) == 0
    assert sum(cost["shared"] for cost in report_of(last)["cost"].values()) > 0
    for out in (other, last):
        assert same(masks_of(run_of(out)), masks_of(run_of(plain)))
        assert same(weights_of(run_of(out) / "model"), weights_of(run_of(plain) / "model"))
        assert costs_of(report_of(out)) == costs_of(report_of(plain))
        lines = [[(x["label"], x["step"], x["loss"]) for x in log_of(run_of(o))] for o in (out, plain)]
        assert lines[0] == lines[1]
    assert "steps were taken from the cache" in (run_of(last) / "report.html").read_text()


def test_trainings_with_the_same_teacher_are_shared(place: Path, tmp_path: Path) -> None:
    cache, with_teacher = ["--cache-dir", str(tmp_path / "cache")], ["--train.distill.teacher", "dense"]
    first, second, plain = (tmp_path / name for name in ("first", "second", "plain"))
    assert main([*arguments(place, "imp-rewind", first), *with_teacher, *cache]) == 0
    harder = [*with_teacher, "--train.distill.alpha", "0.9"]
    for out, more in (
        (second, [*with_teacher, *cache]),
        (plain, with_teacher),
        (tmp_path / "harder", [*harder, *cache]),
    ):
        assert main([*arguments(place, "imp-rewind", out), "--sparsity", "0.9", *more]) == 0
    reports = {out: at(out, "imp-rewind") for out in (second, plain, tmp_path / "harder")}
    done = {out: sum(cost["shared"] for cost in report["cost"].values()) for out, report in reports.items()}
    dense = 12  # the teacher's own training
    assert done == {second: dense + 3 + 9 * 3, plain: 0, tmp_path / "harder": dense}
    assert costs_of(reports[second]) == costs_of(reports[plain])


def at(out: Path, method: str) -> Any:
    (run,) = out.glob(f"*/{method}-*/seed-*")
    return report_at(run)


def test_two_runs_at_once_that_want_the_same_teacher_both_end(place: Path, tmp_path: Path) -> None:
    out, common = tmp_path / "runs", ["--train.distill.teacher", "dense", "--train.batch-size", "8", "--steps", "20"]
    common += ["--model", str(place / "bert"), "--dataset", str(place / "reviews"), "--out", str(out)]
    both = [start_command(["prune", method, *common], tmp_path / method) for method in ("random", "magnitude")]
    for process, errors in both:
        process.join(100)
        assert process.exitcode == 0, errors.read_text()
    assert len(list(out.glob("*/dense-*/seed-*/report.json"))) == 1
    assert [report["cost"]["teacher"]["steps"] for report in map(report_at, out.glob("*/[rm]*/seed-*"))] == [20, 20]


def test_a_cache_above_its_budget_drops_the_trainings_used_least_recently(tmp_path: Path) -> None:
    cache = TrainingCache(tmp_path, budget=2500)
    product = CachedTraining({"w": torch.ones(200)}, {}, Cost(), [])  # about 1,000 bytes
    for i, key in enumerate("ab"):
        cache.put_training(key, product)
        os.utime(tmp_path / f"{key}.safetensors", (i, i))
    assert cache.get_training("a") is not None
    cache.put_training("c", product)
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "c"}
    assert TrainingCache(tmp_path).get_training("b") is None
    TrainingCache(tmp_path, budget=10).put_training("d", product)  # the newest stays, whatever its size
    assert {path.stem for path in tmp_path.iterdir()} == {"d"}


def test_an_entry_is_weights_alone_unless_the_run_goes_on_with_the_moments(tmp_path: Path) -> None:
    IterativeMagnitudePruning(cut=0.5, rewind=0.1).run(Counted(tmp_path).problem, 0.5)
    kinds: dict[frozenset[str], int] = {}
    for path in tmp_path.iterdir():
        names = {name.split("/")[0] for name in TensorFile(path)}
        kinds[frozenset(names)] = kinds.get(frozenset(names), 0) + 1
    assert kinds == {frozenset({"model", "optimizer"}): 1, frozenset({"model"}): 2}  # the rewinding point; two rounds


def test_the_size_of_a_cache_is_a_flag(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ["--cache-dir", str(tmp_path / "cache"), "--cache-size"]
    assert main([*arguments(place, "imp-rewind", tmp_path / "one"), *cache, "1"]) == 0
    assert len(list((tmp_path / "cache").iterdir())) > 2
    assert main([*arguments(place, "imp-rewind", tmp_path / "two"), "--seed", "1", *cache, "0"]) == 0
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the newest
    assert main([*arguments(place, "imp-rewind", tmp_path / "two"), "--seed", "1", *cache, "-1"]) == 2
    assert "--cache-size: a number of GiB, 0 or more, is needed, got -1" in capsys.readouterr().err
    assert main([*arguments(place, "imp-rewind", tmp_path / "two"), "--dry-run", *cache, "nan"]) == 2
    assert "--cache-size: a number of GiB, 0 or more, is needed, got nan" in capsys.readouterr().err


def test_an_entry_that_is_removed_while_it_is_read_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "MAPPED", 1)  # opened anew for every tensor
    cache, weights = TrainingCache(tmp_path), {"a": torch.ones(3), "b": torch.zeros(2)}
    cache.put_training("one", CachedTraining(weights, {}, Cost(), []))
    found = cache.get_training("one")
    assert found is not None
    (tmp_path / "one.safetensors").unlink()
    assert same(dict(found.tensors), weights)


def test_an_entry_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    cache = TrainingCache(tmp_path)
    cache.put_training("a", CachedTraining({"w": torch.ones(200)}, {}, Cost(), []))
    found = cache.get_training("a")
    assert found is not None
    assert isinstance(found.tensors, TensorFile)
