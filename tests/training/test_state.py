"""A run in progress: what a snapshot holds, and what pruning leaves."""

import copy

import pytest
import torch
from torch import Tensor

from conftest import same, tiny
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import Masks
from sparsesoup.methods.scores import magnitude
from sparsesoup.training.config import TrainingConfig, TrainingOverrides
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState

OPTIMIZERS = ("adamw", "adam", "sgd", "rmsprop")


def settings(optimizer: str) -> TrainingConfig:
    return TrainingConfig(learning_rate=2e-3, batch_size=16, weight_decay=0.1, optimizer=optimizer)


def bits(state: TrainState) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in state.tensors().items()}


def halve(state: TrainState, sparsity: float = 0.5) -> Masks:
    return topk_masks(magnitude(state.prunable_parameters()), sparsity, within=state.masks)


def trained(problem: Problem, steps: int = 5) -> TrainState:
    state = train(problem.start_run(), problem, steps)
    state.set_masks_(halve(state))
    state.memory["look"] = torch.arange(3.0)
    state.notes["stages"] = [{"step": 5}]
    return state


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_restoring_returns_to_the_bit(optimizer: str) -> None:
    problem = tiny(training=settings(optimizer))
    state = trained(problem)
    before, point = bits(state), state.take_snapshot()
    for _ in range(2):  # it can be returned to again
        train(state, problem, 4, stream=("fork",))
        state.set_masks_(halve(state, 0.8))
        state.memory["look"] += 1
        state.memory["more"] = torch.ones(1)
        state.notes["stages"].append({"step": 9})
        state.notes["why"] = "a fork"
        state.halt = True
        assert not same(bits(state), before)
        state.restore_snapshot_(point)
        assert same(bits(state), before)
        assert (state.step, state.halt) == (5, False)
        assert state.notes == {"stages": [{"step": 5}]}
        assert set(state.memory) == {"look"}
    assert any(n.startswith("optimizer/") for n in before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_that_was_forked_ends_as_one_that_never_was(optimizer: str) -> None:
    problem = tiny(training=settings(optimizer))
    plain = train(trained(problem), problem, 10)
    state = trained(problem)
    for _ in range(2):
        train(state, problem, 5)
        here = state.take_snapshot()
        train(
            state,
            problem,
            3,
            stream=("fork",),
            label="weak",
            protocol=TrainingOverrides(rate=2.0, dropout=0.5, share=0.5),
        )
        state.set_masks_(halve(state, 0.9))
        state.restore_snapshot_(here)
    assert same(bits(state), bits(plain))


def test_a_snapshot_before_the_first_step_has_no_moments_and_brings_none_back() -> None:
    problem = tiny()
    state = problem.start_run()
    origin = state.take_snapshot()
    train(state, problem, 3)
    assert state.optimizer.state
    state.restore_snapshot_(origin)
    assert not state.optimizer.state
    assert same(bits(train(state, problem, 3)), bits(train(problem.start_run(), problem, 3)))


def test_a_snapshot_is_a_copy() -> None:
    problem = tiny()
    state = trained(problem)
    point = state.take_snapshot()
    frozen = {n: t.clone() for n, t in point.tensors.items()}
    state.restore_snapshot_(point)
    train(state, problem, 3)
    state.memory["look"].zero_()
    state.set_masks_(halve(state, 0.9))
    assert same(point.tensors, frozen)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pruning_clears_weights_and_moments_of_what_it_prunes_and_nothing_else(optimizer: str) -> None:
    problem = tiny(training=settings(optimizer))
    state = train(problem.start_run(), problem, 5)
    before, params = bits(state), state.prunable_parameters()
    state.set_masks_(halve(state))
    moments = 0
    for name, mask in state.masks.items():
        assert not params[name][~mask].any()
        assert params[name][mask].equal(before[f"model/{name}"][mask])
        for key, value in state.optimizer.state[params[name]].items():
            if value.shape == mask.shape:
                moments += 1
                old = before[f"optimizer/{key}/{name}"]
                assert old[~mask].any()
                assert not value[~mask].any()
                assert value[mask].equal(old[mask])
            else:
                assert value.equal(before[f"optimizer/{key}/{name}"])
    assert moments == 3 * {"adamw": 2, "adam": 2, "sgd": 1, "rmsprop": 2}[optimizer]
    untouched = {n: t for n, t in bits(state).items() if not any(name in n for name in state.masks)}
    assert same(untouched, {n: before[n] for n in untouched})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_forgetting_starts_the_optimizer_afresh(optimizer: str) -> None:
    problem = tiny(training=settings(optimizer))
    state = train(problem.start_run(), problem, 5)
    weights = {n: p.detach().clone() for n, p in state.model.named_parameters()}
    state.reset_optimizer_()
    assert same(dict(state.model.named_parameters()), weights)
    fresh = problem.start_run()
    with torch.no_grad():
        for name, p in fresh.model.named_parameters():
            p.copy_(weights[name])
    state.step = fresh.step = 0
    assert same(bits(train(state, problem, 3)), bits(train(fresh, problem, 3)))


def test_a_state_goes_to_disk_and_into_a_fresh_run_without_loss() -> None:
    problem = tiny(training=settings("rmsprop"))
    state = trained(problem)
    tensors, facts = bits(state), copy.deepcopy(state.facts())
    other = problem.start_run()
    other.load_state_(tensors, facts)
    assert same(bits(other), bits(state))
    assert other.facts() == state.facts()
    assert same(bits(train(other, problem, 4)), bits(train(state, problem, 4)))
    assert facts == {"step": 5, "notes": {"stages": [{"step": 5}]}, "masked": 0.0}
