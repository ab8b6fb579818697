"""PINS: the loss by hand, and the teacher that is the run's own best model so far."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from conftest import climb, same, tiny, watched
from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.schedules import CubicSchedule
from sparsesoup.methods.pins import Pins, _choose_teacher, answer_certainty, check_steps, self_distillation_loss
from sparsesoup.methods.platon import Platon
from sparsesoup.methods.scores.averages import ImportanceAverages, after_step, first_order_sensitivity
from sparsesoup.training.batching import Batch
from sparsesoup.training.cost import CountFlops
from sparsesoup.training.distillation import distillation_divergence
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState


def test_certainty_is_one_less_the_entropy_of_the_definition() -> None:
    torch.manual_seed(0)
    outputs = torch.randn(6, 5) * 3
    for row, found in zip(outputs, answer_certainty(outputs), strict=True):
        p = [math.exp(v) for v in row.tolist()]
        p = [v / sum(p) for v in p]
        assert float(found) == pytest.approx(1 + sum(v * math.log(v) for v in p) / math.log(5), abs=1e-5)
    assert answer_certainty(torch.zeros(2, 4)).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert answer_certainty(torch.tensor([[0.0, -math.inf]])).tolist() == [1.0]  # an answer that cannot be
    assert answer_certainty(torch.randn(3, 1)).tolist() == [1.0, 1.0, 1.0]
    spans = torch.randn(3, 2, 7)
    assert answer_certainty(spans).allclose((answer_certainty(spans[:, 0]) + answer_certainty(spans[:, 1])) / 2)
    barred = torch.nn.functional.pad(spans, (0, 40), value=-1e4)  # positions outside of a short context
    assert answer_certainty(barred).allclose(answer_certainty(spans))


def taught_state(problem: Problem) -> tuple[TrainState, nn.Module]:
    """A trained state whose memory holds another model as the teacher, and that model."""
    state = train(tiny().start_run(), tiny(), 30)
    teacher = copy.deepcopy(state.model).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    state.memory = {f"teacher/{n}": t.detach().clone() for n, t in teacher.named_parameters()}
    return state, teacher


def test_the_loss_adds_the_distance_from_the_teacher_weighted_by_certainty() -> None:
    problem = tiny()
    state, teacher = taught_state(problem)
    state.model.eval()
    batch = problem.train.batch(range(16))
    given, wanted = state.model(batch["x"]).detach(), teacher(batch["x"]).detach()
    rows = [
        float(answer_certainty(g[None])) * float(distillation_divergence(g[None], w[None], 3.0))
        for g, w in zip(given, wanted, strict=True)
    ]
    plain = problem.training_loss(state.model, batch).item()
    assert self_distillation_loss(problem, state, 3.0)(state.model, batch).item() == pytest.approx(
        plain + sum(rows) / 16, rel=1e-5
    )
    assert sum(rows) > 0.1
    state.memory = {f"teacher/{n}": t.detach().clone() for n, t in state.model.named_parameters()}
    assert self_distillation_loss(problem, state, 3.0)(state.model, batch).item() == pytest.approx(plain, rel=1e-6)


def test_the_weight_is_no_part_of_the_gradient() -> None:
    problem = tiny()
    state, teacher = taught_state(problem)
    state.model.eval()
    batch = problem.train.batch(range(16))
    self_distillation_loss(problem, state, 2.0)(state.model, batch).backward()
    found = {n: p.grad.clone() for n, p in state.model.named_parameters()}
    state.model.zero_grad()
    outputs = state.model(batch["x"])
    weights = torch.tensor(answer_certainty(outputs).tolist())
    loss = (
        problem.criterion(outputs, batch)
        + (weights * distillation_divergence(outputs, teacher(batch["x"]).detach(), 2.0)).mean()
    )
    loss.backward()
    assert all(found[n].allclose(p.grad, rtol=1e-4, atol=1e-7) for n, p in state.model.named_parameters())


def test_another_objective_is_added_to_and_the_student_runs_once() -> None:
    calls = 0

    def predict(model: nn.Module, batch: Batch) -> Tensor:
        return 2 * model(batch["x"])

    def other(model: nn.Module, batch: Batch) -> Tensor:
        return 3 * functional.cross_entropy(predict(model, batch), batch["labels"])

    problem = tiny(predict=predict, objective=other)
    state, teacher = taught_state(problem)
    state.model.eval()

    def count(*ignored: Any) -> None:
        nonlocal calls
        calls += 1

    state.model.register_forward_hook(count)
    batch = problem.train.batch(range(16))
    found = self_distillation_loss(problem, state, 2.0)(state.model, batch)
    assert calls == 1
    given, wanted = predict(state.model, batch), predict(teacher, batch)
    by_hand = other(state.model, batch) + (answer_certainty(given) * distillation_divergence(given, wanted, 2.0)).mean()
    assert float(found.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-5)


def test_the_teacher_is_the_latest_of_the_best_on_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.5, 0.4, 0.5, 0.3, 0.1]
    seen: list[dict[str, Tensor]] = []

    def metric(outputs: Tensor, labels: Tensor) -> dict[str, float]:
        return {"made up": values[len(seen) - 1], "other": 1.0}

    plain = Problem.validate

    def validate(problem: Problem, model: nn.Module) -> dict[str, float]:
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return plain(problem, model)

    monkeypatch.setattr(Problem, "validate", validate)
    with watched() as watch:
        ticket = Pins(every_steps=5, window=5).run(tiny(metric=metric), 0.7)
    checks = ticket.notes["teachers"]
    assert [c["teaches"] for c in checks] == [True, False, True, False]
    assert [c["made up"] for c in checks] == values[:4]
    assert [c["step"] for c in checks] == check_steps(CubicSchedule(6, 41, 5), 4) == [6, 11, 21, 31]
    assert watch.state is not None
    assert same({n.removeprefix("teacher/"): t for n, t in watch.state.memory.items()}, seen[2])
    seen.append(ticket.weights)  # the ticket's own look at the validation rows is no check
    zeroed = [1 - algebra.count_kept({n: w[n] != 0 for n in ticket.masks}) / 2000 for w in seen]
    assert zeroed == [pytest.approx(v, abs=2e-3) for v in [*(c["sparsity"] for c in checks), 0.7]]


def test_the_teacher_costs_a_forward_pass_from_the_first_check_on() -> None:
    problem, plain = tiny(), tiny()
    Pins(every_steps=5, window=5, checks=2).run(problem, 0.7)
    Platon(every_steps=5, window=5).run(plain, 0.7)
    with CountFlops() as forward:
        problem.predict(problem.pretrained, problem.train.batch(range(16)))
    more = problem.meter.costs["main"].flops - plain.meter.costs["main"].flops
    assert more == (60 - 6) * forward.flops > 0
    assert problem.meter.costs["validation"].examples == 3 * 96


def test_a_check_changes_no_bit_of_the_run() -> None:
    plan = CubicSchedule(5, 25, 5)
    check = partial(_choose_teacher, plan, 0.7)
    averages = ImportanceAverages(sensitivity=after_step, fast=0.85, slow=0.99, window=5, origin=5)
    problem = tiny()
    once, thrice = problem.start_run(), problem.start_run()
    climb(problem, once, plan, 20, 0.7, averages)
    for until in (5, 15):
        climb(problem, thrice, plan, until, 0.7, averages, end=check)
    climb(problem, thrice, plan, 20, 0.7, averages)
    assert len(thrice.notes["teachers"]) == 2
    assert same({n: t for n, t in thrice.tensors().items() if "teacher/" not in n}, once.tensors())


def test_a_run_ranks_by_the_sensitivity_after_the_step_and_learns_at_the_temperature_it_was_given() -> None:
    ticket = Pins(fast=0.3, slow=0.6, every_steps=6, window=3, start=0.2, stop=0.6, checks=1, temperature=8.0).run(
        tiny(), 0.7
    )
    plan, problem, found = CubicSchedule(12, 36, 6), tiny(), []
    for sensitivity, temperature in [(after_step, 8.0), (after_step, 2.0), (first_order_sensitivity, 8.0)]:
        averages = ImportanceAverages(sensitivity=sensitivity, fast=0.3, slow=0.6, window=3, origin=12)
        state = problem.start_run()
        climb(problem, state, plan, 12, 0.7, averages, end=partial(_choose_teacher, plan, 0.7))
        with_teacher = replace(problem, objective=self_distillation_loss(problem, state, temperature))
        climb(with_teacher, state, plan, 36, 0.7, averages)
        found.append(same(ticket.masks, state.masks))
    assert found == [True, False, False]


def test_the_teacher_is_not_trained_and_moves_the_student() -> None:
    with watched() as watch:
        with_teacher = Pins(every_steps=5, window=5, checks=1).run(tiny(), 0.7)
    assert watch.state is not None
    problem = tiny()
    dense = train(problem.start_run(), problem, 6)
    teacher = {n.removeprefix("teacher/"): t for n, t in watch.state.memory.items()}
    assert same(teacher, {n: p.detach() for n, p in dense.model.named_parameters()})
    hot = replace(Pins(every_steps=5, window=5, checks=1), temperature=5.0).run(tiny(), 0.7)
    assert not same(with_teacher.weights, hot.weights)


@pytest.mark.parametrize("checks", [1, 2, 3, 4, 50])
def test_the_first_check_is_before_any_pruning_and_none_is_the_last(checks: int) -> None:
    for gaps in (1, 2, 7, 12):
        plan = CubicSchedule(20, 20 + 10 * gaps, 10)
        steps = check_steps(plan, checks)
        assert steps[0] == 20
        assert len(steps) == len(set(steps)) == min(checks, gaps)
        assert all(plan.is_pruning_step(step) and step < plan.stop for step in steps)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Pins(window=0), "^window: must be at least 1, got 0$"),
        (lambda: Pins(checks=0), "^checks: must be at least 1, got 0$"),
        (lambda: Pins(temperature=0.0), "^temperature: must be above 0, got 0.0$"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)
