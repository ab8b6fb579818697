"""Averages of weights, and the methods that are made of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import Watch, same, tiny, watched
from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods import METHODS
from sparsesoup.methods.instant_model_soup import InstantModelSoup
from sparsesoup.methods.model_soup import PROTOCOLS, ModelSoup
from sparsesoup.methods.scores import magnitude
from sparsesoup.methods.sparse_soup import SparseModelSoup
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.config import TrainingOverrides
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState
from sparsesoup.training.weight_averaging import (
    average_weights,
    clone_weights,
    interpolate_weights,
    load_weights_,
    validation_score,
)

numbers = st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3)


@given(st.lists(numbers, min_size=1, max_size=6))
def test_an_average_is_the_sum_over_the_number(rows: list[list[float]]) -> None:
    found = average_weights({"w": torch.tensor(row)} for row in rows)["w"]
    mean = torch.tensor(rows, dtype=torch.float64).mean(0)
    assert torch.allclose(found.double(), mean, rtol=1e-5, atol=1e-3)


@given(numbers)
def test_an_average_of_one_or_of_equals_is_itself_to_the_bit(row: list[float]) -> None:
    one = {"w": torch.tensor(row) + 0.0, "count": torch.tensor(7)}
    assert same(average_weights([one]), one)
    assert same(average_weights([one, one, one]), one)


@given(numbers, numbers, st.floats(0, 1))
def test_an_interpolation_lies_between_and_its_ends_are_exact(a: list[float], b: list[float], share: float) -> None:
    one, other = {"w": torch.tensor(a)}, {"w": torch.tensor(b)}
    found = interpolate_weights(one, other, share)["w"]
    assert interpolate_weights(one, other, 0.0)["w"].equal(one["w"])
    assert interpolate_weights(one, other, 1.0)["w"].equal(other["w"])
    assert torch.allclose(found, (1 - share) * one["w"] + share * other["w"], rtol=1e-4, atol=1e-2)
    assert torch.where(one["w"] == 0, other["w"] == 0, False).logical_not().logical_or(found == 0).all()


def test_whole_numbers_are_taken_from_the_first() -> None:
    one, other = {"count": torch.tensor(3)}, {"count": torch.tensor(8)}
    assert interpolate_weights(one, other, 0.5)["count"] == 3
    assert average_weights([one, other])["count"] == 3
    assert interpolate_weights(one, other, 0.5)["count"].dtype == torch.int64


def test_soups_hold_copies() -> None:
    state = tiny().start_run()
    before, one = clone_weights(state.model), clone_weights(state.model)
    mixed = interpolate_weights(one, one, 0.0)
    load_weights_(state.model, {n: t + 1 for n, t in one.items()})
    assert same(one, before)
    assert same(mixed, before)
    mixed["head.bias"].add_(1)
    assert same(one, before)
    assert not any(t.requires_grad for t in mixed.values())


def test_weights_of_another_model_are_refused() -> None:
    one = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match="name different parameters: v, w"):
        interpolate_weights(one, {"v": torch.ones(2)}, 0.5)
    with pytest.raises(ValueError, match=r"weights of another model: .*w"):
        load_weights_(tiny().pretrained, one)
    with pytest.raises(ValueError, match="at least one member"):
        average_weights([])


def test_beginning_again_is_a_fresh_start_that_keeps_what_was_noted() -> None:
    problem = tiny()
    state = problem.start_run()
    state.set_masks_(topk_masks(magnitude(state.prunable_parameters()), 0.5))
    train(state, problem, 5)
    state.memory["votes"], state.notes["seen"] = torch.ones(1), 1
    problem.reset_to_pretrained_(state)
    assert same({n: t for n, t in state.tensors().items() if n != "memory/votes"}, problem.start_run().tensors())
    assert (state.step, state.notes, list(state.memory)) == (0, {"seen": 1}, ["votes"])
    assert not any(t.data_ptr() == p.data_ptr() for t, p in zip(
        state.model.parameters(), problem.pretrained.parameters(), strict=True))  # fmt: skip


# model-soup


def member(problem: Problem, number: int) -> dict[str, Tensor]:
    """One fine-tuning of a soup, by itself."""
    protocol = PROTOCOLS[number % len(PROTOCOLS)]
    decay, factor, state = problem.rate_schedule(), protocol.rate, problem.start_run()
    assert isinstance(factor, float)

    def rate(step: int) -> float:
        return factor * decay(step)

    train(state, problem, problem.steps, stream=("member", number), rate=rate, protocol=protocol)
    return clone_weights(state.model)


def validation(problem: Problem, given: dict[str, Tensor]) -> float:
    state = problem.start_run()
    load_weights_(state.model, given)
    return validation_score(problem, state)


def test_a_uniform_soup_is_the_mean_of_its_members_by_hand() -> None:
    members = [member(tiny(), number) for number in range(5)]
    ticket = ModelSoup(members=5, combine="uniform").run(tiny(), 0.0)
    for name, found in ticket.weights.items():
        mean = torch.stack([m[name].double() for m in members]).mean(0)
        assert torch.allclose(found.double(), mean, rtol=0, atol=1e-6), name
    assert ticket.notes["soup"] == {"members": [validation(tiny(), m) for m in members], "taken": [0, 1, 2, 3, 4]}
    assert ticket.cost["main"]["steps"] == 5 * 60
    assert ticket.cost["validation"]["examples"] == 96 * (5 + 1)


def test_the_members_differ_in_rows_and_in_rate() -> None:
    watch = Watch()
    ModelSoup(members=3, protocols=(TrainingOverrides(), TrainingOverrides(rate=0.5))).run(
        tiny(observer=watch, steps=20), 0.0
    )
    plain = [tiny(steps=20).rate_schedule()(step) for step in range(20)]
    assert watch.curve("rate") == [*plain, *(0.5 * r for r in plain), *plain]
    assert watch.curve("loss")[0] != watch.curve("loss")[40]


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_greedy_soup_is_never_below_its_best_member_on_validation(seed: int) -> None:
    ticket = ModelSoup(members=4).run(tiny(seed=seed, steps=30), 0.0)
    found = ticket.notes["soup"]
    assert ticket.metrics["accuracy"] >= max(found["members"])
    assert found["members"][found["taken"][0]] == max(found["members"])


def test_a_greedy_soup_takes_what_does_not_lower_it() -> None:
    """Word by word: sorted by validation, each tried in turn as one more part of the mean."""
    problem, members = tiny(steps=20, seed=6), []
    for number in range(5):
        state = train(problem.start_run(), problem, 20, stream=("member", number), rate=problem.rate_schedule())
        members.append(clone_weights(state.model))
    scores = [validation(problem, m) for m in members]
    order = sorted(range(5), key=lambda i: (-scores[i], i))
    taken, now, soup = order[:1], scores[order[0]], members[order[0]]
    for number in order[1:]:
        trial = {n: torch.stack([members[i][n] for i in [*taken, number]]).mean(0) for n in members[0]}
        if (found := validation(problem, trial)) >= now:
            taken, now, soup = [*taken, number], found, trial
    ticket = ModelSoup(members=5, protocols=(TrainingOverrides(),)).run(tiny(steps=20, seed=6), 0.0)
    assert len(taken) == 3  # a seed at which the parts are no halves
    assert ticket.notes["soup"] == {"members": scores, "taken": taken}
    assert ticket.metrics["accuracy"] == now
    assert all(torch.allclose(ticket.weights[n], t, rtol=0, atol=1e-6) for n, t in soup.items())


@pytest.mark.parametrize("combine", ["greedy", "uniform"])
def test_a_soup_of_one_is_that_fine_tuning(combine: Any) -> None:
    ticket = ModelSoup(members=1, combine=combine).run(tiny(), 0.0)
    assert same(ticket.weights, member(tiny(), 0))


def test_members_wait_on_disk_where_there_is_a_folder(tmp_path: Path) -> None:
    for name in ("model-soup", "sparse-model-soup", "instant-model-soup"):
        meter = CostTracker()
        problem = tiny(meter=meter, checkpointer=Checkpointer(meter, tmp_path / name), steps=20)
        METHODS[name].run(problem, 0.5 if name == "sparse-model-soup" else 0.0)
        assert not problem.checkpointer._stored
        assert len(list((tmp_path / name).glob("stored-*.safetensors"))) >= 3


# sparse-model-soup


def sparse(sparsity: float = 0.8, **settings: Any) -> tuple[Ticket, Any]:
    with watched() as watch:
        problem = tiny(observer=watch, steps=30)
        ticket = SparseModelSoup(**settings).run(problem, sparsity)
    return ticket, watch


def test_each_phase_removes_the_same_share_of_what_remains() -> None:
    ticket, watch = sparse(0.8, phases=3)
    kept = [algebra.count_kept(m) for m in watch.pruned]
    assert kept == [round(2000 * 0.2 ** (i / 3)) for i in (1, 2, 3)]
    assert ticket.notes == {"phases": [pytest.approx(1 - 0.2 ** (i / 3)) for i in (1, 2, 3)]}
    assert ticket.cost["main"]["steps"] == 30 + 3 * 3 * 6


def test_a_sparse_soup_is_the_mean_of_retrainings_of_one_mask_of_the_dense_run() -> None:
    ticket, watch = sparse(0.7, phases=1, members=3, retrain=0.5)
    problem = tiny(steps=30)
    dense = train(problem.start_run(), problem, 30)
    masks = topk_masks(magnitude(dense.prunable_parameters()), 0.7)
    assert same(watch.pruned[0], masks)
    assert same(ticket.masks, masks)
    members = []
    for number in range(3):
        state = problem.start_run()
        load_weights_(state.model, clone_weights(dense.model))
        state.set_masks_(masks)
        state.step = 15
        decay, protocol = problem.rate_schedule(15), PROTOCOLS[number]
        train(
            state, problem, 15, stream=("phase", 0, "member", number), protocol=protocol,
            rate=lambda step, decay=decay, factor=protocol.rate: factor * decay(step - 15),
        )  # fmt: skip
        members.append(clone_weights(state.model))
    for name, found in ticket.weights.items():
        assert torch.allclose(found, torch.stack([m[name] for m in members]).mean(0), rtol=0, atol=1e-6), name
    assert not members[0]["head.weight"].equal(members[1]["head.weight"])


def test_the_average_of_a_sparse_soup_keeps_the_zeros_of_its_mask_exactly(tmp_path: Path) -> None:
    meter = CostTracker()
    problem = tiny(meter=meter, checkpointer=Checkpointer(meter, tmp_path), steps=20)
    ticket = SparseModelSoup(phases=2, members=3, retrain=0.5).run(problem, 0.9)
    for number in range(3):  # before `Problem.ticket` could have masked them
        member = problem.checkpointer.get_artifact(f"member-1-{number}")
        for name, mask in ticket.masks.items():
            assert (member[name] != 0).equal(mask)
    soup = average_weights(problem.checkpointer.get_artifact(f"member-1-{number}") for number in range(3))
    for name, mask in ticket.masks.items():
        assert (soup[name] != 0).equal(mask)
        assert ticket.weights[name].equal(soup[name] + 0.0)


def test_a_sparse_soup_of_one_phase_and_one_plain_member_is_one_retraining() -> None:
    ticket, _ = sparse(0.6, phases=1, members=1, retrain=1.0, protocols=(TrainingOverrides(),))
    problem = tiny(steps=30)
    dense = train(problem.start_run(), problem, 30)
    masks = topk_masks(magnitude(dense.prunable_parameters()), 0.6)
    dense.set_masks_(masks)
    dense.reset_optimizer_()
    dense.step = 0
    train(dense, problem, 30, stream=("phase", 0, "member", 0))
    assert same(ticket.weights, {n: t + 0.0 for n, t in dense.model.state_dict().items()})


# instant-model-soup


def test_an_instant_soup_of_forks_that_are_left_out_is_a_dense_run() -> None:
    """Rate 0: a fork is theta_0 pruned by nothing, so no share of it is better than 0."""
    still = InstantModelSoup(sparsities=(0.0,), protocols=(TrainingOverrides(rate=0.0),), budget="extra")
    ticket, plain = still.run(tiny(), 0.0), METHODS["dense"].run(tiny(), 0.0)
    assert same(ticket.weights, plain.weights)
    assert [f["share"] for f in ticket.notes["soup"]["forks"]] == [0.0] * 4
    assert {k: c["steps"] for k, c in ticket.cost.items()} == {"main": 60, "weak": 8, "validation": 0}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_fork_makes_an_instant_soup_worse_on_validation(seed: int) -> None:
    problem = tiny(seed=seed)
    ticket = METHODS["instant-model-soup"].run(problem, 0.0)
    origin = validation_score(problem, problem.start_run())
    scores = [origin, *(f["score"] for f in ticket.notes["soup"]["forks"])]
    assert scores == sorted(scores)
    assert ticket.notes["soup"]["score"] == scores[-1]
    for before, fork in zip(scores, ticket.notes["soup"]["forks"], strict=False):
        assert (fork["share"] > 0) == (fork["score"] > before)
    assert [f["sparsity"] for f in ticket.notes["soup"]["forks"]] == [pytest.approx(s) for s in (0.1, 0.2, 0.3, 0.4)]


def test_an_instant_soup_is_that_of_a_slow_twin() -> None:
    method = InstantModelSoup(weak_models=3, look_ahead=0.1, sparsities=(0.3, 0.6), protocols=(TrainingOverrides(),))
    problem = tiny()
    soup = clone_weights(problem.start_run().model)
    for number in range(3):
        fork = problem.start_run()
        fork.set_masks_(topk_masks(magnitude(fork.prunable_parameters()), (0.3, 0.6, 0.3)[number]))
        train(fork, problem, 6, stream=("weak", number), rate=problem.rate_schedule(6), protocol=TrainingOverrides())
        mixtures = [interpolate_weights(soup, clone_weights(fork.model), share) for share in (0.0, *method.shares)]
        soup = max(mixtures, key=lambda weights: validation(problem, weights))
    state: TrainState = problem.start_run()
    load_weights_(state.model, soup)
    train(state, problem, 42, rate=problem.rate_schedule(42))
    ticket = method.run(tiny(), 0.0)
    assert any(f["share"] > 0 for f in ticket.notes["soup"]["forks"])
    assert same(ticket.weights, clone_weights(state.model))


@pytest.mark.parametrize(("budget", "main"), [("included", 60 - 4 * 3), ("extra", 60)])
def test_the_budget_says_whether_the_forks_come_out_of_t(budget: Any, main: int) -> None:
    watch = Watch()
    ticket = InstantModelSoup(look_ahead=0.05, budget=budget).run(tiny(observer=watch), 0.0)
    assert {k: c["steps"] for k, c in ticket.cost.items()} == {"main": main, "weak": 12, "validation": 0}
    assert (ticket.notes["budget"], ticket.notes["weak_share"]) == (budget, 12 / 60)
    assert ticket.cost["validation"]["examples"] == 96 * (1 + 4 * 5 + 1)
    assert watch.curve("rate") == [tiny().rate_schedule(main)(step) for step in range(main)]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model-soup", {"members": 0}),
        ("model-soup", {"protocols": ()}),
        ("sparse-model-soup", {"phases": 0}),
        ("sparse-model-soup", {"members": 0}),
        ("sparse-model-soup", {"retrain": 0.0}),
        ("sparse-model-soup", {"retrain": 1.5}),
        ("instant-model-soup", {"weak_models": 0}),
        ("instant-model-soup", {"look_ahead": 0.25}),
        ("instant-model-soup", {"sparsities": (1.0,)}),
        ("instant-model-soup", {"shares": (0.0, 0.5)}),
    ],
)
def test_impossible_settings_are_refused(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^{next(iter(change))}: must be .*, got ") as caught:
        replace(METHODS[name], **change)
    assert "\n" not in str(caught.value)
