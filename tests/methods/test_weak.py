"""Weak masks: their learning rates, their moments, and how they are merged."""

import copy
import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from conftest import ISP_CODE, Watch, add_weak_mask, same, still, tiny
from reference import isp_code as twin
from sparsesoup.cli.prune import parse_arguments
from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import Masks
from sparsesoup.core.schedules import ConstantRate, CubicSchedule
from sparsesoup.methods import METHODS
from sparsesoup.methods.isp import InstantSoup
from sparsesoup.methods.weak_masks import consensus_masks, masks_with_quorum, superpose_masks
from sparsesoup.training.config import TrainingOverrides
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState

pytestmark = pytest.mark.integration

WIDE = (TrainingOverrides(rate=(5.0, 20.0)),)


def fork(problem: Problem, moments: Any, steps: int = 1) -> tuple[TrainState, dict[str, torch.Tensor]]:
    """A main run of ten steps, and the |theta| of a weak run from there."""
    state = train(problem.start_run(), problem, 10)
    here = copy.deepcopy(state.model)
    add_weak_mask(problem, state, steps, 0.5, TrainingOverrides(), lambda step: 3e-3, (0, 0), moments)
    state.model.load_state_dict(here.state_dict())
    return state, {n: state.memory[f"look/{n}"] for n in state.targets}


def test_a_weak_run_with_fresh_moments_begins_with_the_step_of_a_fresh_optimizer() -> None:
    problem = still()
    state, look = fork(problem, "fresh")
    model = copy.deepcopy(state.model).train()
    optimizer = twin.optimizer_of(model, 3e-3, 0.1)
    rows = next(problem.train.train_batches(16, 10, problem.seed, "weak", 0, 0))
    batch = problem.train.batch(rows)
    cross_entropy(model(batch["x"]), batch["labels"]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for name, t in look.items():
        assert t.allclose(model.get_parameter(name).detach().abs(), rtol=1e-5, atol=1e-7)
    inherited = fork(still(), "inherited")[1]
    assert not any(look[n].allclose(inherited[n], rtol=1e-4) for n in look)


def test_fresh_moments_leave_those_of_the_main_run_alone() -> None:
    problem, plain = still(), still()
    state, before = fork(problem, "fresh", steps=5)[0], train(plain.start_run(), plain, 10)
    state.memory.clear()
    assert same(state.tensors(), before.tensors())


def test_isp_can_start_its_weak_runs_afresh() -> None:
    short = InstantSoup(stages=2, weak_masks=2, look_ahead=0.05)
    one, other = short.run(tiny(), 0.7), replace(short, moments="fresh").run(tiny(), 0.7)
    assert not same(one.masks, other.masks)
    assert one.cost["weak"]["steps"] == other.cost["weak"]["steps"]


def test_a_range_of_rates_is_drawn_from_by_seed_and_run() -> None:
    protocol = TrainingOverrides(rate=(5.0, 20.0))
    drawn = [protocol.rate_factor(0, "weak", i, j) for i in range(20) for j in range(20)]
    assert drawn == [protocol.rate_factor(0, "weak", i, j) for i in range(20) for j in range(20)]
    assert drawn != [protocol.rate_factor(1, "weak", i, j) for i in range(20) for j in range(20)]
    assert len(set(drawn)) == len(drawn)
    assert 5.0 <= min(drawn) < 5.5
    assert 19.5 < max(drawn) <= 20.0
    assert sum(drawn) / len(drawn) == pytest.approx(12.5, abs=0.5)
    assert TrainingOverrides(rate=0.3).rate_factor(0, "weak", 1) == 0.3
    assert TrainingOverrides(rate=(2.0, 2.0)).rate_factor(7) == 2.0


PAIRS: dict[str, dict[str, Any]] = {
    "isp": {"stages": 2, "weak_masks": 3, "look_ahead": 0.02},
    "isp-paper": {"stage": 0.05, "cut": 0.4, "weak_masks": 3, "weak_steps": 2},
    "isp-code": ISP_CODE | {"weak_masks": 3, "warmup": 0, "near": 0.0},
    "model-soup": {},
    "instant-model-soup": {},
    "sparse-model-soup": {"phases": 2, "retrain": 0.2},
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_method_with_protocols_draws_each_runs_rate_from_the_range(name: str) -> None:
    def rates(factor: Any, seed: int = 0) -> list[float]:
        watch = Watch()
        method = replace(METHODS[name], **PAIRS[name], protocols=(TrainingOverrides(rate=factor),))
        dense = name in ("model-soup", "instant-model-soup")
        method.run(tiny(observer=watch, seed=seed), 0.0 if dense else 0.6)
        return [r["rate"] for r in watch.records]

    plain, drawn = rates(1.0), rates((2.0, 3.0))
    ratios = [b / a for a, b in zip(plain, drawn, strict=True) if a]
    other = {round(r, 9) for r in ratios} - {1.0}
    assert len(other) >= 3
    assert all(2.0 <= r <= 3.0 for r in other)
    assert drawn == rates((2.0, 3.0))
    assert drawn != rates((2.0, 3.0), seed=1)


@pytest.mark.parametrize("rate", [(3.0, 2.0), (-1.0, 2.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_a_range_of_rates_that_cannot_be_is_refused(rate: tuple[float, float]) -> None:
    with pytest.raises(UserError, match=r"^a protocol has rate >= 0 \(or two of them, the lower one first\)"):
        TrainingOverrides(rate=rate)


def soup(problem: Problem, count: int) -> tuple[TrainState, list[Masks]]:
    """A state with the votes of a few weak masks, and those masks."""
    state, masks, before = train(problem.start_run(), problem, 10), [], {}
    for j in range(count):
        factor = WIDE[0].rate_factor(0, j)
        add_weak_mask(problem, state, 5, 0.5, WIDE[0], ConstantRate(factor * 1e-2), (0, j))
        now = {n: state.memory[f"votes/{n}"] for n in state.targets}
        masks.append({n: now[n] > before.get(n, torch.zeros_like(now[n])) for n in now})
        before = now
    return state, masks


def test_the_intersection_is_the_vote_of_all_and_the_union_that_of_any() -> None:
    state, masks = soup(tiny(), 4)
    every, some = superpose_masks(state, "intersection", 4, 1.0), superpose_masks(state, "union", 4, 1.0)
    assert same(every, algebra.keep_if_voted(masks, 4))
    assert same(some, algebra.keep_if_voted(masks, 1))
    assert 0 < algebra.count_kept(every) < 1000 < algebra.count_kept(some)
    held = superpose_masks(state, "intersection", 4, 0.5)  # no sparser than asked
    assert algebra.count_kept(held) == 1000
    assert same(held, consensus_masks(state, 0.5))
    assert all((held[n] | ~every[n]).all() for n in held)
    assert same(superpose_masks(state, "union", 4, 0.5), masks_with_quorum(state, 1))


@pytest.mark.parametrize("merge", ["union", "intersection"])
def test_isp_takes_the_merged_set_of_each_stage_and_ends_exactly_at_the_sparsity(merge: Any) -> None:
    method = InstantSoup(stages=4, weak_masks=3, look_ahead=0.03, merge=merge, protocols=WIDE)
    ticket = method.run(tiny(), 0.6)
    *early, last = [stage["sparsity"] for stage in ticket.notes["stages"]]
    targets = [CubicSchedule(0, 4).sparsity_at(i, 0.6) for i in (1, 2, 3)]
    assert [reached < target for reached, target in zip(early, targets, strict=True)] == [merge == "union"] * 3
    assert max(early) <= last == pytest.approx(0.6)
    assert algebra.count_kept(ticket.masks) == 800


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("isp", {"stages": 3, "moments": "fresh"}),
    ("isp", {"stages": 3, "moments": "fresh", "merge": "intersection", "protocols": WIDE}),
    ("isp", {"stages": 3, "merge": "union", "protocols": WIDE}),
    ("isp-code", ISP_CODE | {"merge": "intersection", "protocols": WIDE, "rate_of": "peak"}),
    ("isp-code", ISP_CODE | {"stage": 0.075, "growing": True, "warmup": 1}),
]


@pytest.mark.parametrize("sparsity", [0.0, 0.317, 0.5, 0.9])
@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_every_variant_keeps_exactly_the_asked_number_and_is_a_function_of_the_seed(
    name: str, settings: dict[str, Any], sparsity: float
) -> None:
    method = replace(METHODS[name], **settings)
    one, two = method.run(tiny(steps=120), sparsity), method.run(tiny(steps=120), sparsity)
    assert algebra.count_kept(one.masks) == round(2000 * (1 - sparsity))
    assert same(one.weights, two.weights)
    assert same(one.masks, two.masks)


def test_isp_with_groups_merges_whole_groups() -> None:
    for merge in ("union", "intersection"):
        method = InstantSoup(stages=2, weak_masks=3, look_ahead=0.03, merge=merge, protocols=WIDE, structure="rows")  # type: ignore[arg-type]
        masks = method.run(tiny(), 0.5).masks
        assert all((m.all(1) | ~m.any(1)).all() for m in masks.values())


def test_settings_of_weak_masks_are_refused_without_any() -> None:
    for name in ("isp-no-soup", "isp --method.weak-masks 0"):
        for flag in ("moments fresh", "merge union", "look-ahead 0.1", "budget extra", "protocols '[{rate: 2}]'"):
            with pytest.raises(UserError, match=r"^method\.\w+: has no effect with weak_masks 0"):
                parse_arguments(shlex.split(f"{name} --method.{flag}"))
    with pytest.raises(UserError, match=r"^method\.weak_masks: method isp-no-soup has weak_masks 0, got 2"):
        parse_arguments(["isp-no-soup", "--method.weak-masks", "2"])


@pytest.mark.parametrize(
    ("given", "said"),
    [("[9, 2]", "the lower one first"), ("[1, 2, 3]", "rate"), ("fast", "rate"), ("[1]", "rate"), ("-1", "rate >= 0")],
)
def test_a_range_that_cannot_be_read_is_refused_in_one_line(given: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        parse_arguments(["isp", "--method.protocols", f"[{{rate: {given}}}]"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "masks", "calls"), [("isp", 0, 1), ("isp-paper", 1, 3)])
def test_a_stage_computes_its_plain_mask_once(
    name: str, masks: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for module in ("weak_masks", "select_masks"):
        where = f"sparsesoup.methods.{module}.topk_masks"
        monkeypatch.setattr(where, lambda *given, **more: made.append(1) or topk_masks(*given, **more))
    short = {"stage": 0.05, "cut": 0.4, "weak_steps": 2} if name == "isp-paper" else {}
    ticket = replace(METHODS[name], weak_masks=masks, **short).run(tiny(), 0.8)
    assert len(made) == calls * len(ticket.notes["stages"])
    assert len(ticket.notes["stages"]) > 1
