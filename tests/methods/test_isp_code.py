"""`isp-code` against a slow twin, and by its promises; the settings of the released scripts."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import ISP_CODE, Watch, same, still, tiny, watched
from reference import isp_code as twin
from sparsesoup.cli.prune import parse_arguments
from sparsesoup.core import masks as algebra
from sparsesoup.methods import METHODS
from sparsesoup.training.config import TrainingOverrides

PAPERS = Path(__file__).parents[2] / "docs" / "papers.md"
WIDE = (TrainingOverrides(rate=(5.0, 20.0)),)


@pytest.mark.parametrize(
    "settings",
    [
        {"weak_masks": 1},
        {"weak_masks": 2},
        {"weak_masks": 2, "merge": "intersection"},
        {"weak_masks": 2, "stage": 0.07, "growing": True, "warmup": 0},
        {"weak_masks": 1, "near": 0.7},
    ],
)
def test_isp_code_is_what_its_slow_twin_does(settings: dict[str, Any]) -> None:
    method = replace(METHODS["isp-code"], **(ISP_CODE | settings))
    expected, model = twin.run(still(), 0.52, method)
    with watched() as watch:
        ticket = method.run(still(), 0.52)
    assert len(watch.pruned) == len(expected) > (settings.get("near") != 0.7)
    assert all(same(mine, theirs) for mine, theirs in zip(watch.pruned, expected, strict=True))
    assert all(ticket.weights[n].allclose(t, rtol=1e-3, atol=1e-5) for n, t in model.state_dict().items())


def test_a_weak_run_of_isp_code_begins_at_0_with_the_rate_of_the_main_run_at_that_moment() -> None:
    for of, chosen in (("now", lambda at: tiny().rate_schedule()(at)), ("peak", lambda at: 1e-2)):
        watch = Watch()
        ticket = replace(METHODS["isp-code"], **ISP_CODE, weak_masks=2, rate_of=of).run(tiny(observer=watch), 0.6)
        steps = [stage["step"] for stage in ticket.notes["stages"]]
        weak = [0.0, 0.25, 0.5, 0.75, 1.0, 35 / 36]  # four steps up, 36 down
        assert watch.curve("rate", "weak") == pytest.approx(
            [chosen(at) * x for at in steps for _ in "ab" for x in weak]
        )


def test_a_weak_run_longer_than_its_schedule_stands_still() -> None:
    watch = Watch()
    replace(METHODS["isp-code"], **ISP_CODE | {"schedule": 5}, weak_masks=1).run(tiny(observer=watch), 0.6)
    assert watch.curve("rate", "weak")[4:6] == [pytest.approx(tiny().rate_schedule()(3)), 0.0]


def test_isp_code_says_beforehand_that_its_weak_runs_stand_still() -> None:
    code = METHODS["isp-code"]
    long, short = replace(code, weak=2.0, warmup=4, schedule=20), replace(code, weak=0.01)
    assert "have 32 steps and stand still after 20, where their rate is 0" in long.doubts(tiny(), 0.5)[0]
    assert "have one step, at a rate of 0, and move nothing" in short.doubts(tiny(), 0.5)[0]
    assert code.doubts(tiny(), 0.5) == replace(short, warmup=0).doubts(tiny(), 0.5) == []


def test_growing_stages_of_isp_code_grow_to_an_epoch() -> None:
    with watched() as watch:
        method = replace(METHODS["isp-code"], **ISP_CODE | {"stage": 0.4, "weak": 0.1, "cut": 0.1}, growing=True)
        ticket = method.run(tiny(steps=100), 0.5)
    steps = [stage["step"] for stage in ticket.notes["stages"]]
    assert steps == [6, 19, 35, 51, 67, 83]  # of 16 steps an epoch: 0.4, 0.8, 1, 1, ...
    assert len(watch.pruned) == len(steps) + 1


@pytest.mark.parametrize("merge", ["union", "intersection"])
def test_isp_code_takes_the_merged_set_and_never_goes_beyond_the_sparsity(merge: Any) -> None:
    method = replace(METHODS["isp-code"], **ISP_CODE | {"stage": 0.1, "warmup": 0}, merge=merge, protocols=WIDE)
    with watched() as watch:
        ticket = method.run(tiny(), 0.6)
    before = 0.0
    for stage in ticket.notes["stages"]:
        beyond = stage["sparsity"] > before + 0.2 * (1 - before)
        assert beyond == (merge == "intersection") or stage["sparsity"] == pytest.approx(0.6)
        before = stage["sparsity"]
    assert (len(ticket.notes["stages"]) == 1) == (merge == "intersection")  # at 5 to 20 times the rate
    assert algebra.count_kept(ticket.masks) == 800
    assert all(algebra.count_kept(masks) >= 800 for masks in watch.pruned)


def test_the_settings_of_the_released_scripts_in_the_papers_page_parse() -> None:
    lines = re.findall(r"^ +(sparsesoup prune (?:isp|isp-code) .*)$", PAPERS.read_text(encoding="utf-8"), re.M)
    found = [parse_arguments(shlex.split(line)[2:])[0].method for line in lines]
    code = METHODS["isp-code"]
    wanted = [
        replace(code, protocols=(TrainingOverrides(rate=(0.0, 10.0)),), rate_of="peak", merge="intersection"),
        replace(code, protocols=(TrainingOverrides(rate=(0.0, 1000.0)),), rate_of="peak"),
        replace(code, stage=0.075, growing=True),
        replace(
            METHODS["isp"],
            protocols=(TrainingOverrides(rate=(5.0, 20.0), share=0.5),),
            moments="fresh",
            merge="intersection",
        ),
    ]
    assert all(method in found for method in wanted)
