"""Powerpropagation: its derivative by finite differences, in and out of the gate, and its run against gradual's."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import same, tiny, watched
from sparsesoup.core.errors import UserError
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import count_kept
from sparsesoup.core.targets import target_parameters
from sparsesoup.methods import METHODS
from sparsesoup.methods.gates.powerpropagation import PowerParametrization, attach_power, fold_power_
from sparsesoup.methods.gradual import GradualPruning
from sparsesoup.methods.powerpropagation import PowerPropagation
from sparsesoup.methods.scores import magnitude
from sparsesoup.training.batching import Batch
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState

ALPHAS = (1.0, 1.375, 1.5, 2.0, 3.0, 4.0)
V = (-2.0, -0.7, -1e-3, 0.0, 1e-3, 0.3, 1.0, 1.9)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_derivative_is_that_of_finite_differences(alpha: float) -> None:
    v = torch.tensor(V, dtype=torch.float64)
    gate, h = PowerParametrization(alpha), 1e-6
    differences = (gate(v + h) - gate(v - h)) / (2 * h)  # at 0: h^(alpha - 1), which goes to 0
    with torch.no_grad():
        assert gate(v).tolist() == pytest.approx([math.copysign(abs(x) ** alpha, x) for x in V])
    for precision in (torch.float64, torch.float32):
        leaf = v.to(precision, copy=True).requires_grad_()
        gate(leaf).backward(torch.full_like(leaf, 3.0))
        assert leaf.grad is not None
        assert leaf.grad.dtype == precision
        away = v != 0
        assert leaf.grad.double()[away].allclose(3 * differences[away], rtol=1e-5, atol=1e-7)
        assert leaf.grad[~away].tolist() == [3.0 if alpha == 1.0 else 0.0]


def test_left_to_autograd_the_derivative_at_zero_is_not_a_number() -> None:
    """Why the gate brings its own."""
    v = torch.zeros(1, requires_grad=True)
    (v * v.abs().pow(0.5)).backward()
    assert v.grad is not None
    assert v.grad.isnan()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_model_begins_with_the_weights_it_had(alpha: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 40) * 0.05
    weight[0, :5] = 0.0
    gate = PowerParametrization(alpha)
    v = gate.right_inverse(weight)
    assert gate(v).allclose(weight, rtol=1e-5, atol=0)
    assert v.sign().equal(weight.sign())
    if alpha == 1.0:
        assert same({"": v}, {"": weight})
        assert same({"": gate(v)}, {"": weight})
    masks = (
        topk_masks(magnitude({"w": weight.double()}), 0.5),
        topk_masks(magnitude({"w": gate.right_inverse(weight.double())}), 0.5),
    )
    assert same(*masks)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_folding_changes_no_answer_and_leaves_plain_names(alpha: float) -> None:
    problem = tiny()
    model, names = copy.deepcopy(problem.pretrained).eval(), list(problem.targets)
    batch = problem.validation.batch(range(96))
    before = model(batch["x"])
    attach_power(model, names, alpha)
    gated = model(batch["x"])
    assert gated.allclose(before, atol=1e-5)
    assert "wide.parametrizations.weight.original" in dict(model.named_parameters())
    behind = target_parameters(model, problem.targets)
    seen = {n: model.get_parameter(f"{n.removesuffix('.weight')}.parametrizations.weight.original") for n in names}
    assert all(behind[n] is p for n, p in seen.items())
    fold_power_(model, names)
    assert model(batch["x"]).equal(gated)
    assert model.state_dict().keys() == problem.pretrained.state_dict().keys()
    assert type(model.wide) is nn.Linear
    assert all(
        target_parameters(model, problem.targets)[n] is p for n, p in seen.items()
    )  # the optimizer still knows them


def test_the_gradient_of_v_is_that_of_w_times_the_slope() -> None:
    problem = tiny()
    plain, gated = copy.deepcopy(problem.pretrained).eval(), copy.deepcopy(problem.pretrained).eval()
    attach_power(gated, problem.targets, 2.0)
    batch = problem.train.batch(range(32))
    for model in (plain, gated):
        problem.training_loss(model, batch).backward()
    of_w, of_v = target_parameters(plain, problem.targets), target_parameters(gated, problem.targets)
    for n in problem.targets:
        slope = 2 * of_w[n].detach().abs().sqrt()
        assert of_v[n].grad.allclose(slope * of_w[n].grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_at_alpha_one_it_is_gradual(optimizer: Any, clip: float) -> None:
    """To the bit but for the clipping norm, which sums the parameters in another order."""
    training = TrainingConfig(learning_rate=1e-2, batch_size=16, max_grad_norm=clip, optimizer=optimizer)
    one = PowerPropagation(alpha=1.0).run(tiny(training=training), 0.7)
    other = GradualPruning().run(tiny(training=training), 0.7)
    if not clip:
        assert same(one.masks, other.masks)
        assert same(one.weights, other.weights)
    assert sum(int((m ^ other.masks[n]).sum()) for n, m in one.masks.items()) <= 2
    assert one.cost["main"]["flops"] == other.cost["main"]["flops"]


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0])
def test_a_zero_stays_a_zero_on_both_sides(alpha: float) -> None:
    problem = tiny()

    def gates(model: nn.Module) -> tuple[list[nn.Parameter], float]:
        attach_power(model, problem.targets, alpha)
        return [], 1.0

    state = problem.start_run(gates)
    masks = topk_masks(magnitude(state.prunable_parameters()), 0.6)
    state.set_masks_(masks)

    def look(state: TrainState) -> None:
        for n, m in masks.items():
            assert not state.prunable_parameters()[n][~m].any()
            weight = state.model.get_submodule(n.removesuffix(".weight")).weight
            assert weight[m].all()
            assert not weight[~m].any()
            assert not weight[~m].signbit().any()

    train(state, problem, 10, hooks=[look])
    assert count_kept(state.masks) == 800
    assert all(p.isfinite().all() for p in state.model.parameters())


def test_large_weights_move_more_than_small_ones() -> None:
    """Rich get richer: with the plain gradient, w moves by alpha^2 |w|^(2 - 2 / alpha) times that of no power."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 40, bias=False, dtype=torch.float64)
    plain = layer.weight.detach().clone()
    attach_power(layer, ["weight"], 2.0)
    direction = torch.randn(40, 40, dtype=torch.float64)
    (layer.weight * direction).sum().backward()
    v = layer.parametrizations.weight.original
    with torch.no_grad():
        v -= 1e-4 * v.grad
    moved = (layer.weight.detach() - plain) / (-1e-4 * direction)
    large = plain.abs() > 0.02
    assert moved[large].allclose(4 * plain[large].abs(), rtol=0.05)


def test_a_run_that_dies_after_its_training_folds_what_it_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsesoup.training.checkpoint.SHARE", 0)

    class Died(Exception):
        pass

    attempts = 0

    def predict(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal attempts
        if not model.training and attempts == 0:
            attempts += 1
            raise Died
        return model(batch["x"])

    def life() -> Problem:
        meter = CostTracker()
        return tiny(meter=meter, checkpointer=Checkpointer(meter, tmp_path, every=0.0), predict=predict)

    with pytest.raises(Died):
        PowerPropagation().run(life(), 0.6)
    problem = life()
    assert problem.checkpointer.resumed_stage == "train"
    ticket = PowerPropagation().run(problem, 0.6)
    plain = PowerPropagation().run(tiny(), 0.6)
    assert same(ticket.weights, plain.weights)
    assert same(ticket.masks, plain.masks)
    assert ticket.cost["main"]["steps"] == 60


def test_the_ticket_holds_w_and_the_run_trained_v() -> None:
    with watched() as watch:
        ticket = replace(METHODS["power-propagation"], stop=1.0).run(tiny(), 0.5)
    last = watch.before[-1]  # v just before the last pruning, which is after the last step
    for n, m in ticket.masks.items():
        assert ticket.weights[n].allclose(last[n] * last[n].abs() * m, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PowerPropagation(alpha=0.9), r"^alpha: must be in \[1, 16\], got 0\.9$"),
        (lambda: PowerPropagation(alpha=float("nan")), r"^alpha: must be in \[1, 16\], got nan$"),
        (
            lambda: PowerPropagation(start=0.7, stop=0.5),
            r"^start: must be below stop, got 0\.7, with stop at 0\.5; lower start",
        ),
        (lambda: PowerPropagation(every=0.0), r"^every: must be above 0, got 0\.0$"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)
