"""The soups of benchmarks/soup_methods: T steps in all, exact masks, and controls that differ by the idea alone."""

import importlib
from pathlib import Path

import pytest
import torch

from conftest import tiny
from sparsesoup.core.masks import sparsity
from sparsesoup.methods.gradual_obs import GradualOBS

FOLDER = Path(__file__).parents[2] / "benchmarks" / "soup_methods"
ROWS = ("SCORES", "SHUFFLED", "VOTES", "WEIGHTS", "FORECAST", "TASTE", "BURSTS", "MEAN_RATE", "DROPS", "MEAN_DROP")


@pytest.fixture
def soups(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("soup_methods")


@pytest.mark.parametrize("row", ROWS)
def test_a_soup_has_the_steps_and_the_sparsity_of_the_method_without(row, soups) -> None:
    problem = tiny(steps=160)
    ticket = getattr(soups, row).method.run(problem, 0.8)
    steps = {label: cost["steps"] for label, cost in ticket.cost.items() if label in ("main", "weak")}
    assert sum(steps.values()) == 160
    assert (steps.get("weak", 0) > 0) == isinstance(getattr(soups, row).method, soups.ForkedOBS)
    assert sparsity(ticket.masks) == pytest.approx(0.8, abs=1e-9)


def test_forks_that_say_nothing_leave_the_masks_of_a_shorter_run(soups, monkeypatch) -> None:
    forked, steps = soups.SCORES.method, 160
    monkeypatch.setattr(soups.ForkedOBS, "_merged", lambda self, state, fisher: soups._normalised(fisher.scores(state)))
    with_forks = forked.run(tiny(steps=steps), 0.8)
    weak = with_forks.cost["weak"]["steps"]
    plain = GradualOBS().run(tiny(steps=steps - weak), 0.8)
    assert all(torch.equal(with_forks.masks[name], plain.masks[name]) for name in plain.masks)


def test_the_mean_of_the_parts_is_the_control(soups) -> None:
    bursts, drops = soups.BURSTS.method, soups.DROPS.method
    assert sum(bursts.rates) / len(bursts.rates) == soups.MEAN_RATE.method.rates[0]
    assert sum(drops.drops) / len(drops.drops) == soups.MEAN_DROP.method.drops[0]
