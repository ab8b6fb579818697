"""A run on a problem is fresh, whatever ran on it before: weights, costs, precision, saved states."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional

from conftest import same, tiny
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods import METHODS
from sparsesoup.training.batching import Batch
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.cost import Cost, CostTracker
from sparsesoup.training.problem import Problem

ORDER = ("isp", "dense", "imp-rewind", "lottery-pools", "movement", "dense", "pins", "isp", "magnitude")


def run(name: str, problem: Problem) -> Ticket:
    return METHODS[name].run(problem, 0.0 if name == "dense" else 0.7)


def steps(ticket: Ticket) -> dict[str, int]:
    return {label: cost["steps"] for label, cost in ticket.cost.items()}


def bare(**changes: Any) -> Problem:
    """The tiny problem with the meter and the checkpoint that a Problem has where none are given."""
    full = tiny(**changes)
    names = ("pretrained", "targets", "train", "validation", "predict", "criterion", "metric", "steps", "training")
    return Problem(**{name: getattr(full, name) for name in names}, objective=full.objective)


@pytest.mark.parametrize("make", [tiny, bare])
def test_methods_in_turn_on_one_problem_are_as_each_on_its_own(make: Any) -> None:
    shared = make(steps=40)
    for name in ORDER:
        ticket, alone = run(name, shared), run(name, make(steps=40))
        assert same(ticket.weights, alone.weights), name
        assert same(ticket.masks, alone.masks), name
        assert steps(ticket) == steps(alone), name


def test_a_run_after_one_that_failed_is_fresh() -> None:
    fails = True

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        loss = functional.cross_entropy(model(batch["x"]), batch["labels"])
        if fails and shared.meter.total_cost().steps >= 25:
            raise KeyboardInterrupt
        return loss

    shared = tiny(steps=40, objective=objective)
    with pytest.raises(KeyboardInterrupt):
        run("isp", shared)
    fails = False
    ticket, alone = run("isp", shared), run("isp", tiny(steps=40))
    assert same(ticket.weights, alone.weights)
    assert steps(ticket) == steps(alone)


def test_what_was_charged_before_the_first_run_is_charged_to_each() -> None:
    shared = tiny(steps=20)
    shared.meter.add_cost("teacher", Cost(steps=7))
    for name in ("gradual", "dense"):
        assert steps(run(name, shared)) == {"teacher": 7, "main": 20, "validation": 0}


def test_a_problem_keeps_its_precision_when_another_one_has_another() -> None:
    half = TrainingConfig(learning_rate=1e-2, batch_size=16, precision="bf16")
    one, other = tiny(steps=10, training=half), tiny(steps=10)
    first, plain = run("dense", one), run("dense", other)
    assert not same(first.weights, plain.weights)
    assert same(run("dense", one).weights, first.weights)
    assert same(run("dense", other).weights, plain.weights)


@pytest.mark.parametrize("dies_in", ["gradual", "dense"])
def test_a_loop_over_methods_with_a_folder_resumes_only_the_run_that_was_under_way(
    dies_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have one piece of the same name: a restart must not take the state of one for that of the other."""
    monkeypatch.setattr("sparsesoup.training.checkpoint.SHARE", 0)

    class Died(Exception):
        pass

    def life(dies_at: int) -> dict[str, Ticket]:
        seen = 0

        def objective(model: nn.Module, batch: Batch) -> Tensor:
            nonlocal seen
            seen += 1
            if seen == dies_at:
                raise Died
            return functional.cross_entropy(model(batch["x"]), batch["labels"])

        meter = CostTracker()
        shared = tiny(meter=meter, checkpointer=Checkpointer(meter, tmp_path, every=0.0), objective=objective, steps=20)
        found = {name: run(name, shared) for name in ("gradual", "dense")}
        counted.append(seen)
        return found

    counted: list[int] = []
    with pytest.raises(Died):
        life(13 if dies_in == "gradual" else 33)
    found = life(0)
    assert counted[-1] == (28 if dies_in == "gradual" else 40)  # gradual goes on; its finished state was given up
    for name, ticket in found.items():
        assert same(ticket.weights, run(name, tiny(steps=20)).weights), name
        assert steps(ticket)["main"] == 20
