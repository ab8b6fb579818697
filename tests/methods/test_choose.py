"""N:M from the methods: which of them take it, what it is on the way there, and along which side."""

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch

from conftest import tiny
from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Block
from sparsesoup.core.masking import GROUPS
from sparsesoup.core.targets import Target
from sparsesoup.methods import METHODS
from sparsesoup.methods.scores import magnitude
from sparsesoup.methods.select_masks import select_masks
from sparsesoup.runs.config import config_from_dict
from sparsesoup.runs.run import fill_default_sparsity

HINTS = {name: get_type_hints(type(method)).get("scope") for name, method in METHODS.items()}
SINGLE = [name for name, method in METHODS.items() if getattr(method, "structure", "weights") == "weights"]
TAKE = [name for name in SINGLE if "2:4" in get_args(HINTS[name])]
FEW = {name: {"batches": 2} for name in ("snip", "grasp", "wanda", "sparsegpt", "gradient-flow")}


def state():
    return tiny().start_run()


def counts(mask: torch.Tensor, width: int) -> torch.Tensor:
    return mask.reshape(-1, width).sum(1)


def test_the_documents_name_the_methods_that_take_neighbours():
    assert TAKE == ["random", "magnitude", "snip", "grasp", "wanda", "sparsegpt", "gradual", "gradual-obs",
                    "power-propagation", "sparse-progressive-distillation", "gradient-flow", "early-bird", "imp",
                    "imp-rewind", "lr-rewind", "sparse-model-soup"]  # fmt: skip


@pytest.mark.parametrize("name", TAKE)
def test_every_four_neighbours_of_a_row_keep_two(name):
    ticket = replace(METHODS[name], scope="2:4", **FEW.get(name, {})).run(tiny(steps=20), 0.5)
    for target, mask in ticket.masks.items():
        assert (counts(mask, 4) == 2).all()
        assert not ticket.weights[target][~mask].any()


@pytest.mark.parametrize("scope", ["2:4", "1:4"])
def test_on_the_way_the_worst_of_those_that_will_go_are_gone_first(scope):
    kept, width = GROUPS[scope]
    run, inside = state(), None
    scores, going = magnitude(run.prunable_parameters()), []
    for name, s in scores.items():  # by another road: the last of each few in Python, then all of them from the worst
        values = [(value, name, index) for index, value in enumerate(s.flatten().tolist())]
        for start in range(0, len(values), width):
            going += sorted(values[start : start + width])[: width - kept]
    for sparsity in (0.0, 0.1, 0.37, 1 - kept / width):
        masks = select_masks(run, scores, sparsity, scope=scope, within=inside)
        gone = {(name, i) for name, m in masks.items() for i in (~m.flatten()).nonzero().flatten().tolist()}
        assert gone == {(name, index) for _, name, index in sorted(going)[: round(sparsity * 2000)]}
        inside = masks
    with pytest.raises(UserError, match=f"scope {scope} fixes the sparsity"):
        select_masks(run, scores, 0.8, scope=scope)


def test_neighbours_feed_one_output_however_the_matrix_is_stored():
    run = state()
    names = [*run.targets]
    run.targets = {n: Target("other", t.shape, transposed=n == names[2]) for n, t in run.targets.items()}
    for sparsity in (0.3, 0.5):
        masks = select_masks(run, magnitude(run.prunable_parameters()), sparsity, scope="2:4")
        upright = [masks[names[0]], masks[names[1]], masks[names[2]].mT]
        assert all((counts(mask, 4) >= 2).all() for mask in upright)
        assert algebra.count_kept(masks) == round((1 - sparsity) * 2000)


@pytest.mark.parametrize("name", ["magnitude", "gradual", "lottery-pools"])
def test_a_row_is_what_feeds_one_output_however_the_matrix_is_stored(name):
    problem = tiny(steps=20)
    turned = {n: replace(target, transposed=n == "wide.weight") for n, target in problem.targets.items()}
    masks = replace(METHODS[name], scope="row").run(replace(problem, targets=turned), 0.5).masks
    for target, mask in masks.items():
        kept = mask.sum(0 if turned[target].transposed else 1)
        assert kept.max() - kept.min() <= 1


@pytest.mark.parametrize("name", ["magnitude", "gradual", "imp", "early-bird", "snip", "gradient-flow"])
def test_another_sparsity_is_refused_before_the_first_step(name):
    method = replace(METHODS[name], scope="2:4", **FEW.get(name, {}))
    for sparsity in (0.3, 0.6):
        problem = tiny()
        with pytest.raises(UserError, match=rf"scope 2:4 fixes the sparsity at 0\.5, got {sparsity}; give that"):
            method.run(problem, sparsity)
        assert not problem.meter.costs


def test_blocks_of_neighbours_are_refused_before_the_first_step():
    for name in ("magnitude", "gradual", "early-bird"):
        problem = tiny()
        with pytest.raises(UserError, match="scope 2:4 chooses single weights"):
            replace(METHODS[name], scope="2:4", pattern=Block(4, 4)).run(problem, 0.5)
        assert not problem.meter.costs


UNFIT = {"gradual": {"pattern": Block(4, 3)}, "snip": {"pattern": Block(4, 3)}, "movement": {"pattern": Block(4, 3)}}
UNFIT |= {name: {"scope": "4:8"} for name in ("imp", "grasp", "wanda", "gradient-flow", "sparse-model-soup")}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fill_a_matrix_is_refused_before_the_first_step(name):
    problem = tiny()
    what = r"a 4x3 block does not tile|scope 4:8 needs rows of a multiple of 8 weights,"
    with pytest.raises(UserError, match=rf"^({what}) blocks.0.weight"):
        replace(METHODS[name], **UNFIT[name]).run(problem, 0.5)
    assert not problem.meter.costs


@pytest.mark.parametrize("name", ["magnitude", "gradual", "early-bird", "snip", "movement"])
def test_a_tile_lies_along_the_output_however_the_matrix_is_stored(name):
    problem, tile = tiny(steps=40), Block(5, 1)
    turned = {n: replace(target, transposed=n == "wide.weight") for n, target in problem.targets.items()}
    masks = replace(METHODS[name], pattern=tile, **FEW.get(name, {})).run(replace(problem, targets=turned), 0.5).masks
    for target, mask in masks.items():
        upright = mask.mT if turned[target].transposed else mask
        assert set(tile.sum_over_tiles(upright.int()).unique().tolist()) == {0, 5}


def test_settings_take_the_sparsity_of_the_scope_and_refuse_another():
    for name, scope, sparsity in (("gradual", "2:4", 0.5), ("imp", "1:4", 0.75), ("gradual", "global", 0.9)):
        assert fill_default_sparsity(config_from_dict(name, {"method": {"scope": scope}})).budget.sparsity == sparsity
    with pytest.raises(UserError, match=r"scope 4:8 fixes the sparsity at 0\.5, got 0\.9"):
        config_from_dict("gradual", {"method": {"scope": "4:8"}, "sparsity": 0.9})
