"""Early-bird tickets: when the search stops, and what it leaves behind."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from conftest import Watch, same, tiny, watched
from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Block
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import Masks, hamming_distance, jaccard_distance
from sparsesoup.core.rng import cpu_generator
from sparsesoup.methods import METHODS
from sparsesoup.methods.early_bird import MEASURES, EarlyBird, load_past_mask, store_past_mask
from sparsesoup.methods.scores import magnitude, random_scores
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.loop import train
from sparsesoup.training.state import TrainState

NEVER = EarlyBird(threshold=0.0, search=0.5)  # on a model that moves


def redrawn(measure: Any, sparsity: float, checks: int = 12) -> tuple[EarlyBird, TrainState, list[bool]]:
    """What the rule says of masks that have nothing to do with one another."""
    method, problem = EarlyBird(measure=measure), tiny()
    state, said = problem.start_run(), []
    for number in range(checks):
        said.append(
            method._mask_has_settled(
                state, topk_masks(random_scores(state.prunable_parameters(), cpu_generator(0, number)), sparsity)
            )
        )
    return method, state, said


@pytest.mark.parametrize("measure", MEASURES)
def test_on_a_frozen_model_it_fires_at_its_first_full_check(measure: Any) -> None:
    problem = tiny(training=TrainingConfig(learning_rate=0.0, batch_size=16))
    ticket = EarlyBird(measure=measure, every_epochs=0.2, masks=4, threshold=0.0).run(problem, 0.9)
    found = ticket.notes["early_bird"]
    assert found["fired"] == 4 * 3  # a fifth of 16 steps is 3
    assert [check[measure] for check in found["checks"]] == [[0.0] * i for i in range(4)]
    assert {k: c["steps"] for k, c in ticket.cost.items()} == {"search": 12, "main": 60, "validation": 0}
    assert same(ticket.masks, topk_masks(magnitude(problem.start_run().prunable_parameters()), 0.9))


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95])
def test_by_kept_sets_it_never_fires_on_masks_redrawn_at_random(sparsity: float) -> None:
    method, state, said = redrawn("kept-sets", sparsity)
    assert not any(said)
    assert state.notes["early_bird"]["fired"] is None
    apart = [d for check in state.notes["early_bird"]["checks"] for d in check["kept-sets"]]
    assert min(apart) > 3 * method.threshold


def test_by_hamming_distance_masks_redrawn_at_random_pass_for_settled_at_95_percent() -> None:
    """The published rule is no rule there: 2 * 0.95 * 0.05 = 0.095 is below its threshold of 0.1."""
    _, state, said = redrawn("hamming", 0.95)
    assert said[:4] == [False] * 4
    assert any(said)
    apart = [d for check in state.notes["early_bird"]["checks"] for d in check["hamming"]]
    assert sum(apart) / len(apart) == pytest.approx(0.095, abs=0.005)
    assert not any(redrawn("hamming", 0.5)[2])


def test_the_distances_are_those_of_the_newest_mask_to_each_before_it() -> None:
    problem = tiny()
    state = problem.start_run()
    zero: Masks = {n: torch.zeros(t.shape, dtype=torch.bool) for n, t in problem.targets.items()}
    method = EarlyBird(masks=3, threshold=0.01, measure="kept-sets")
    rows = [(0, 10), (0, 8), (2, 10), (2, 10), (2, 10)]  # kept columns of the first matrix, 20 x 20 of 2,000 weights
    said = []
    for begin, end in rows:
        mask = {n: m.clone() for n, m in zero.items()}
        mask["blocks.0.weight"][:, begin:end] = True
        said.append(method._mask_has_settled(state, mask))
        state.step += 1
    checks = state.notes["early_bird"]["checks"]
    assert [c["step"] for c in checks] == [0, 1, 2, 3, 4]
    each = 20 / 2000  # one column
    assert [c["hamming"] for c in checks] == [
        [],
        [pytest.approx(2 * each)],
        [pytest.approx(2 * each), pytest.approx(4 * each)],
        [pytest.approx(4 * each), 0.0],
        [0.0, 0.0],
    ]
    assert [c["kept-sets"] for c in checks] == [
        [],
        [pytest.approx(2 / 10)],
        [pytest.approx(2 / 10), pytest.approx(4 / 10)],
        [pytest.approx(4 / 10), 0.0],
        [0.0, 0.0],
    ]
    assert said == [False, False, False, False, True]
    assert state.notes["early_bird"]["fired"] == 4


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_between_masks_of_one_size_either_distance_follows_from_the_other(sparsity: float) -> None:
    """Hamming h and kept share p make a Jaccard distance of 2 h / (2 p + h)."""
    one, other = (
        topk_masks(random_scores(tiny().start_run().prunable_parameters(), cpu_generator(i)), sparsity) for i in (1, 2)
    )
    h, p = hamming_distance(one, other), 1 - sparsity
    assert jaccard_distance(one, other) == pytest.approx(2 * h / (2 * p + h))


def test_memory_holds_the_last_masks_one_bit_a_weight() -> None:
    state = tiny().start_run()
    masks = [
        topk_masks(random_scores(state.prunable_parameters(), cpu_generator(0, number)), 0.7) for number in range(7)
    ]
    for mask in masks:
        store_past_mask(state, mask, 5)
    assert sum(t.numel() * t.element_size() for t in state.memory.values()) == 5 * 2000 / 8
    for index in range(5):
        assert same(load_past_mask(state, index), masks[2 + index])
    assert same(load_past_mask(state, -1), masks[-1])


def test_the_ticket_is_the_newest_mask_trained_from_theta_0_with_a_fresh_optimizer() -> None:
    problem = tiny()
    searched = train(problem.start_run(), problem, 10)
    masks = topk_masks(magnitude(searched.prunable_parameters()), 0.8)
    state = problem.start_run()
    state.set_masks_(masks)
    train(state, problem, 60)
    with watched() as watch:
        ticket = EarlyBird(threshold=0.5).run(tiny(), 0.8)
    assert ticket.notes["early_bird"]["fired"] == 10
    assert same(ticket.masks, masks)
    assert same(ticket.weights, {n: t + 0.0 for n, t in state.model.state_dict().items()})
    assert len(watch.pruned) == 1
    assert watch.state is not None
    assert not watch.state.memory


def test_a_rule_that_never_holds_ends_with_the_budget_and_takes_the_last_mask() -> None:
    watch, problem = Watch(), tiny()
    ticket = NEVER.run(tiny(observer=watch), 0.8)
    found = ticket.notes["early_bird"]
    assert found["fired"] is None
    assert [c["step"] for c in found["checks"]] == [*range(2, 31, 2)]
    assert all(len(c["hamming"]) == min(i, 4) for i, c in enumerate(found["checks"]))
    assert ticket.cost["search"]["steps"] == len(watch.curve("loss", "search")) == 30
    assert same(ticket.masks, topk_masks(magnitude(train(problem.start_run(), problem, 30).prunable_parameters()), 0.8))


def test_patterns_and_scopes_reach_the_mask_and_what_they_cannot_do_is_refused_before_the_first_step() -> None:
    ticket = EarlyBird(scope="tensor").run(tiny(), 0.5)
    assert [int(m.sum()) for m in ticket.masks.values()] == [200, 200, 600]
    for method in (EarlyBird(pattern=Block(32, 32)), EarlyBird(scope="2:4")):
        problem = tiny()
        with pytest.raises(UserError):
            method.run(problem, 0.8)
        assert not problem.meter.costs


class Elsewhere(torch.Tensor):
    """A mask on a GPU, as far as that it cannot be compared with one on the CPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.__xor__, torch.Tensor.__or__):
            assert all(isinstance(one, cls) for one in args), "two masks on two devices"
        return super().__torch_function__(func, types, args, kwargs)


def test_a_mask_that_is_drawn_on_a_gpu_is_compared_where_the_others_lie() -> None:
    state = tiny().start_run()
    for share in (0.5, 0.5, 0.7):
        masks = topk_masks(magnitude(state.prunable_parameters()), share)
        NEVER._mask_has_settled(state, {n: m.as_subclass(Elsewhere) for n, m in masks.items()})
    first, second, third = (check["hamming"] for check in state.notes["early_bird"]["checks"])
    assert (first, second) == ([], [0.0])
    assert third == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize(
    "change", [{"every_epochs": 0.0}, {"masks": 1}, {"threshold": 1.0}, {"search": 0.0}, {"search": 1.1}]
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^{next(iter(change))}: must be "):
        replace(METHODS["early-bird"], **change)
