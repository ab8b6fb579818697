"""Lottery Pools against the text of the paper, and against the rounds that it is made of."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import same, tiny
from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.methods import METHODS
from sparsesoup.methods.imp import IterativeMagnitudePruning
from sparsesoup.methods.lottery_pools import SHARES, LotteryPools, nearest_first
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import named_weights

pytestmark = pytest.mark.integration


def accuracy(problem: Problem, given: dict[str, Tensor]) -> float:
    """By hand, over all validation rows at once."""
    model = problem.start_run().model.eval()
    model.load_state_dict(given)
    batch = problem.validation.batch(range(96))
    with torch.no_grad():
        return float((model(batch["x"]).argmax(1) == batch["labels"]).float().mean())


def tickets(problem: Problem, cut: float, goals: list[float]) -> list[dict[str, Tensor]]:
    """The trained weights of every round of imp-rewind, zeros in them."""
    found: list[dict[str, Tensor]] = []

    def keep(number: int, end: Callable[[ActiveRun], Any] | None, run: ActiveRun) -> None:
        assert number == len(found)
        found.append({n: t.detach().clone() for n, t in named_weights(run.state.model).items()})
        if end is not None:
            end(run)

    class Kept(IterativeMagnitudePruning):
        def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
            origin, *rounds = self.plan_rounds(size, goals)
            return [origin, *(replace(phase, end=partial(keep, i, phase.end)) for i, phase in enumerate(rounds))]

    Kept(cut=cut, rewind=0.05).run(problem, goals[-1])
    assert len(found) == len(goals) + 1
    return found


def twin(
    problem: Problem, all_tickets: list[dict[str, Tensor]], target: int, kept: int
) -> tuple[Any, float, list[Any]]:
    """The algorithm word by word, in Python lists: (pool, its score, accepted as (ticket, share))."""
    pool, now, taken = all_tickets[target], accuracy(problem, all_tickets[target]), []
    distance, visits = 1, []
    while len(visits) < len(all_tickets) - 1:
        visits += [i for i in (target - distance, target + distance) if 0 <= i < len(all_tickets)]
        distance += 1
    for other in visits:
        best, best_score, best_share = pool, -1.0, 0.0
        for share in SHARES:
            mixture = {n: torch.lerp(w, all_tickets[other][n], share) for n, w in pool.items()}
            flat = [(n, i, abs(x)) for n in problem.targets for i, x in enumerate(mixture[n].flatten().tolist())]
            ranked = sorted(range(len(flat)), key=lambda i: (-flat[i][2], i))
            for i in ranked[kept:]:
                mixture[flat[i][0]].view(-1)[flat[i][1]] = 0.0
            if (score := accuracy(problem, mixture)) > best_score:
                best, best_score, best_share = mixture, score, share
        if best_score > now:
            pool, now = best, best_score
            taken.append((other, best_share))
    return pool, now, taken


def test_the_pool_is_that_of_a_slow_twin() -> None:
    goals = [0.4, 0.64, 0.7, 0.82]  # to 0.7 and one beyond
    ticket = LotteryPools(cut=0.4, beyond=1).run(tiny(), 0.7)
    pool, score, taken = twin(tiny(), tickets(tiny(), 0.4, goals), 3, 600)
    assert same(ticket.weights, {n: t + 0.0 for n, t in pool.items()})
    assert ticket.metrics["accuracy"] == ticket.notes["pool"]["score"] == pytest.approx(score)
    visited = ticket.notes["pool"]["visited"]
    assert [v["sparsity"] for v in visited] == [pytest.approx(s) for s in (0.64, 0.82, 0.4, 0.0)]
    order = {0.64: 2, 0.82: 4, 0.4: 1, 0.0: 0}
    assert [(order[round(v["sparsity"], 2)], v["share"]) for v in visited if v["accepted"]] == taken
    assert taken  # something was accepted, or this told little


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_pool_is_never_below_its_own_ticket_on_validation(seed: int) -> None:
    own = replace(METHODS["imp-rewind"], cut=0.5).run(tiny(seed=seed), 0.8)
    pool = LotteryPools(cut=0.5, beyond=2).run(tiny(seed=seed), 0.8)
    assert pool.notes["pool"]["own"] == own.metrics["accuracy"]
    assert pool.metrics["accuracy"] == pool.notes["pool"]["score"] >= own.metrics["accuracy"]
    assert algebra.count_kept(pool.masks) == 400
    scores = [v["score"] for v in pool.notes["pool"]["visited"] if v["accepted"]]
    assert scores == sorted(set(scores))  # each better than the last


def test_a_pool_of_no_neighbours_is_its_own_ticket() -> None:
    own = replace(METHODS["imp-rewind"], cut=0.5).run(tiny(), 0.8)
    pool = LotteryPools(cut=0.5, beyond=0, neighbours=0).run(tiny(), 0.8)
    assert same(pool.weights, own.weights)
    assert same(pool.masks, own.masks)
    assert {k: c["steps"] for k, c in pool.cost.items()} == {k: c["steps"] for k, c in own.cost.items()}


def test_what_is_not_pruned_is_mixed_in_too() -> None:
    pool = LotteryPools(cut=0.4).run(tiny(), 0.7)
    own = replace(METHODS["imp-rewind"], cut=0.4).run(tiny(), 0.7)
    assert any(v["accepted"] for v in pool.notes["pool"]["visited"])
    for name in ("embed.weight", "embed.bias", "head.weight", "head.bias", "blocks.0.bias"):
        assert not pool.weights[name].equal(own.weights[name]), name


def test_every_round_and_every_validation_is_on_the_meter() -> None:
    ticket = LotteryPools(cut=0.5, rewind=0.1, beyond=2, neighbours=3).run(tiny(), 0.8)
    # dense, 0.5, 0.75, 0.8, two beyond: the one of the target is strong, and so are the steps to the rewinding point.
    steps = {k: c["steps"] for k, c in ticket.cost.items()}
    assert steps == {"main": 6 + 54, "search": 5 * 54, "validation": 0}
    assert ticket.cost["validation"]["examples"] == 96 * (1 + 3 * len(SHARES) + 1)
    assert [round(v["sparsity"], 3) for v in ticket.notes["pool"]["visited"]] == [0.75, 0.9, 0.5]


def test_the_tickets_wait_on_disk_where_there_is_a_folder(tmp_path: Path) -> None:
    meter = CostTracker()
    checkpointer = Checkpointer(meter, tmp_path)
    LotteryPools(cut=0.5).run(tiny(meter=meter, checkpointer=checkpointer), 0.8)
    assert not checkpointer._stored
    assert {f.name for f in tmp_path.glob("stored-*")} == {f"stored-ticket-{i}.safetensors" for i in range(5)}


def test_buffers_that_count_are_left_as_they_are() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny().pretrained
            self.register_buffer("seen", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += int(self.training)
            return self.inner(x)

    targets = {f"inner.{n}": t for n, t in tiny().targets.items()}
    problem = tiny(pretrained=Counting(), targets=targets)
    ticket = LotteryPools(cut=0.5).run(problem, 0.7)
    assert ticket.weights["seen"].dtype == torch.int64
    assert ticket.weights["seen"] == 60
    assert algebra.count_kept(ticket.masks) == 600


def test_the_others_are_visited_from_the_nearest_on_the_denser_first() -> None:
    assert nearest_first(0, 3) == [1, 2]
    assert nearest_first(3, 6) == [2, 4, 1, 5, 0]
    assert nearest_first(4, 5) == [3, 2, 1, 0]


@pytest.mark.parametrize(
    "change", [{"beyond": -1}, {"neighbours": -1}, {"shares": ()}, {"shares": (0.5, 1.0)}, {"cut": 1.0}]
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^{next(iter(change))}: must be .*, got ") as caught:
        replace(METHODS["lottery-pools"], **change)
    assert "\n" not in str(caught.value)
