"""Every method on a device that is not the CPU: nowhere do tensors of both meet, and the masks are those of the CPU."""

import contextlib
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import same, tiny
from killed_runs import finish_killed_run
from reference.other_device import AWAY, AwayTensor, OtherDevice, other_device
from sparsesoup.core import topk_rows
from sparsesoup.core.errors import UserError
from sparsesoup.core.masking import topk_masks
from sparsesoup.methods import METHODS, TABLE, Method
from sparsesoup.methods.gradual import GradualPruning
from sparsesoup.training import optimizers
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.problem import Problem
from tiny_bert import bert
from tiny_runs import method

REPLACE = ("mlpruning",)  # sets the data of a parameter, which a tensor that only says to be elsewhere cannot take


@pytest.fixture(autouse=True)
def _plain_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer of single operations, which are the same on both devices."""
    plain = functools.partial(torch.optim.AdamW, foreach=False, fused=False)
    monkeypatch.setitem(optimizers.OPTIMIZERS, "adamw", plain)


def test_tensors_of_two_devices_are_refused() -> None:
    with OtherDevice():
        there = torch.ones(3, 3, device=AWAY)
        assert isinstance(there, AwayTensor)
        assert there.device == AWAY
        assert (there * 2 + torch.tensor(1.0)).sum().item() == 27.0
        assert not isinstance(there.cpu(), AwayTensor)
        for work in (
            lambda: there + torch.ones(3),
            lambda: torch.ones(3, 3) @ there,
            lambda: torch.ones(3, 3)[there > 0],
            lambda: torch.stack([there[0, 0], torch.tensor(1.0)]),
        ):
            with pytest.raises(RuntimeError, match="tensors of two devices"):
                work()


def problem_for(**changes: Any) -> Problem:
    return tiny(training=TrainingConfig(learning_rate=1e-2, batch_size=16), **changes)


def few_steps(chosen: Method, sparsity: float) -> int:
    """A number of steps that suffices for all phases of a method: there, an operation takes twenty times as long."""
    for steps in (8, 12):
        with contextlib.suppress(UserError):
            chosen.plan(problem_for(steps=steps).size, sparsity)
            return steps
    return 20


@pytest.mark.integration
@pytest.mark.parametrize("name", [name for name in METHODS if name not in REPLACE])
def test_every_method_finds_the_masks_of_the_cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparsity = 0.0 if TABLE[name].dense else 0.5
    chosen = method(name, tmp_path)
    steps = few_steps(chosen, sparsity)
    here = chosen.run(problem_for(steps=steps), sparsity)
    with other_device(monkeypatch):
        there = chosen.run(problem_for(steps=steps), sparsity)
    assert same(there.masks, here.masks)
    assert same(there.weights, here.weights)
    assert not any(isinstance(t, AwayTensor) for t in (*there.masks.values(), *there.weights.values()))


@pytest.mark.parametrize("name", ["gradual", "movement", "platon", "imp-rewind"])
def test_a_killed_run_resumes_there_to_the_masks_of_the_cpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = method(name, tmp_path)
    here = chosen.run(problem_for(steps=20), 0.5)
    with other_device(monkeypatch):
        resumed = finish_killed_run(
            chosen, functools.partial(problem_for, steps=20), 0.5, tmp_path, monkeypatch, kills=1, steps=11
        )
    assert same(resumed.masks, here.masks)


@pytest.mark.parametrize("scope", ["global", "tensor", "row", "2:4"])
def test_every_scope_selects_the_masks_of_the_cpu(scope: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(topk_rows.TO_BYTES, AwayTensor, torch.uint8)
    draw = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(32, 64, generator=draw).round(decimals=2) for name in ("a", "b")}
    here = topk_masks(scores, 0.5, scope=scope)
    with OtherDevice():
        there = topk_masks({name: score.to(AWAY) for name, score in scores.items()}, 0.5, scope=scope)
        assert {type(mask) for mask in there.values()} == {AwayTensor}
        assert same({name: mask.cpu() for name, mask in there.items()}, here)


@pytest.mark.parametrize("structure", ["heads", "units", "heads-and-units"])
def test_structures_of_a_transformer_are_found_there_too(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Any:
        training = TrainingConfig(learning_rate=1e-3, batch_size=8)
        return GradualPruning(structure=structure).run(bert(attention="eager", steps=8, training=training), 0.5)

    here = run()
    with other_device(monkeypatch):
        assert same(run().masks, here.masks)
