"""The methods against oracles by another road."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from conftest import Watch, add_weak_mask, same, tiny, watched
from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Row
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import Masks, hamming_distance, sparsity
from sparsesoup.core.schedules import ConstantRate, CubicSchedule
from sparsesoup.core.targets import target_parameters
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods import METHODS, Method
from sparsesoup.methods.gradual import GradualPruning, GradualStar
from sparsesoup.methods.imp import IterativeMagnitudePruning
from sparsesoup.methods.isp import PROTOCOLS, InstantSoup
from sparsesoup.methods.isp_code import InstantSoupCode
from sparsesoup.methods.isp_paper import InstantSoupPaper
from sparsesoup.methods.one_shot import OneShot
from sparsesoup.methods.scores import magnitude
from sparsesoup.methods.weak_masks import consensus_masks, masks_with_quorum, prune_to_soup
from sparsesoup.training.batching import Batch
from sparsesoup.training.config import TrainingConfig, TrainingOverrides
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState

PAPER = replace(METHODS["isp-paper"], stage=0.05, cut=0.3, weak_masks=3, weak_steps=3)
CODE = replace(METHODS["isp-code"], stage=0.2, weak=0.3, cut=0.2, weak_masks=4, warmup=5)


def oneshot(problem: Problem, weights: dict[str, Tensor], share: float) -> Masks:
    return topk_masks(magnitude({n: weights[n] for n in problem.targets}), share)


def retrained(problem: Problem, masks: Masks) -> TrainState:
    state = problem.start_run()
    state.set_masks_(masks)
    return train(state, problem, problem.steps)


def recorder() -> tuple[Callable[[nn.Module, Batch], Tensor], list[tuple[float, ...]], list[dict[str, Tensor]]]:
    """A loss that writes down the rows of every training batch and the weights before it."""
    rows: list[tuple[float, ...]] = []
    weights: list[dict[str, Tensor]] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        rows.append(tuple(batch["x"][:, 0].tolist()))
        weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return functional.cross_entropy(model(batch["x"]), batch["labels"])

    return loss, rows, weights


def test_magnitude_is_the_one_shot_mask_of_the_pretrained_weights_trained() -> None:
    problem = tiny()
    masks = oneshot(problem, problem.pretrained.state_dict(), 0.6)
    ticket = METHODS["magnitude"].run(tiny(), 0.6)
    assert same(ticket.masks, masks)
    state = retrained(problem, masks)
    algebra.apply_masks_(state.prunable_parameters(), masks)
    assert same(ticket.weights, state.model.state_dict())


def test_random_differs_between_seeds_and_from_magnitude() -> None:
    one, other = (METHODS["random"].run(tiny(seed=seed), 0.6).masks for seed in (0, 1))
    plain = METHODS["magnitude"].run(tiny(), 0.6).masks
    for a, b in combinations((one, other, plain), 2):
        assert hamming_distance(a, b) == pytest.approx(2 * 0.6 * 0.4, abs=0.05)  # as independent draws do
    density = [float(m.float().mean()) for m in one.values()]
    assert density == [pytest.approx(0.4, abs=0.09)] * 3


def test_imp_of_one_round_is_the_mask_of_the_dense_run_retrained_from_theta_0() -> None:
    dense = METHODS["dense"].run(tiny(), 0.0)
    problem = tiny()
    masks = oneshot(problem, dense.weights, 0.6)
    ticket = IterativeMagnitudePruning(cut=0.9).run(tiny(), 0.6)
    assert ticket.notes == {"rounds": 1}
    assert same(ticket.masks, masks)
    state = retrained(problem, masks)
    algebra.apply_masks_(state.prunable_parameters(), masks)
    assert same(ticket.weights, state.model.state_dict())
    assert {k: c["steps"] for k, c in ticket.cost.items()} == {"search": 60, "main": 60, "validation": 0}


def test_imp_removes_its_cut_of_what_remains_each_round() -> None:
    with watched() as watch:
        IterativeMagnitudePruning(cut=0.3).run(tiny(steps=5), 0.6)
    assert [algebra.count_kept(m) for m in watch.pruned] == [1400, 980, 800]


@pytest.mark.parametrize("rewind", [0.0, 0.2])
def test_every_round_of_imp_starts_from_the_same_weights_and_sees_the_same_rows(rewind: float) -> None:
    loss, rows, weights = recorder()
    with watched() as watch:
        IterativeMagnitudePruning(cut=0.5, rewind=rewind).run(tiny(steps=20, objective=loss), 0.75)
    first, length = round(rewind * 20), 20 - round(rewind * 20)
    assert len(rows) == first + 3 * length
    starts = [first + i * length for i in range(3)]
    assert len(set(rows[first : first + length])) == length
    for number, at in enumerate(starts[1:]):
        assert rows[at : at + length] == rows[first : first + length]
        for n, p in weights[first].items():
            assert weights[at][n].equal(p * watch.pruned[number][n] if n in watch.pruned[number] else p)


def test_rewinding_forgets_the_moments_of_the_round() -> None:
    with watched() as watch:
        plain = IterativeMagnitudePruning(cut=0.5, rewind=0.2).run(tiny(steps=20), 0.5)
    problem = tiny(steps=20)
    state = train(problem.start_run(), problem, 4)
    state.set_masks_(watch.pruned[-1])
    train(state, problem, 16)
    assert same(
        {n: plain.weights[n] for n in problem.targets},
        {n: p.data + 0.0 for n, p in state.prunable_parameters().items()},
    )


def test_rate_rewinding_keeps_the_weights_and_takes_the_rate_and_other_rows() -> None:
    loss, rows, weights = recorder()
    with watched() as watch:
        problem = tiny(steps=20, objective=loss, observer=watch)
        IterativeMagnitudePruning(cut=0.5, rewind=0.2, back="rate").run(problem, 0.75)
    for number, at in enumerate((20, 36)):
        for n, p in watch.before[number].items():
            assert weights[at][n].equal(p * watch.pruned[number][n])
            assert not weights[at][n].equal(weights[4][n])
        assert rows[at : at + 16] != rows[4:20]
    rates = [r["rate"] for r in watch.records]
    assert rates[20:36] == rates[36:52] == rates[4:20] == [problem.rate_schedule()(step) for step in range(4, 20)]


def test_rate_rewinding_starts_each_round_with_an_optimizer_of_its_own() -> None:
    ticket = IterativeMagnitudePruning(cut=0.5, rewind=0.2, back="rate").run(tiny(steps=20), 0.5)
    problem = tiny(steps=20)
    state = train(problem.start_run(), problem, 20)  # the first round is the dense run
    fresh = problem.start_run()
    fresh.model.load_state_dict(state.model.state_dict())
    fresh.step = 4
    fresh.set_masks_(topk_masks(magnitude(state.prunable_parameters()), 0.5))
    train(fresh, problem, 16, stream=("round", 1))
    assert same(ticket.weights, {n: t + 0.0 for n, t in fresh.model.state_dict().items()})


def test_a_ticket_is_masked_whatever_its_run_left() -> None:
    problem = tiny()
    state = problem.start_run()
    state.masks = oneshot(problem, problem.pretrained.state_dict(), 0.5)
    ticket = problem.finish_run(state, why="a test")
    assert all((ticket.weights[n] != 0).equal(m) for n, m in ticket.masks.items())
    assert ticket.notes == {"why": "a test"}


def test_gradual_follows_the_cubic_curve_at_every_step() -> None:
    watch = Watch()
    GradualPruning(start=0.1, stop=0.7, every=0.01).run(tiny(observer=watch), 0.8)
    plan = CubicSchedule(6, 42)
    for step, found in enumerate(watch.curve("sparsity"), start=1):
        assert found == pytest.approx(1 - round(2000 * (1 - plan.sparsity_at(step, 0.8))) / 2000), step
    assert watch.curve("sparsity")[41:] == [pytest.approx(0.8)] * 19


def test_gradual_from_step_0_prunes_before_the_first_step() -> None:
    with watched() as watch:
        GradualPruning(start=0.0, stop=0.5, every=0.25).run(tiny(steps=20, observer=watch), 0.8)
    assert [algebra.count_kept(m) for m in watch.pruned] == [2000, 600, 400]  # 0.8 (1 - (1 - t)^3) at t = 0, 1/2, 1


def test_gmp_star_takes_a_large_first_step_and_rewinds_the_rate_at_each_pruning() -> None:
    watch = Watch()
    with watched() as spy:
        problem = tiny(observer=watch, training=TrainingConfig(learning_rate=1e-2, batch_size=16, warmup_ratio=0.0))
        GradualStar(first=0.5, start=0.1, stop=0.7, prunings=5, low=0.1).run(problem, 0.9)
    assert len(spy.pruned) == 5
    curve, rates = [0.0, *watch.curve("sparsity")], watch.curve("rate")
    prunings = [step for step in range(1, 61) if curve[step] > curve[step - 1]]
    assert prunings == [6, 15, 24, 33, 42]
    assert curve[6] == pytest.approx(0.5)
    assert curve[42] == pytest.approx(0.9)
    assert [rates[step] for step in prunings] == [1e-2] * 5
    for step in prunings[1:]:
        assert rates[step - 1] < 0.25 * rates[step]
    assert rates[:6] == sorted(rates[:6], reverse=True)
    assert rates[0] == 1e-2
    assert rates[42:] == sorted(rates[42:], reverse=True)
    assert rates[-1] == pytest.approx(1e-2 * (0.1 + 0.9 / 18))


@pytest.mark.parametrize(("sparsity", "first"), [(0.4, 0.3), (0.5, 0.375), (0.9, 0.675), (0.98, 0.7)])
def test_gmp_star_leaves_a_quarter_of_the_sparsity_to_the_later_prunings(sparsity: float, first: float) -> None:
    with watched() as spy:
        GradualStar().run(tiny(steps=40), sparsity)
    kept = [algebra.count_kept(m) for m in spy.pruned]
    assert kept[0] == round(2000 * (1 - first))
    assert kept[-1] == round(2000 * (1 - sparsity))
    assert kept == sorted(set(kept), reverse=True)
    assert len(kept) == 8


def test_gmp_star_refuses_a_first_pruning_that_takes_all() -> None:
    problem = tiny()
    with pytest.raises(UserError, match=r"^the first pruning of gmp-star would take all: first is 0.5, the sparsity"):
        GradualStar(first=0.5).run(problem, 0.5)
    assert not problem.meter.costs


def test_isp_whose_weak_runs_stand_still_is_isp_without_a_soup() -> None:
    """Then every weak mask is plain magnitude of the main run, and so is their consensus."""
    still = InstantSoup(
        stages=3, weak_masks=2, look_ahead=0.01, protocols=(TrainingOverrides(rate=0.0),), budget="extra"
    )
    plain = replace(METHODS["isp-no-soup"], stages=3)
    one, other = still.run(tiny(), 0.7), plain.run(tiny(), 0.7)
    assert same(one.masks, other.masks)
    assert same(one.weights, other.weights)
    assert [s["changed"] for s in one.notes["stages"]] == [0.0] * 3
    assert [s["same"] for s in one.notes["stages"]] == [1.0] * 3
    assert one.cost["weak"]["steps"] == 6
    moving = replace(still, protocols=PROTOCOLS).run(tiny(), 0.7)
    assert not same(moving.masks, one.masks)
    assert any(s["changed"] > 0 for s in moving.notes["stages"])


def test_each_stage_of_isp_ends_exactly_at_its_target() -> None:
    with watched() as watch:
        ticket = InstantSoup(stages=4, weak_masks=2, look_ahead=0.01, finish=0.4).run(tiny(), 0.8)
    plan = CubicSchedule(0, 4)
    assert [algebra.count_kept(m) for m in watch.pruned] == [
        round(2000 * (1 - plan.sparsity_at(i, 0.8))) for i in (1, 2, 3, 4)
    ]
    main = 60 - 8
    assert [s["step"] for s in ticket.notes["stages"]] == [round(0.6 * main * i / 4) for i in (1, 2, 3, 4)]


@pytest.mark.parametrize(("budget", "main", "weak"), [("included", 60 - 3 * 2 * 3, 18), ("extra", 60, 18)])
def test_the_budget_says_whether_weak_steps_come_out_of_t(budget: Any, main: int, weak: int) -> None:
    watch = Watch()
    method = InstantSoup(stages=3, weak_masks=2, look_ahead=0.05, finish=0.4, budget=budget)
    ticket = method.run(tiny(observer=watch), 0.7)
    assert {k: c["steps"] for k, c in ticket.cost.items()} == {"main": main, "weak": weak, "validation": 0}
    assert ticket.notes["budget"] == budget
    assert ticket.notes["weak_share"] == weak / 60
    assert watch.curve("rate") == [tiny().rate_schedule(main)(step) for step in range(main)]


def soup(problem: Problem, count: int = 4, steps: int = 5) -> tuple[TrainState, list[Masks]]:
    """A state with the votes of a few weak masks, and those masks."""
    state, masks, before = train(problem.start_run(), problem, 10), [], {}
    for j in range(count):
        add_weak_mask(problem, state, steps, 0.5, PROTOCOLS[j], lambda step: 1e-2, (0, j))
        now = {n: state.memory[f"votes/{n}"] for n in state.targets}
        masks.append({n: now[n] > before.get(n, torch.zeros_like(now[n])) for n in now})
        before = now
    return state, masks


def test_a_look_ahead_leaves_the_main_run_to_the_bit() -> None:
    problem = tiny(training=TrainingConfig(learning_rate=1e-2, batch_size=16, weight_decay=0.1))
    plain = train(problem.start_run(), problem, 10)
    state, _ = soup(problem)
    assert same({n: t for n, t in state.tensors().items() if not n.startswith("memory/")}, plain.tensors())
    assert problem.meter.costs["weak"].steps == 20
    state.memory.clear()
    assert same(train(state, problem, 10).tensors(), train(plain, problem, 10).tensors())


def test_the_consensus_of_one_weak_mask_is_that_mask() -> None:
    state, (mask,) = soup(tiny(), count=1)
    assert algebra.count_kept(mask) == 1000
    assert same(consensus_masks(state, 0.5), mask)
    assert same(masks_with_quorum(state, 1), mask)


def test_the_consensus_lies_between_what_all_and_what_any_keep() -> None:
    state, masks = soup(tiny())
    found, every, some = consensus_masks(state, 0.5), algebra.intersection(masks), algebra.union(masks)
    assert algebra.count_kept(found) == 1000
    assert same(some, masks_with_quorum(state, 1))
    assert same(every, masks_with_quorum(state, 4))
    for n, m in found.items():
        assert not (every[n] & ~m).any()
        assert not (m & ~some[n]).any()
    votes, look = algebra.count_votes(masks), {n: state.memory[f"look/{n}"] for n in found}
    level = min(int(votes[n][m].min()) for n, m in found.items())
    chosen = torch.cat([look[n][(votes[n] == level) & m] for n, m in found.items()])
    passed = torch.cat([look[n][(votes[n] == level) & ~m] for n, m in found.items()])
    assert len(chosen) > 0
    assert len(passed) > 0
    assert chosen.min() >= passed.max()


def test_the_protocols_give_weak_masks_that_differ() -> None:
    _, masks = soup(tiny())
    assert all(hamming_distance(a, b) > 0.01 for a, b in combinations(masks, 2))


def test_each_protocol_is_in_force_in_its_weak_run() -> None:
    """The same rows and noise, another protocol: another look-ahead."""
    looks = []
    for protocol in (
        TrainingOverrides(),
        TrainingOverrides(rate=2.0),
        TrainingOverrides(weight_decay=0.5),
        TrainingOverrides(dropout=0.4),
    ):
        problem = tiny()
        state = train(problem.start_run(), problem, 5)
        add_weak_mask(problem, state, 5, 0.5, protocol, ConstantRate(protocol.rate_factor(0) * 1e-2), (0, 0))
        looks.append({n: t for n, t in state.memory.items() if n.startswith("look/")})
    assert all(not same(a, b) for a, b in combinations(looks, 2))
    watch = Watch()
    problem = tiny(observer=watch)
    InstantSoup(stages=3, weak_masks=4, look_ahead=0.01, finish=0.4, protocols=PROTOCOLS).run(problem, 0.7)
    peak, rates = problem.rate_schedule(60 - 12), watch.curve("rate", "weak")
    assert rates == [p.rate * peak(at) for at in (10, 19, 29) for p in PROTOCOLS]  # thirds of 60 % of 48 main steps


def test_serving_notes_what_the_soup_changed_and_clears_the_votes() -> None:
    problem = tiny()
    state, masks = soup(problem)
    state.memory["other"] = torch.ones(1)
    plain, merged = topk_masks(magnitude(state.prunable_parameters()), 0.5), consensus_masks(state, 0.5)
    agreed = algebra.vote_agreement(algebra.count_votes(masks), 4)
    prune_to_soup(state, 4, merged)
    assert set(state.memory) == {"other"}
    assert same(state.masks, merged)
    assert state.notes["stages"] == [
        {"step": 10, "sparsity": 0.5, "weak_masks": 4, "changed": hamming_distance(merged, plain), **agreed}
    ]
    assert 0 < agreed["same"] < 1


def test_isp_as_the_paper_says_it_lets_the_soup_decide_nothing() -> None:
    ticket = PAPER.run(tiny(), 0.7)
    stages = ticket.notes["stages"]
    assert len(stages) == 4
    assert [s["changed"] for s in stages] == [0.0] * 4
    assert all(s["same"] < 1.0 for s in stages)  # though its weak masks do differ
    assert [s["step"] for s in stages] == [1, 3, 6, 10]
    assert [s["sparsity"] for s in stages] == [pytest.approx(s, abs=1e-3) for s in (0.3, 0.51, 0.657, 0.7)]
    assert ticket.cost["weak"]["steps"] == 4 * 3 * 3
    assert ticket.notes["weak_share"] == 36 / 60


def test_the_union_of_isps_code_removes_no_more_than_its_members() -> None:
    with watched() as watch:
        ticket = replace(CODE, stage=0.1, cut=0.1).run(tiny(), 0.6)
    stages, now = ticket.notes["stages"], 0.0
    assert len(stages) > 3
    for stage, mask in zip(stages, watch.pruned, strict=False):
        assert stage["sparsity"] == sparsity(mask)
        assert now < stage["sparsity"] < now + 0.1 * (1 - now)  # less than a member, since its members differ
        now = stage["sparsity"]
    assert 0.55 < now < 0.6  # then one shot does the rest
    assert algebra.count_kept(watch.pruned[-1]) == 800
    assert len(watch.pruned) == len(stages) + 1
    assert ticket.cost["main"]["steps"] == 60
    assert ticket.cost["weak"]["steps"] == len(stages) * 4 * 5


def test_patterns_and_scopes_reach_the_masks() -> None:
    rows = OneShot(pattern=Row).run(tiny(), 0.5)
    assert all((m.all(1) | ~m.any(1)).all() for m in rows.masks.values())
    assert algebra.count_kept(rows.masks) == 1000
    each = GradualPruning(scope="tensor").run(tiny(), 0.5)
    assert [int(m.sum()) for m in each.masks.values()] == [200, 200, 600]
    two = OneShot(scope="2:4").run(tiny(), 0.5)
    assert all((m.reshape(-1, 4).sum(1) == 2).all() for m in two.masks.values())


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: GradualPruning(start=0.7, stop=0.5), "start"),
        (lambda: GradualPruning(every=0.0), "every"),
        (lambda: GradualStar(prunings=1), "prunings"),
        (lambda: GradualStar(first=1.0), "first"),
        (lambda: IterativeMagnitudePruning(cut=0.0), "cut"),
        (lambda: IterativeMagnitudePruning(rewind=1.0), "rewind"),
        (lambda: InstantSoup(stages=0), "stages"),
        (lambda: InstantSoup(weak_masks=256), "weak_masks"),
        (lambda: InstantSoup(look_ahead=0.0), "look_ahead"),
        (lambda: InstantSoup(protocols=()), "protocols"),
        (lambda: InstantSoupPaper(weak_steps=0), "weak_steps"),
        (lambda: InstantSoupCode(cut=1.0), "cut"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], Method], setting: str) -> None:
    with pytest.raises(UserError, match=rf"^{setting}: must be .*, got ") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_soup_that_leaves_no_step_at_any_t_is_refused() -> None:
    with pytest.raises(UserError, match="no number of steps is enough for isp with 5 stages of 4 weak masks"):
        InstantSoup(look_ahead=0.2).run(tiny(), 0.5)


def test_a_schedule_without_a_soup_speaks_of_none_when_steps_are_few() -> None:
    with pytest.raises(UserError, match="2 steps are too few: isp with 5 stages, without a soup, needs at least"):
        METHODS["isp-no-soup"].run(tiny(steps=2), 0.5)


def test_the_ticket_says_how_it_did_on_the_validation_rows() -> None:
    problem = tiny()
    ticket: Ticket = METHODS["dense"].run(problem, 0.0)
    state = problem.start_run()
    state.model.load_state_dict(ticket.weights)
    state.model.eval()
    batch = problem.validation.batch(range(96))
    right = (problem.predict(state.model, batch).argmax(1) == batch["labels"]).float().mean()
    assert ticket.metrics == {"accuracy": pytest.approx(float(right))}
    assert target_parameters(problem.pretrained, problem.targets).keys() == ticket.masks.keys()
