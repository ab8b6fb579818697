"""The methods that score by data: what they prune by, when, and that they train on what was there."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from conftest import Watch, same, tiny, tiny_double, watched
from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Row
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import Masks
from sparsesoup.core.schedules import CubicSchedule
from sparsesoup.core.targets import target_parameters
from sparsesoup.methods import METHODS, Method
from sparsesoup.methods.gradient_flow import GradientFlow
from sparsesoup.methods.pruning_at_init import Grasp, Snip
from sparsesoup.methods.scores.activation import wanda_scores
from sparsesoup.methods.scores.calibration import calibration_batches
from sparsesoup.methods.scores.gradient import hessian_product, task_gradient
from sparsesoup.methods.wanda import Wanda
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.loop import train, train_head
from sparsesoup.training.problem import Problem
from tiny_bert import bert

ONCE = ("snip", "grasp", "wanda")


def masks_by_hand(name: str, problem: Problem, share: float) -> Masks:
    """The masks of theta_0 by the published formula, with the weights of the problem itself."""
    model, rows = problem.pretrained, calibration_batches(problem, 32)
    params = {n: p.detach() for n, p in target_parameters(model, problem.targets).items()}
    if name == "wanda":
        return topk_masks(wanda_scores(problem, model, rows), share, scope="row")
    g = task_gradient(problem, model, rows)
    if name == "snip":
        return topk_masks({n: (g[n] * p).abs() for n, p in params.items()}, share)
    product = hessian_product(problem, model, rows, g)
    return topk_masks({n: (p * product[n]).abs() for n, p in params.items()}, share)


def test_the_published_grasp_removes_the_largest_with_its_sign() -> None:
    problem = tiny()
    model, rows = problem.pretrained, calibration_batches(problem, 32)
    product = hessian_product(problem, model, rows, task_gradient(problem, model, rows, 200.0), 200.0)
    params = target_parameters(model, problem.targets)
    removed = topk_masks({n: -p.detach() * product[n] for n, p in params.items()}, 0.4)
    ticket = Grasp(measure="increase", temperature=200.0).run(tiny(), 0.6)
    assert same(ticket.masks, {n: ~m for n, m in removed.items()})


@pytest.mark.parametrize("name", ONCE)
def test_a_one_shot_ticket_is_theta_0_pruned_by_its_score_and_trained(name: str) -> None:
    problem = tiny()
    masks = masks_by_hand(name, problem, 0.6)
    ticket = METHODS[name].run(tiny(), 0.6)
    assert same(ticket.masks, masks)
    state = problem.start_run()  # nothing of theta_0 is drawn anew
    state.set_masks_(masks)
    train(state, problem, problem.steps)
    algebra.apply_masks_(state.prunable_parameters(), masks)
    assert same(ticket.weights, state.model.state_dict())
    plain = METHODS["magnitude"].run(tiny(), 0.6).masks
    assert algebra.hamming_distance(plain, ticket.masks) > 0.05


def test_grasp_keeps_what_the_explicit_hessian_says() -> None:
    problem = tiny_double()
    model, rows = problem.pretrained.eval(), calibration_batches(problem, 4)
    batch = problem.train.batch([i for part in rows for i in part])
    names, params = zip(*target_parameters(model, problem.targets).items(), strict=True)

    def loss(*weights: torch.Tensor) -> torch.Tensor:
        table = dict(zip(names, weights, strict=True))
        outputs = torch.func.functional_call(model, table, (batch["x"].double(),))
        return problem.criterion(outputs / 200.0, batch)

    given = tuple(p.detach() for p in params)
    slopes = torch.autograd.functional.jacobian(loss, given)
    blocks = torch.autograd.functional.hessian(loss, given)
    scores = {}
    for name, weight, row in zip(names, given, blocks, strict=True):
        product = sum(torch.tensordot(h, g, dims=2) for h, g in zip(row, slopes, strict=True))
        scores[name] = weight * product
    published = Grasp(batches=4, measure="increase", temperature=200.0)
    assert same(published.run(tiny_double(), 0.5).masks, topk_masks(scores, 0.5))
    preserving = replace(published, measure="preserve")
    assert same(
        preserving.run(tiny_double(), 0.5).masks, topk_masks({n: score.abs() for n, score in scores.items()}, 0.5)
    )


@pytest.mark.parametrize(("name", "times"), [("snip", 1), ("grasp", 2), ("wanda", 1)])
def test_scoring_is_charged_beside_the_training(name: str, times: int) -> None:
    cost = replace(METHODS[name], batches=3).run(tiny(), 0.6).cost
    assert {label: (c["steps"], c["examples"]) for label, c in cost.items()} == {
        "score": (0, times * 3 * 16),
        "main": (60, 960),
        "validation": (0, 96),
    }


HEAD = ("head.weight", "head.bias")  # of the tiny problem


@pytest.mark.parametrize("method", [Snip(batches=3, warmup=0.2), Grasp(batches=3, warmup=0.2)])
def test_a_warm_up_trains_the_head_alone_and_scores_with_it(method: Any) -> None:
    problem = tiny()
    state = problem.start_run()
    train_head(state, problem, 12)
    before = problem.pretrained.state_dict()
    moved = {n for n, t in state.model.state_dict().items() if not t.equal(before[n])}
    assert moved == {*HEAD}
    assert all(p.requires_grad for p in state.model.parameters())
    state.set_masks_(topk_masks(method.scores(problem, state), 0.6))
    train(state, problem, 48)
    algebra.apply_masks_(state.prunable_parameters(), state.masks)
    ticket = method.run(tiny(), 0.6)
    assert same(ticket.masks, state.masks)
    assert same(ticket.weights, state.model.state_dict())
    assert not same(ticket.masks, replace(method, warmup=0.0).run(tiny(), 0.6).masks)
    cost = ticket.cost
    assert (cost["search"]["steps"], cost["main"]["steps"]) == (12, 48)  # T in all
    assert 0 < cost["search"]["flops"] / 12 < 0.7 * cost["main"]["flops"] / 48  # no gradient goes through the rest


def test_a_warm_up_without_a_head_or_a_step_for_it_is_refused_before_the_first_step() -> None:
    for changes, said in (
        (
            {"head": ()},
            r"^method\.warmup: trains the head before .* has none that is trained; leave",
        ),
        ({"steps": 4}, r"^4 steps are too few: a warm-up of the head of 0\.1 T needs at least 6"),
    ):
        problem = tiny(**changes)
        with pytest.raises(UserError, match=said):
            Snip(warmup=0.1).run(problem, 0.5)
        assert not problem.meter.costs


def test_what_is_doubtful_about_a_score_is_said_of_it() -> None:
    fresh, known = tiny(fresh=HEAD), tiny()
    for method in (Snip(), Grasp()):
        assert "the head is randomly initialised; --method.warmup 0.1" in method.doubts(fresh, 0.5)[0]
        assert replace(method, warmup=0.1).doubts(fresh, 0.5) == method.doubts(known, 0.5) == []
    signed = Grasp(measure="increase")
    assert "a pre-trained model seldom survives it; --method.measure preserve" in signed.doubts(known, 0.5)[0]


def test_the_progress_of_scoring_is_shown_and_is_no_step_of_a_training() -> None:
    told: list[tuple[str, int, int]] = []
    shown: list[tuple[str, bool]] = []

    class Spy(Watch):
        def begin(self, label: str, step: int, until: int) -> None:
            told.append((label, step, until))

        def step(self, record: Mapping[str, Any]) -> None:
            super().step(record)
            shown.append((told[-1][0], bool(record)))

    watch = Spy()
    Grasp(batches=3).run(tiny(observer=watch), 0.6)
    assert told == [("score", 0, 3), ("score", 0, 3), ("main", 0, 60), ("validation", 0, 3)]
    assert shown[:6] == [("score", False)] * 6  # progress, with nothing to log
    assert len(shown) == 6 + 60 + 3


def test_patterns_and_scopes_reach_the_masks() -> None:
    for method in (Snip(batches=2, pattern=Row), Grasp(batches=2, pattern=Row)):
        assert all((m.all(1) | ~m.any(1)).all() for m in method.run(tiny(), 0.5).masks.values())
    for method in (Snip(batches=2, scope="2:4"), Wanda(batches=2, scope="2:4")):
        assert all((m.reshape(-1, 4).sum(1) == 2).all() for m in method.run(tiny(), 0.5).masks.values())
    each = GradientFlow(batches=2, scope="tensor").run(tiny(), 0.5)
    assert [int(m.sum()) for m in each.masks.values()] == [200, 200, 600]


def score_by_hand(measure: str, problem: Problem, state: Any, number: int) -> dict[str, torch.Tensor]:
    rows, model = calibration_batches(problem, 3, number), state.model
    g, params = task_gradient(problem, model, rows), {n: p.detach() for n, p in state.prunable_parameters().items()}
    if measure == "loss":
        return {n: (p * g[n]).abs() for n, p in params.items()}
    if measure == "change":
        first = target_parameters(problem.pretrained, problem.targets)
        return {n: (p - first[n].detach()).abs() * (p * g[n]).abs() for n, p in params.items()}
    product = hessian_product(problem, model, rows, {n: t.where(state.masks[n], 0.0) for n, t in g.items()})
    return {n: (p * product[n]).abs() for n, p in params.items()}


@pytest.mark.parametrize("measure", ["loss", "change", "norm"])
def test_gradient_flow_prunes_by_its_measure_after_each_stretch_of_training(measure: Any) -> None:
    with watched() as watch:
        ticket = GradientFlow(measure=measure, rounds=3, finish=0.4, batches=3).run(tiny(), 0.8)
    problem, plan = tiny(), CubicSchedule(0, 3)
    state, at = problem.start_run(), (12, 24, 36)
    for number, (step, found) in enumerate(zip(at, watch.pruned, strict=True), start=1):
        train(state, problem, step - state.step)
        goal = plan.sparsity_at(number, 0.8)
        assert algebra.count_kept(found) == round(2000 * (1 - goal))
        state.set_masks_(topk_masks(score_by_hand(measure, problem, state, number), goal, within=state.masks))
        assert same(found, state.masks)
    train(state, problem, 60 - state.step)
    algebra.apply_masks_(state.prunable_parameters(), state.masks)
    assert same(ticket.weights, state.model.state_dict())
    assert ticket.notes == {"measure": measure}
    assert ticket.cost["score"]["examples"] == 3 * 3 * 16 * (2 if measure == "norm" else 1)


def test_the_measures_of_gradient_flow_and_magnitude_find_different_masks() -> None:
    found = [GradientFlow(measure=m, batches=4).run(tiny(), 0.7).masks for m in ("loss", "change", "norm")]
    found.append(METHODS["gradual"].run(tiny(), 0.7).masks)
    assert all(algebra.hamming_distance(a, b) > 0.02 for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("name", [*ONCE, "gradient-flow"])
def test_every_one_of_them_runs_on_a_bert_that_trains_in_bf16(name: str) -> None:
    problem = bert(training=TrainingConfig(learning_rate=1e-3, batch_size=8, precision="bf16"), steps=12)
    method = replace(METHODS[name], batches=2, **({"measure": "norm"} if name == "gradient-flow" else {}))
    ticket = method.run(problem, 0.7)
    assert ticket.sparsity == pytest.approx(0.7, abs=1e-3)
    assert ticket.cost["score"]["flops"] > 0
    assert ticket.cost["score"]["padding"] > 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Snip(batches=0), "batches: must be at least 1, got 0"),
        (lambda: Wanda(batches=-1), "batches: must be at least 1, got -1"),
        (lambda: Grasp(batches=0), "batches: must be at least 1, got 0"),
        (lambda: Snip(warmup=1.0), "warmup: must be a share of T in [0, 1), got 1.0"),
        (lambda: Grasp(temperature=0.0), "temperature: must be above 0, got 0.0"),
        (lambda: Grasp(temperature=float("nan")), "temperature: must be above 0, got nan"),
        (lambda: GradientFlow(batches=0), "batches: must be at least 1, got 0"),
        (lambda: GradientFlow(rounds=0), "rounds: must be at least 1, got 0"),
        (lambda: GradientFlow(finish=1.0), "finish: must be a share of T in (0, 1), got 1.0"),
        (lambda: GradientFlow(finish=0.0), "finish: must be a share of T in (0, 1), got 0.0"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], Method], said: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value) == said
