"""Schedules: monotone, and both ends hit."""

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sparsesoup.core.schedules import (
    CubicSchedule,
    CyclicLinearDecay,
    LinearWarmupDecay,
    geometric_sparsities,
    min_feasible_steps,
)

PART = st.floats(0.0, 0.99)


@given(st.integers(0, 50), st.integers(0, 200), st.integers(1, 30), PART, PART)
def test_cubic_rises_from_start_to_end(start: int, length: int, every: int, initial: float, final: float) -> None:
    plan = CubicSchedule(start, start + length, every, initial)
    curve = [plan.sparsity_at(step, final) for step in range(start + length + 10)]
    assert all(a <= b + 1e-12 for a, b in pairwise(curve))
    assert all(value == final for value in curve[start + length :])
    if length:
        assert curve[: start + 1] == [pytest.approx(min(initial, final), abs=1e-12)] * (start + 1)
    assert max(curve) <= final + 1e-12


@given(st.integers(0, 50), st.integers(0, 200), st.integers(1, 30))
def test_cubic_prunes_at_both_ends_and_nowhere_outside(start: int, length: int, every: int) -> None:
    plan = CubicSchedule(start, start + length, every)
    due = [step for step in range(start + length + 50) if plan.is_pruning_step(step)]
    assert due[0] == start
    assert due[-1] == start + length
    assert all(b - a == every for a, b in pairwise(due[:-1]))
    assert length == 0 or due[-1] - due[-2] <= every


def test_cubic_is_the_papers_formula() -> None:
    plan = CubicSchedule(10, 30, initial=0.1)
    assert plan.sparsity_at(15, 0.9) == pytest.approx(0.9 + (0.1 - 0.9) * (1 - 5 / 20) ** 3)


@given(st.floats(0.01, 0.99), PART)
def test_geometric_rounds_remove_their_cut_until_the_goal(cut: float, final: float) -> None:
    goals = geometric_sparsities(cut, final)
    assert goals[-1] == final
    assert all(a < b for a, b in pairwise(goals))
    remaining = [1.0, *[1 - g for g in goals]]
    for before, after in pairwise(remaining[:-1]):
        assert after / before == pytest.approx(1 - cut)
    assert remaining[-1] >= remaining[-2] * (1 - cut) - 1e-8


@pytest.mark.parametrize("final", [1.0, 1.5, -0.1, float("nan")])
def test_geometric_refuses_a_goal_that_no_round_reaches(final: float) -> None:
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
        geometric_sparsities(0.2, final)


@given(st.integers(1, 300), st.floats(0.0, 0.9))
def test_decay_rises_to_its_peak_and_falls_to_zero(total: int, share: float) -> None:
    warmup = round(share * total)
    assume(warmup < total)
    rate = LinearWarmupDecay(0.5, warmup, total)
    curve = [rate(step) for step in range(total + 3)]
    assert max(curve) == curve[warmup] == 0.5
    assert curve[0] > 0
    assert all(a < b for a, b in pairwise(curve[: warmup + 1]))
    assert all(a > b for a, b in pairwise(curve[warmup : total + 1]))
    assert curve[total:] == [0.0, 0.0, 0.0]


@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 15), st.integers(1, 40))
def test_cycles_return_to_the_peak_at_each_pruning(start: int, cycles: int, every: int, rest: int) -> None:
    stop = start + cycles * every
    rate = CyclicLinearDecay(1.0, 0.1, start, stop, every, stop + rest)
    curve = [rate(step) for step in range(stop + rest + 2)]
    prunings = range(start, stop + 1, every)
    assert [curve[step] for step in prunings] == [1.0] * (cycles + 1)
    for step in range(1, stop + rest):
        if step not in prunings:
            assert curve[step] < curve[step - 1], step
    assert max(curve) == curve[0] == 1.0
    assert min(curve) == pytest.approx(0.1)
    assert curve[-2:] == [pytest.approx(0.1)] * 2


@given(st.floats(1e-6, 1.0), st.integers(1, 40), st.integers(1, 10_000))
def test_the_least_steps_fit_and_one_less_does_not(share: float, wanted: int, total: int) -> None:
    def fits(steps: int) -> bool:
        return round(share * steps) >= wanted

    assume(not fits(total))
    least = min_feasible_steps(fits, total)
    assert least is not None
    assert fits(least)
    assert not fits(least - 1)


def test_where_no_number_of_steps_fits_there_is_none() -> None:
    assert min_feasible_steps(lambda steps: False) is None
