"""Masks led by the density: they end near the sparsity asked for, by formulas left to autograd, whatever the loss."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional

from conftest import same, tiny
from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Element
from sparsesoup.core.groups import block_groups
from sparsesoup.core.masks import count_kept
from sparsesoup.core.schedules import CubicSchedule
from sparsesoup.methods.gates.attach import attach_gates, gates_of
from sparsesoup.methods.gates.density import group_sizes
from sparsesoup.methods.gates.hard_concrete import SHIFT
from sparsesoup.methods.gates.penalty_controller import SparsityController, typical_gradient
from sparsesoup.methods.hybrid import HybridMovement
from sparsesoup.methods.learned_masks import initial_scores, straight_through_gates
from sparsesoup.methods.soft_movement_and_l0 import HardConcreteL0, SoftMovement
from sparsesoup.training.batching import Batch
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.loop import train
from sparsesoup.training.optimizers import OPTIMIZERS
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState

pytestmark = pytest.mark.integration

LED = {"soft-movement": SoftMovement(score_rate=0.5), "l0": HardConcreteL0(score_rate=0.1)}


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("name", LED)
def test_led_by_the_density_the_threshold_alone_comes_near_the_sparsity(name: str, sparsity: float) -> None:
    ticket = LED[name].run(tiny(steps=300), sparsity)
    assert ticket.notes["threshold_sparsity"] == pytest.approx(sparsity, abs=0.02)
    assert count_kept(ticket.masks) == round((1 - sparsity) * 2000)


@pytest.mark.parametrize(
    ("factor", "sparsity"),
    [
        (0.02, 0.5),
        (0.001, 0.9),
        (3.0, 0.5),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((0.02, 0.9), (0.001, 0.5), (3.0, 0.9))),
    ],
)
@pytest.mark.parametrize("make", [SoftMovement, HardConcreteL0])
def test_the_threshold_alone_comes_near_the_sparsity_where_gradients_change(
    make: Any, sparsity: float, factor: float
) -> None:
    """The task is learnt and its gradient falls, while Adam divides by what it was for a thousand steps."""
    seen = 0

    def fading(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal seen
        seen += 1
        return (factor if seen > 75 else 1.0) * functional.cross_entropy(model(batch["x"]), batch["labels"])

    ticket = make().run(tiny(steps=300, objective=fading), sparsity)
    assert ticket.notes["threshold_sparsity"] == pytest.approx(sparsity, abs=0.02)


@pytest.mark.parametrize("make", [SoftMovement, HardConcreteL0])
def test_a_constant_penalty_reaches_what_it_happens_to_reach(make: Any) -> None:
    reached = [
        make(score_rate=0.1, penalty=p).run(tiny(steps=150), 0.7).notes["threshold_sparsity"] for p in (0.0, 1e4)
    ]
    assert reached[0] < 0.05
    assert reached[1] > 0.95


def test_a_floor_keeps_a_share_of_every_matrix_open_and_when_masks_are_trimmed() -> None:
    plain = SoftMovement(score_rate=0.5, penalty=1e4)
    closed, floored = (replace(plain, floor=f).run(tiny(steps=60), 0.85) for f in (0.0, 0.1))
    assert closed.notes["threshold_sparsity"] == 1.0
    least = {"blocks.0.weight": 41, "blocks.1.weight": 41, "wide.weight": 121}  # int(0.1 n) + 1, as published
    assert floored.notes["threshold_sparsity"] == pytest.approx(1 - sum(least.values()) / 2000)
    assert count_kept(floored.masks) == count_kept(closed.masks) == 300
    assert all(int(floored.masks[name].sum()) >= number for name, number in least.items())
    assert any(int(closed.masks[name].sum()) < number for name, number in least.items())


@pytest.mark.parametrize("make", [SoftMovement, HybridMovement])
def test_a_floor_that_leaves_no_room_is_refused(make: Any) -> None:
    with pytest.raises(UserError, match=r"^floor: must be a share of every matrix in \[0, 1\), got 1\.0$"):
        make(floor=1.0)
    problem = tiny()
    with pytest.raises(UserError, match=r"^a floor of 0\.2 of every matrix leaves no sparsity of 0\.9; it is at most"):
        SoftMovement(floor=0.2).run(problem, 0.9)
    assert not problem.meter.costs


@pytest.mark.parametrize("name", LED)
def test_the_size_of_the_loss_does_not_matter(name: str) -> None:
    def louder(model: nn.Module, batch: Batch) -> Tensor:
        return 1000 * functional.cross_entropy(model(batch["x"]), batch["labels"])

    training = TrainingConfig(learning_rate=1e-2, batch_size=16, max_grad_norm=0.0)
    plain = LED[name].run(tiny(steps=120, training=training), 0.7)
    loud = LED[name].run(tiny(steps=120, training=training, objective=louder), 0.7)
    assert loud.notes["threshold_sparsity"] == pytest.approx(plain.notes["threshold_sparsity"], abs=0.03)


@pytest.mark.parametrize("used", [(2, 1), (1,)])
@pytest.mark.parametrize("make", [SoftMovement, HardConcreteL0])
def test_blocks_that_a_pass_leaves_out_do_not_end_a_run(make: Any, used: tuple[int, ...]) -> None:
    """Layers may be dropped at random, and a weight may never be asked for: its gate has no share and no gradient."""
    count = 0

    def dropping(model: Any, batch: Batch) -> Tensor:
        nonlocal count
        count += 1
        x = model.embed(batch["x"]).relu()
        for block in model.blocks[: used[count % len(used)]]:
            x = block(x).relu() + x
        return functional.cross_entropy(model.head(model.wide(x).relu()), batch["labels"])

    ticket = make(score_rate=0.5).run(tiny(objective=dropping, steps=100), 0.5)
    assert count_kept(ticket.masks) == 1000
    assert ticket.notes["threshold_sparsity"] == pytest.approx(0.5, abs=0.1)


def led(problem: Problem, **more: Any) -> tuple[TrainState, SparsityController, list[Parameter]]:
    """A state with random scores, and its lead."""
    ties = block_groups(problem.targets, Element)
    learnt = [score for score in initial_scores(problem, ties) if score is not None]
    draw = torch.Generator().manual_seed(3)
    for score in learnt:
        score.data.normal_(generator=draw)
    plain: dict[str, Any] = {
        "plan": CubicSchedule(2, 10), "end": 14, "sparsity": 0.6, "rate": lambda step: 0.1,
        "areas": group_sizes(ties, problem.targets), "weights": [1.0, 0.5, 2.0], "threshold": 0.1, "shift": SHIFT,
    }  # fmt: skip
    state = problem.start_run(
        lambda model: (attach_gates(model, ties, straight_through_gates(list(learnt), SHIFT)), 10.0)
    )
    return state, SparsityController(**(plain | more)), learnt


def term(state: TrainState, lead: SparsityController) -> Tensor:
    """The penalty, as it stands after a forward pass in training."""
    state.model.train()(torch.randn(4, 8))
    return lead.penalty_term(state)


def formula(learnt: list[Parameter], weight: float) -> Tensor:
    """The penalty as it is written: family weights, mean of each matrix, mean over matrices."""
    families = zip([1.0, 0.5, 2.0], learnt, strict=True)
    return weight * torch.stack([w * (s - SHIFT).sigmoid().mean() for w, s in families]).mean()


def test_the_penalty_is_that_of_the_formula_and_on_the_curve_of_the_threshold() -> None:
    state, lead, learnt = led(tiny(), penalty=40.0)
    for step in (0, 2, 5, 10, 12):
        state.step = step
        lead(state)
        share = 1 - (1 - min(max(step - 2, 0) / 8, 1)) ** 3
        for _, gate in gates_of(state.model):
            assert torch.sigmoid(gate.level).item() == pytest.approx(0.1 * share, abs=1e-6)
        own = torch.autograd.grad(term(state, lead), learnt)
        plain = torch.autograd.grad(formula(learnt, 40.0 * share), learnt)
        assert term(state, lead).item() == pytest.approx(formula(learnt, 40.0 * share).item(), rel=1e-5)
        assert all(one.allclose(other, rtol=1e-3, atol=1e-9) for one, other in zip(own, plain, strict=True))


@pytest.mark.parametrize("optimizer", ["radam", "adafactor"])
def test_an_optimizer_whose_steps_the_penalty_cannot_foresee_is_refused(optimizer: str) -> None:
    parameter = Parameter(torch.zeros(8))
    own = OPTIMIZERS[optimizer]([parameter], lr=1e-4)
    parameter.grad = torch.ones(8)
    own.step()
    with pytest.raises(UserError, match="use adamw") as caught:
        typical_gradient(own, [parameter])
    assert caught.value.field == "train.optimizer"


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name not in ("radam", "adafactor")])
def test_a_typical_gradient_moves_an_entry_by_the_learning_rate(optimizer: str) -> None:
    """By the optimizer itself: noise that it remembers, then the gradient that is said to move by one rate, held."""
    parameter, rate = Parameter(torch.zeros(64)), 1e-4
    own = OPTIMIZERS[optimizer]([parameter], lr=rate)
    sizes, draw = torch.logspace(-6, 1, 64), torch.Generator().manual_seed(1)
    for _ in range(400):
        parameter.grad = sizes * (torch.rand(64, generator=draw) - 0.5).sign()
        own.step()
    held = typical_gradient(own, [parameter])
    if optimizer != "sgd":
        assert held.allclose(sizes if optimizer != "rmsprop" else 0.1 * sizes, rtol=0.02)
    for _ in range(60):
        before = parameter.detach().clone()
        parameter.grad = held.clone()
        own.step()
    decay = 1 - rate * own.param_groups[0]["weight_decay"]
    moved = (before * decay - parameter.detach()) / rate
    assert moved.allclose(torch.ones(64), atol=0.3)  # RMSprop's memory of a hundred steps has changed meanwhile
    assert torch.equal(typical_gradient(own, [parameter], 8), typical_gradient(own, [parameter])[::8])


def test_the_lead_pulls_down_what_is_too_open_and_pushes_up_what_is_too_shut() -> None:
    problem = tiny()
    state, lead, learnt = led(problem)
    train(state, problem, 1)
    state.step = 10
    lead(state)
    assert float(state.memory["lead/weight"]) > 0
    assert state.masked < 0.1
    for score in learnt:
        score.data -= 5
    state.memory = {k: t for k, t in state.memory.items() if k == "lead/weight"}  # not by the training
    lead(state)
    assert float(state.memory["lead/weight"]) < 0
    assert state.masked > 0.9


@pytest.mark.parametrize("name", LED)
@pytest.mark.parametrize("dies", [17, 38])
def test_a_led_run_that_dies_resumes_to_the_same_bits(
    name: str, dies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsesoup.training.checkpoint.SHARE", 0)
    plain = replace(LED[name], score_rate=0.5).run(tiny(steps=40), 0.7)
    seen = 0

    class Died(Exception):
        pass

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal seen
        seen += 1
        if seen == dies:
            raise Died
        return functional.cross_entropy(model(batch["x"]), batch["labels"])

    def life() -> Problem:
        meter = CostTracker()
        return tiny(meter=meter, checkpointer=Checkpointer(meter, tmp_path, every=0.0), objective=objective, steps=40)

    with pytest.raises(Died):
        replace(LED[name], score_rate=0.5).run(life(), 0.7)
    ticket = replace(LED[name], score_rate=0.5).run(life(), 0.7)
    assert same(ticket.masks, plain.masks)
    assert same(ticket.weights, plain.weights)
    assert ticket.notes["threshold_sparsity"] == plain.notes["threshold_sparsity"]
    assert seen == 41


def test_scores_that_cannot_reach_the_threshold_in_time_are_refused_before_the_first_step() -> None:
    for method in (SoftMovement(score_rate=1e-3), HardConcreteL0(score_rate=1e-3)):
        problem = tiny(steps=60)
        with pytest.raises(UserError, match=r"^scores can fall by 0\.0\d in 60 steps at a rate of 0\.001, and must by"):
            method.run(problem, 0.7)
        assert not problem.meter.costs
