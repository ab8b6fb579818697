"""Where reading makes a GPU wait, the numbers of a step are read a step late; shown on a CPU that is treated as one."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from conftest import Watch, same, tiny
from reference.synchronisations import Synchronisations
from sparsesoup.core.errors import UserError
from sparsesoup.core.masking import topk_masks
from sparsesoup.methods import METHODS
from sparsesoup.methods.scores import magnitude
from sparsesoup.training import loop as training_loop
from sparsesoup.training.batching import Batch
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.hooks import ScheduledHook
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState
from sparsesoup.training.step_loss import HostCopy, can_skip_update

BASE = TrainingConfig(learning_rate=1e-2, batch_size=16)
LATE = ("adamw", "adam")


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as a device on which a read makes the host wait."""
    monkeypatch.setattr(training_loop, "LATE_DEVICES", ("cpu",))


def failing(at: int, bad: float, where: str = "loss", **changes: Any) -> Problem:
    """A problem whose loss, or gradient, is not finite at one forward pass."""
    count = 0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal count
        count += 1
        plain = functional.cross_entropy(model(batch["x"]), batch["labels"])
        if count != at:
            return plain
        # A sum whose value is finite and whose gradient is not.
        return plain * bad if where == "loss" else plain + (model.wide.weight * 0.0).abs().sqrt().sum()

    return tiny(objective=loss, **changes)


def tensors(state: TrainState) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in state.tensors().items()}


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("name", ["magnitude", "imp", "gradual", "movement", "l0", "platon", "isp", "early-bird"])
def test_results_logs_and_costs_are_those_of_numbers_read_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(late: bool) -> Any:
        monkeypatch.setattr(training_loop, "LATE_DEVICES", ("cpu",) if late else ())
        watch = Watch()
        changes = {"l0": {"score_rate": 1.0}, "platon": {"every_steps": 4, "window": 2}}.get(name, {})
        problem = tiny(observer=watch, training=replace(BASE, eval_steps=7), steps=40)
        found = replace(METHODS[name], **changes).run(problem, 0.5)  # type: ignore[type-var,arg-type]
        costs = {label: {k: v for k, v in cost.items() if k != "seconds"} for label, cost in found.cost.items()}
        return found.weights, found.masks, watch.records, found.notes, costs

    (weights, masks, *rest), (late_weights, late_masks, *late_rest) = run(False), run(True)
    assert same(weights, late_weights)
    assert same(masks, late_masks)
    assert rest == late_rest


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("optimizer", LATE)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing_and_is_reported_with_its_step(bad: float, optimizer: Any) -> None:
    watch = Watch()
    problem = failing(8, bad, training=replace(BASE, optimizer=optimizer), observer=watch)
    state = train(problem.start_run(), problem, 5)
    state.set_masks_(topk_masks(magnitude(state.prunable_parameters()), 0.5))
    train(state, problem, 2)
    before = tensors(state)
    with pytest.raises(
        UserError, match=rf"^the loss is -?{bad} at step 8 of the main training; .* \(now 0\.01\)"
    ) as caught:
        train(state, problem, 7)
    assert "\n" not in str(caught.value)
    assert state.step == 7
    assert same(tensors(state), before)
    assert all(p.grad is None for p in state.model.parameters())
    assert not hasattr(state.optimizer, "found_inf")
    assert problem.meter.to_json()["main"]["steps"] == 7
    assert [record["step"] for record in watch.records] == [*range(1, 8)]
    assert all(math.isfinite(record["loss"]) for record in watch.records)


@pytest.mark.parametrize("kind", [(), ("cpu",)])
def test_a_gradient_that_is_not_finite_changes_nothing_either(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loop, "LATE_DEVICES", kind)
    problem = failing(4, math.nan, where="gradient")
    state = train(problem.start_run(), problem, 3)
    before = tensors(state)
    with pytest.raises(UserError, match=r"^the gradient norm is (nan|inf) at step 4 of the main training; "):
        train(state, problem, 4)
    assert state.step == 3
    assert same(tensors(state), before)
    assert problem.meter.to_json()["main"]["steps"] == 3


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("at", [1, 10])
def test_the_first_and_the_last_step_of_a_training_are_read_too(at: int) -> None:
    problem = failing(at, math.nan)
    state = problem.start_run()
    with pytest.raises(UserError, match=rf"^the loss is nan at step {at} "):
        train(state, problem, 10)
    assert state.step == at - 1


@pytest.mark.usefixtures("late")
def test_no_state_with_an_unread_step_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save is due after every step, so every step is read before; the failed one is in no file."""
    monkeypatch.setattr("sparsesoup.training.checkpoint.SHARE", 0)
    meter = CostTracker()
    checkpointer = Checkpointer(meter, tmp_path, every=0.0)
    problem = failing(4, math.nan, meter=meter, checkpointer=checkpointer)
    with pytest.raises(UserError, match="at step 4 "):
        METHODS["dense"].run(problem, 0.0)
    again = CostTracker()
    other = tiny(meter=again, checkpointer=Checkpointer(again, tmp_path, every=0.0))
    assert again.to_json()["main"]["steps"] == 3
    state = other.start_run()
    other.checkpointer.run_stage("train", state, lambda: other.checkpointer.resume_step(state, 60))
    assert state.step == 3
    assert all(t.isfinite().all() for t in state.tensors().values() if t.is_floating_point())


@pytest.mark.usefixtures("late")
def test_a_hook_that_is_due_sees_no_step_that_was_not_finite() -> None:
    seen = []
    hooks = [ScheduledHook(lambda step: step % 4 == 0, lambda state: seen.append(state.step))]
    problem = failing(8, math.nan)
    with pytest.raises(UserError, match="at step 8 "):
        train(problem.start_run(), problem, 12, hooks=hooks)
    assert seen == [4]


class Waits(Synchronisations):
    """Synchronisations but for numbers whose copy to the host was begun a step before."""

    paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.names)
        found = super().__torch_dispatch__(func, types, args, kwargs)
        if self.paused:
            del self.names[before:]
        return found


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Waits, list[int]]]:
    """Count waits, and how many passes were begun between the copy of a number and its reading."""
    waits, lags, passes = Waits(), list[int](), [0]
    plain_copy, plain_read, plain_pass = (
        HostCopy.__init__,
        HostCopy.read,
        training_loop._accumulate_gradients,
    )

    def copy(self: HostCopy, values: Tensor) -> None:
        plain_copy(self, values)
        self.made = passes[0]  # type: ignore[attr-defined]

    def read(self: HostCopy) -> list[float]:
        lags.append(passes[0] - self.made)  # type: ignore[attr-defined]
        before, waits.paused = len(waits.names), True
        found = plain_read(self)
        waits.paused = False
        del waits.names[before:]
        return found

    def forward_and_backward(*args: Any) -> Any:
        passes[0] += 1
        return plain_pass(*args)

    monkeypatch.setattr(HostCopy, "__init__", copy)
    monkeypatch.setattr(HostCopy, "read", read)
    monkeypatch.setattr(training_loop, "_accumulate_gradients", forward_and_backward)
    with waits:
        yield waits, lags


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("hooks", [(), (ScheduledHook(lambda step: False, lambda state: None),)])
def test_a_step_waits_for_no_number(masked: bool, hooks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tiny(training=replace(BASE, gradient_accumulation_steps=1))
    state = train(problem.start_run(), problem, 3)
    if masked:
        state.set_masks_(topk_masks(magnitude(state.prunable_parameters()), 0.5))
    with counted(monkeypatch) as (waits, lags):
        train(state, problem, 1, hooks=hooks)
        one = waits.count
        train(state, problem, 11, hooks=hooks)
    assert waits.count - one == one  # those of the beginning and the end of a training, none of a step
    assert lags == [0] + 10 * [1] + [0]  # the last step of a training is read at its end


def test_at_once_a_step_waits_for_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the count above sees what it has to."""
    problem = tiny()
    state = train(problem.start_run(), problem, 3)
    with counted(monkeypatch) as (waits, lags):
        train(state, problem, 1)
        one = waits.count
        train(state, problem, 11)
    assert waits.count - one >= one + 10
    assert lags == []


def test_an_optimizer_that_cannot_skip_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loop, "LATE_DEVICES", ("cpu",))
    for name in ("sgd", "rmsprop", "nadam", "adafactor"):
        problem = failing(3, math.nan, training=replace(BASE, optimizer=name))
        state = train(problem.start_run(), problem, 2)
        assert not can_skip_update(state)
        before = tensors(state)
        with pytest.raises(UserError, match="at step 3 "):
            train(state, problem, 2)
        assert same(tensors(state), before)


def steep(outputs: Tensor, batch: Batch) -> Tensor:
    """A loss whose gradients overflow float32 by the largest scales."""
    return 1e3 * functional.cross_entropy(outputs, batch["labels"])


def with_scaler(problem: Problem, scale: float = 2.0**16) -> TrainState:
    state = problem.start_run()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=5)
    return state


@pytest.mark.parametrize("kind", [(), ("cpu",)])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_scaled_loss_gives_the_same_weights(optimizer: Any, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power of two rounds nothing in float32."""
    monkeypatch.setattr(training_loop, "LATE_DEVICES", kind)
    problem = tiny(training=replace(BASE, optimizer=optimizer))
    plain, state = train(problem.start_run(), problem, 12), train(with_scaler(problem), problem, 12)
    assert same(tensors(plain), tensors(state))
    assert state.scaler is not None
    assert state.scaler.get_scale() == 2.0**18


@pytest.mark.parametrize("kind", [(), ("cpu",)])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_whose_scaled_gradients_overflow_is_left_out(
    optimizer: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_loop, "LATE_DEVICES", kind)
    watch = Watch()
    problem = tiny(training=replace(BASE, optimizer=optimizer), observer=watch, criterion=steep)
    state = with_scaler(problem, scale=2.0**127)
    seen: list[int] = []
    train(state, problem, 1, observe=lambda state: seen.append(state.step))
    assert same(dict(state.model.named_parameters()), dict(problem.pretrained.named_parameters()))
    assert (state.step, seen) == (1, [])
    assert state.scaler is not None
    assert state.scaler.get_scale() == 2.0**126
    train(state, problem, 20)
    assert not same(dict(state.model.named_parameters()), dict(problem.pretrained.named_parameters()))
    assert all(math.isfinite(loss) for loss in watch.curve("loss"))


def test_an_extrapolation_keeps_no_gradient_that_overflows() -> None:
    problem = tiny(training=replace(BASE, extrapolate=0.5), criterion=steep)
    state = train(with_scaler(problem, scale=2.0**127), problem, 20)
    assert state.scaler is not None
    assert state.scaler.get_scale() < 2.0**127
    assert all(t.isfinite().all() for t in state.tensors().values())


@pytest.mark.usefixtures("late")
def test_an_extrapolation_is_read_at_once() -> None:
    problem = failing(4, math.nan, training=replace(BASE, extrapolate=0.5))
    state = train(problem.start_run(), problem, 3)
    before = tensors(state)
    with pytest.raises(UserError, match="at step 4 "):
        train(state, problem, 4)
    assert same(tensors(state), before)


@pytest.mark.parametrize("kind", [(), ("cpu",)])
def test_a_scaled_loss_that_is_not_finite_ends_the_run(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose gradients are finite, since a constant was added to it."""
    monkeypatch.setattr(training_loop, "LATE_DEVICES", kind)
    problem = tiny()
    state = train(with_scaler(problem), problem, 3)
    before = tensors(state)
    with pytest.raises(UserError, match=r"^the loss is inf at step 4 "):
        train(state, problem, 4, penalty=lambda state: torch.tensor(math.inf))
    assert state.step == 3
    assert same(tensors(state), before)


def test_the_scale_is_saved_with_the_state() -> None:
    problem = tiny(criterion=steep)
    once = train(with_scaler(problem, 2.0**127), problem, 14)
    first = train(with_scaler(problem, 2.0**127), problem, 7)
    then = with_scaler(problem, 2.0**127)
    then.load_state_(tensors(first), first.facts())
    train(then, problem, 7)
    assert same(tensors(then), tensors(once))
    assert then.scaler is not None
    assert once.scaler is not None
    assert then.scaler.state_dict() == once.scaler.state_dict()
