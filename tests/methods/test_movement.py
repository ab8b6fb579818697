"""Learned masks as runs: what a signed score promises, the schedule, and what is left of the gates at the end."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional

from conftest import Searched, same, tiny, watched
from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Block, CoupledGroups, Element
from sparsesoup.core.masking import score_thresholds
from sparsesoup.core.masks import count_kept
from sparsesoup.core.schedules import CubicSchedule
from sparsesoup.methods.gates.attach import attach_gates, gates_of, underlying_weight
from sparsesoup.methods.learned_masks import PhaseShares, straight_through_gates
from sparsesoup.methods.movement import MagnitudeStraightThrough, MovementPruning
from sparsesoup.methods.soft_movement_and_l0 import HardConcreteL0, SoftMovement
from sparsesoup.training.batching import Batch
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.cost import CostTracker


class Swap:
    """A net of two matrices, the first one masked; its weights are so small that the loss is nearly linear in them."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x, self.y = (torch.randn(8, n, generator=draw, dtype=torch.float64) for n in (5, 3))
        self.weight = 1e-3 * torch.randn(4, 5, generator=draw, dtype=torch.float64)
        self.out = torch.randn(3, 4, generator=draw, dtype=torch.float64)
        self.mask = torch.arange(20).view(4, 5) % 2 == 0

    def loss(self, weight: Tensor) -> Tensor:
        return ((self.x @ weight.T).tanh() @ self.out.T - self.y).square().mean()

    def movement(self) -> Tensor:
        """dL/dS = dL/dW' * W, by hand."""
        leaf = (self.weight * self.mask).requires_grad_()
        (grad,) = torch.autograd.grad(self.loss(leaf), leaf)
        return grad * self.weight

    def swapped(self, out: int, into: int) -> Tensor:
        mask = self.mask.clone().view(-1)
        mask[out], mask[into] = False, True
        return mask.view(4, 5)

    def step_of(self, out: int, into: int, rate: float) -> tuple[Tensor, Tensor]:
        """(mask before, mask after) one SGD step on scores where these two lie next to each other at the threshold."""
        score = Parameter(torch.where(self.mask, 1e3, -1e3).double())
        with torch.no_grad():
            score.view(-1)[out], score.view(-1)[into] = 1e-12, 0.0
        layer = nn.Linear(5, 4, bias=False, dtype=torch.float64)
        layer.weight.data.copy_(self.weight)
        attach_gates(layer, (CoupledGroups((("weight", Element),)),), straight_through_gates([score]))
        ((_, gate),) = gates_of(layer)

        def look() -> Tensor:
            gate.level = score_thresholds({"": score.detach()}, {"": 1}, 0.5)[""]
            return layer.weight != 0

        before = look()
        self.loss(layer.weight).backward()
        torch.optim.SGD([score], lr=rate).step()
        return before, look()


def test_a_swap_that_movement_makes_lowers_the_loss() -> None:
    """Sanh et al. 2020, appendix: each step that takes one weight in for another decreases the loss, to first order."""
    net = Swap()
    m, plain, made = net.movement().flatten(), net.loss(net.weight * net.mask), 0
    for out in range(0, 20, 2):
        for into in range(1, 20, 2):
            before, after = net.step_of(out, into, 1e-3)
            assert before.equal(net.mask)
            if m[into] < m[out]:  # its score rises above the other's
                assert after.equal(net.swapped(out, into))
                assert net.loss(net.weight * after) < plain
                made += 1
            else:
                assert after.equal(net.mask)
                assert net.loss(net.weight * net.swapped(out, into)) > plain
    assert 20 < made < 80


def test_a_swap_by_the_size_of_a_score_may_raise_the_loss() -> None:
    """A large negative score is that of a weight which training shrinks: |S| takes it in."""
    net, rate = Swap(), 1e-3
    m, plain = net.movement().flatten(), net.loss(net.weight * net.mask)
    out, into = min(range(0, 20, 2), key=lambda i: abs(float(m[i]))), max(range(1, 20, 2), key=lambda i: float(m[i]))
    score = torch.where(net.mask, 1e3, 0.0).double().flatten()
    score[out], score[into] = 1 + 1e-12, -1.0
    after = score - rate * m
    assert after[into].abs() > after[out].abs()
    best = after.abs().topk(10).indices
    mask = torch.zeros(20, dtype=torch.bool)
    mask[best] = True
    assert mask.view(4, 5).equal(net.swapped(out, into))
    assert net.loss(net.weight * mask.view(4, 5)) > plain


class Spy:
    """An objective that looks at the weights as the model sees them at each training step."""

    def __init__(self) -> None:
        self.masked: list[dict[str, Tensor]] = []
        self.level: list[list[float]] = []
        self.behind: list[dict[str, Tensor]] = []

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        names = [name for name, _ in gates_of(model)]
        if names:
            seen = {n: model.get_submodule(n.removesuffix(".weight")).weight for n in names}
            self.masked.append({n: t.detach() == 0 for n, t in seen.items() if isinstance(t, Tensor)})
            self.level.append([float(gate.level) for _, gate in gates_of(model)])
            self.behind.append({n: underlying_weight(model, n).detach().clone() for n in names})
        return functional.cross_entropy(model(batch["x"]), batch["labels"])

    def shares(self) -> list[float]:
        return [sum(int(m.sum()) for m in table.values()) / 2000 for table in self.masked]


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("method", [MovementPruning, MagnitudeStraightThrough])
def test_the_masked_share_is_on_the_cubic_curve_whenever_thresholds_are_set(method: Any, scope: str) -> None:
    spy = Spy()
    with watched() as watch:
        problem = tiny(objective=spy, observer=watch, steps=80)
        method(scope=scope, every_steps=5).run(problem, 0.6)
    curve, shares = CubicSchedule(8, 56), spy.shares()
    assert len(shares) == 72
    for step, (share, levels_now) in enumerate(zip(shares, spy.level, strict=True)):
        if step <= 8:
            assert share == 0.0
        elif step % 5 == 0 or step == 56:
            assert share == pytest.approx(curve.sparsity_at(step, 0.6), abs=2e-3), step
        elif step != 9:
            assert levels_now == spy.level[step - 1], step
    told = watch.curve("sparsity")
    assert told[9:72] == [
        0.6 - 0.6 * (1 - (min(k // 5 * 5, 55) - 8) / 48) ** 3 if k < 56 else 0.6 for k in range(10, 73)
    ]
    assert told[72:] == [pytest.approx(0.6)] * 8
    # Carried over, they stay true enough between two settings.
    assert max(abs(s - t) for s, t in zip(shares[56:], told[55:71], strict=True)) < 0.15


def test_by_magnitude_masked_weights_stay_behind_their_masks_and_may_return() -> None:
    spy = Spy()
    with watched() as watch:
        training = TrainingConfig(learning_rate=0.1, batch_size=16, optimizer="sgd", weight_decay=0.0)
        ticket = MagnitudeStraightThrough(every_steps=5).run(tiny(objective=spy, steps=80, training=training), 0.5)
    before = watch.before[0]  # just before the masks are fixed
    closed = {n: spy.masked[-1][n] for n in before}
    assert sum(int(m.sum()) for m in closed.values()) > 900
    assert all(before[n].all() for n in before)
    back = [int((was[n] & ~now[n]).sum()) for was, now in zip(spy.masked, spy.masked[1:], strict=False) for n in was]
    assert sum(back) > 0
    assert count_kept(ticket.masks) == 1000
    assert all(not ticket.weights[n][~m].any() for n, m in ticket.masks.items())


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize(
    "method",
    [SoftMovement(score_rate=0.5), HardConcreteL0(score_rate=0.5), MovementPruning(), MagnitudeStraightThrough()],
)
def test_trimming_keeps_what_the_gates_rank_highest(method: Any, scope: Any) -> None:
    checkpointer = Searched(CostTracker())
    ticket = replace(method, scope=scope).run(tiny(steps=40, meter=checkpointer.meter, checkpointer=checkpointer), 0.6)
    kept_scores = {n: checkpointer.scores[n][m] for n, m in ticket.masks.items()}
    cut_scores = {n: checkpointer.scores[n][~m] for n, m in ticket.masks.items()}
    if scope == "global":
        kept_scores, cut_scores = ({"": torch.cat(list(table.values()))} for table in (kept_scores, cut_scores))
    assert all(kept_scores[n].min() >= cut_scores[n].max() for n in kept_scores)
    assert all(len(scores.unique()) > 100 for scores in checkpointer.scores.values())


@pytest.mark.parametrize(
    "method", [SoftMovement(score_rate=0.5, pattern=Block(5, 4)), MovementPruning(scope="global", pattern=Block(5, 4))]
)
def test_blocks_fall_whole_and_in_the_order_of_their_scores(method: Any) -> None:
    checkpointer, by_fate = Searched(CostTracker()), {True: [float("inf")], False: [-float("inf")]}
    ticket = method.run(tiny(steps=40, meter=checkpointer.meter, checkpointer=checkpointer), 0.6)
    for name, mask in ticket.masks.items():
        counts = mask.float().unflatten(0, (-1, 5)).unflatten(2, (-1, 4)).sum((1, 3)).flatten()
        assert set(counts.unique().tolist()) <= {0.0, 20.0}
        assert len(checkpointer.scores[name]) == mask.numel() / 20
        for score, count in zip(checkpointer.scores[name].tolist(), counts.tolist(), strict=True):
            by_fate[count > 0].append(score)
    assert count_kept(ticket.masks) == 800
    assert min(by_fate[True]) >= max(by_fate[False])


@pytest.mark.parametrize(
    "make",
    [
        lambda: PhaseShares(warmup=-0.1),
        lambda: PhaseShares(warmup=1.0),
        lambda: PhaseShares(settle=0.0),
        lambda: PhaseShares(settle=0.4, cooldown=0.3),
        lambda: MovementPruning(every_steps=0),
        lambda: MagnitudeStraightThrough(every_steps=0),
        lambda: PhaseShares(warmup=0.5, cooldown=0.5),
        lambda: PhaseShares(warmup=float("nan")),
        lambda: MovementPruning(start="magnitude", score_rate=0.0),
        lambda: MovementPruning(start="magnitude", score_rate=float("inf")),
        lambda: MovementPruning(score_rate=1e-2),
        lambda: SoftMovement(penalty=-1.0),
        lambda: SoftMovement(penalty=float("inf")),
        lambda: SoftMovement(threshold=0.0),
        lambda: SoftMovement(threshold=1.0),
        lambda: HardConcreteL0(start=-2.4),
        lambda: HardConcreteL0(score_rate=float("nan")),
    ],
)
def test_impossible_settings_are_refused_in_one_line(make: Callable[[], object]) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "phases", [PhaseShares(), PhaseShares(warmup=0.6), PhaseShares(warmup=0.0), PhaseShares(settle=0.3)]
)
def test_too_few_steps_are_refused_with_the_least_that_do(phases: PhaseShares) -> None:
    problem, least = tiny(steps=1), 0
    with pytest.raises(UserError, match=r"needs at least \d+; raise steps or epochs") as caught:
        MovementPruning(phases=phases).run(problem, 0.5)
    assert not problem.meter.to_json()
    least = int(str(caught.value).split("at least ")[1].split(";")[0])
    with pytest.raises(UserError, match=f"needs at least {least};"):
        MovementPruning(phases=phases).run(tiny(steps=least - 1), 0.5)
    assert count_kept(MovementPruning(phases=phases).run(tiny(steps=least), 0.5).masks) == 1000


@pytest.mark.parametrize(
    "method",
    [SoftMovement(score_rate=0.5), HardConcreteL0(score_rate=0.5), MovementPruning(), MagnitudeStraightThrough()],
)
def test_nothing_of_the_gates_is_left_and_the_pretrained_model_is_untouched(method: Any) -> None:
    problem = tiny(steps=40)
    before = {n: t.clone() for n, t in problem.pretrained.state_dict().items()}
    with watched() as watch:
        ticket = method.run(problem, 0.6)
    assert same(problem.pretrained.state_dict(), before)
    assert ticket.weights.keys() == before.keys()
    assert watch.state is not None
    living = {id(p) for p in watch.state.model.parameters()}
    assert {id(p) for group in watch.state.optimizer.param_groups for p in group["params"]} == living
    assert {id(p) for p in watch.state.optimizer.state} == living
    assert not list(gates_of(watch.state.model))
    assert type(watch.state.model.wide) is nn.Linear


def test_scores_that_begin_at_magnitudes_and_hardly_learn_keep_the_largest_weights() -> None:
    for pattern in (Element, Block(5, 4)):
        problem = tiny(steps=40)
        ticket = MovementPruning(start="magnitude", score_rate=1e-12, pattern=pattern).run(problem, 0.7)
        for name, mask in ticket.masks.items():
            size = pattern.sum_over_tiles(problem.pretrained.get_parameter(name).detach().abs())
            kept_groups = pattern.sum_over_tiles(mask.float()) > 0
            assert size[kept_groups].min() >= size[~kept_groups].max(), name


def test_scores_that_begin_at_magnitudes_learn_at_the_rate_of_the_weights() -> None:
    problem = tiny(steps=40)
    own = problem.training.learning_rate
    one = MovementPruning(start="magnitude").run(problem, 0.7)
    assert same(one.masks, MovementPruning(start="magnitude", score_rate=own).run(tiny(steps=40), 0.7).masks)
    assert not same(one.masks, MovementPruning(start="magnitude", score_rate=3 * own).run(tiny(steps=40), 0.7).masks)
    assert not same(one.masks, MovementPruning().run(tiny(steps=40), 0.7).masks)


@pytest.mark.parametrize("steps", [60, 600])
@pytest.mark.parametrize("make", [MovementPruning, SoftMovement])
def test_a_run_whose_weights_cannot_travel_is_doubted_with_the_figure(make: Any, steps: int) -> None:
    problem = tiny(steps=steps)
    doubts = make().doubts(problem, 0.7)
    sizes = torch.cat([problem.pretrained.get_parameter(n).detach().abs().flatten() for n in problem.targets])
    start = steps // 10
    travel = sum(1e-2 * (step + 1) / (start + 1) for step in range(start)) / sizes.mean().item()
    assert travel == pytest.approx(0.25 if steps == 60 else 2.5, rel=0.15)
    assert bool(doubts) == (steps == 60)
    assert not doubts or f"can travel {travel:.2g} times the mean |weight| (2.7 in the paper)" in doubts[0]
    assert not make(pattern=Block(5, 4)).doubts(problem, 0.7)
    assert not MovementPruning(start="magnitude").doubts(problem, 0.7)
