"""Extrapolation: the gradient of a step is taken at moved weights, and nothing but that gradient is different."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from conftest import same, tiny, tiny_double
from killed_runs import finish_killed_run
from sparsesoup.core.errors import UserError
from sparsesoup.core.masking import topk_masks
from sparsesoup.methods import METHODS
from sparsesoup.methods.scores import magnitude
from sparsesoup.study.cost.flops_model import FlopsModel, plan_costs
from sparsesoup.training.batching import Batch
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.extrapolation import FORMER
from sparsesoup.training.loop import train, train_head
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState

OPTIMIZERS = ("adamw", "adam", "sgd", "rmsprop")
BASE = TrainingConfig(learning_rate=1e-2, batch_size=16, extrapolate=3.0)


def weights(state: TrainState) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in state.model.named_parameters()}


def quadratic(optimizer: str, curvature: float, **changes: Any) -> Problem:
    """f = curvature / 2 of all squared weights, in float64, at a constant learning rate."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return curvature / 2 * torch.stack([p.square().sum() for p in model.parameters()]).sum()

    training = replace(BASE, optimizer=optimizer, weight_decay=0.0, max_grad_norm=0.0, **changes)
    return tiny_double(objective=loss, training=training)


def test_a_quadratic_is_descended_as_by_hand() -> None:
    """w <- w - v with v = 0.9 v + rate c u, at u = w - 3 rate c u', where u' is the point before."""
    problem, c, rate = quadratic("sgd", 0.7), 0.7, 0.02
    state = problem.start_run()
    expected = weights(state)
    velocity = {n: torch.zeros_like(w) for n, w in expected.items()}
    before = dict(velocity)
    for _ in range(6):
        for name, w in expected.items():
            u = w - 3.0 * rate * c * before[name]
            velocity[name] = 0.9 * velocity[name] + c * u
            expected[name], before[name] = w - rate * velocity[name], u
    train(state, problem, 6, rate=lambda step: rate)
    for name, w in weights(state).items():
        torch.testing.assert_close(w, expected[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_gets_the_gradient_of_the_moved_weights_alone(optimizer: str) -> None:
    problem, c, rate = quadratic(optimizer, 0.7, extrapolate=8.0), 0.7, 0.01
    state = problem.start_run()
    twin = {n: nn.Parameter(w) for n, w in weights(state).items()}
    plain = type(state.optimizer)(twin.values(), **{
        k: v for k, v in state.optimizer.param_groups[0].items() if k in ("momentum", "weight_decay")
    }, lr=rate)  # fmt: skip
    before = {n: torch.zeros_like(w) for n, w in twin.items()}
    for _ in range(5):
        for name, w in twin.items():
            w.grad = c * (w.detach() - 8.0 * rate * before[name])
            before[name] = w.grad
        plain.step()
    train(state, problem, 5, rate=lambda step: rate)
    for name, w in weights(state).items():
        torch.testing.assert_close(w, twin[name].detach(), rtol=1e-10, atol=1e-12)


def test_without_it_and_in_its_first_step_the_run_is_the_plain_one_to_the_bit() -> None:
    plain, moved = tiny(training=replace(BASE, extrapolate=0.0)), tiny(training=BASE)
    states = [problem.start_run() for problem in (plain, moved)]
    for state, problem in zip(states, (plain, moved), strict=True):
        train(state, problem, 1)
    assert same(weights(states[0]), weights(states[1]))
    assert not any(FORMER in name for name in states[0].tensors())
    for state, problem in zip(states, (plain, moved), strict=True):
        train(state, problem, 1)
    assert not same(weights(states[0]), weights(states[1]))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_stay_also_where_the_masks_change_after_the_gradient_was_kept(optimizer: str) -> None:
    seen = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if model.training:
            params = state.prunable_parameters()
            assert not any(params[n][~m].any() or params[n][~m].signbit().any() for n, m in state.masks.items())
            seen.append(sum(int(m.sum()) for m in state.masks.values()))
        return functional.cross_entropy(model(batch["x"]), batch["labels"])

    problem = tiny(training=replace(BASE, learning_rate=2e-3, optimizer=optimizer, extrapolate=50.0), objective=loss)
    state = problem.start_run()

    def prune(state: TrainState) -> None:
        if state.step in (3, 6):
            scores = magnitude(state.prunable_parameters())
            state.set_masks_(topk_masks(scores, state.step / 10, within=state.masks))

    train(state, problem, 9, hooks=[prune])
    assert seen == [2000] * 3 + [1400] * 3 + [800] * 3
    for name, p in state.prunable_parameters().items():
        assert not state.optimizer.state[p][FORMER][~state.masks[name]].any()


@pytest.mark.parametrize("parts", [2, 16])
def test_accumulated_gradients_are_all_taken_at_the_same_point(parts: int) -> None:
    found = []
    for size in (16, 16 // parts):
        training = replace(BASE, batch_size=size, gradient_accumulation_steps=16 // size, extrapolate=9.0)
        problem = tiny_double(training=training)
        problem.pretrained.dropout.p = 0.0
        found.append(weights(train(problem.start_run(), problem, 5)))
    for name, w in found[0].items():
        torch.testing.assert_close(w, found[1][name], rtol=1e-9, atol=1e-11)


def test_what_is_observed_and_clipped_is_the_gradient_of_the_step_at_weights_put_back() -> None:
    """The clipped gradient moves the next step, so that no outlier moves it further than the optimizer."""
    problem = tiny(training=replace(BASE, max_grad_norm=1e-3))
    state, seen = problem.start_run(), list[dict[str, Tensor]]()

    def observe(state: TrainState) -> None:
        seen.append(weights(state))

    before = weights(state)
    for _ in range(3):
        train(state, problem, 1, observe=observe)
        assert same(seen[-1], before)
        before = weights(state)
    kept = [slot[FORMER] for slot in state.optimizer.state.values()]
    assert float(torch.stack([t.norm() for t in kept]).norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_weights_as_they_were(bad: float) -> None:
    count = 0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal count
        count += 1
        return model(batch["x"]).square().sum() * (bad if count == 5 else 1e-3)

    problem = tiny(objective=loss, training=BASE)
    state = train(problem.start_run(), problem, 4)
    before = {n: t.detach().clone() for n, t in state.tensors().items()}
    with pytest.raises(UserError, match="at step 5"):
        train(state, problem, 3)
    assert same(dict(state.tensors()), before)


def test_a_parameter_without_a_gradient_has_no_former_one() -> None:
    problem = tiny(training=BASE)
    state = train(problem.start_run(), problem, 2)
    point = state.take_snapshot()
    train_head(state, problem, 2)
    params = state.prunable_parameters().values()
    assert not any(FORMER in state.optimizer.state[p] for p in params)
    state.restore_snapshot_(point)
    assert all(FORMER in state.optimizer.state[p] for p in params)
    train_head(state, problem, 1)
    alone = state.take_snapshot()
    state.restore_snapshot_(point)
    state.restore_snapshot_(alone)
    assert not any(FORMER in state.optimizer.state[p] for p in params)


@pytest.mark.parametrize("name", ["gradual", "movement", "imp-rewind"])
def test_a_run_killed_and_resumed_ends_with_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = replace(METHODS[name], cut=0.5) if name == "imp-rewind" else METHODS[name]
    whole = method.run(tiny(training=BASE, steps=30), 0.6)
    assert not same(whole.weights, method.run(tiny(training=replace(BASE, extrapolate=0.0), steps=30), 0.6).weights)

    make = partial(tiny, training=BASE, steps=30)
    again = finish_killed_run(method, make, 0.6, tmp_path, monkeypatch, kills=3, steps=7)
    assert same(again.masks, whole.masks)
    assert same(again.weights, whole.weights)


def test_it_costs_what_the_plain_run_costs() -> None:
    costs = []
    for training in (BASE, replace(BASE, extrapolate=0.0)):
        problem = tiny(training=training, steps=12)
        found = plan_costs(METHODS["gradual"].plan(problem.size, 0.5), problem, FlopsModel(problem))
        METHODS["gradual"].run(problem, 0.5)
        assert {k: c.flops for k, c in found.items()} == {k: c.flops for k, c in problem.meter.costs.items()}
        costs.append({k: (c.flops, c.steps, c.examples) for k, c in found.items()})
    assert costs[0] == costs[1]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_impossible_values_are_refused_by_name(value: float) -> None:
    with pytest.raises(UserError, match=r"^extrapolate: must be a number of at least 0, got"):
        TrainingConfig(extrapolate=value)
