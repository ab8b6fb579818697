"""Groups that reach over matrices: `levels` and `keep` against slow twins, units and heads of all families."""

import re
from typing import Any

import hypothesis
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from conftest import Searched, watched
from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Block, Column, CoupledGroups, Element, Row
from sparsesoup.core.masking import score_thresholds, topk_masks
from sparsesoup.core.targets import Targets, attention_head_groups, block_of, feed_forward_groups
from sparsesoup.core.ticket import Ticket
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.methods.hybrid import HybridMovement
from sparsesoup.methods.soft_movement_and_l0 import SoftMovement
from sparsesoup.training.cost import CostTracker
from tiny_bert import bert
from tiny_hub import CONFIGS, FAMILIES, gpt2

pytestmark = pytest.mark.integration

Groups = list[tuple[int, list[float]]]  # of each tensor: weights in a group, the groups' scores
values = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 3.0]) | st.floats(-4, 4, width=32)
groups = st.lists(st.tuples(st.integers(1, 7), st.lists(values, min_size=1, max_size=9)), min_size=1, max_size=4)


def lowest_kept(table: Groups, sparsity: float) -> float:
    """The slow twin of `levels`: best first, earlier of equals first, while the budget lasts; the best one always."""
    flat = sorted([(value, size) for size, scores in table for value in scores], key=lambda entry: -entry[0])
    spent, level = 0, flat[0][0]
    for value, size in flat:
        spent += size
        if spent > round((1 - sparsity) * sum(size for _, size in flat)):
            break
        level = value
    return level


@hypothesis.settings(max_examples=60)
@given(groups, st.floats(0, 0.999))
def test_a_level_is_the_lowest_score_that_fits(table: Groups, sparsity: float) -> None:
    named = {str(i): torch.tensor(scores) for i, (_, scores) in enumerate(table)}
    sizes = {str(i): size for i, (size, _) in enumerate(table)}
    apart = score_thresholds(named, sizes, sparsity, "tensor")
    assert [float(apart[str(i)]) for i in range(len(table))] == [lowest_kept([entry], sparsity) for entry in table]
    assert {float(level) for level in score_thresholds(named, sizes, sparsity).values()} == {
        lowest_kept(table, sparsity)
    }


@hypothesis.settings(max_examples=60)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(0, 99), st.floats(0, 0.9))
def test_what_is_at_least_its_level_is_what_keep_keeps(shape: list[int], seed: int, sparsity: float) -> None:
    """With scores that differ, single weights and tiles alike, of equal size or not."""
    draw = torch.Generator().manual_seed(seed)
    tiles = [Block(1, 0), Block(2, 2), Element][: len(shape)]
    tables = {f"w{i}": (2 * n, 4) for i, n in enumerate(shape)}
    ties = tuple(CoupledGroups(((name, tile),)) for name, tile in zip(tables, tiles, strict=True))
    counts = [tie.num_groups(tables) for tie in ties]
    ranks = torch.randperm(sum(counts), generator=draw).float().split(counts)
    spread: dict[str, Tensor] = {}
    for tie, rank in zip(ties, ranks, strict=True):
        spread |= tie.expand_to_weights(rank, tables)
    sizes = {name: rows * 4 // count for (name, (rows, _)), count in zip(tables.items(), counts, strict=True)}
    masks = topk_masks(spread, sparsity, pattern=ties)
    found = score_thresholds(dict(zip(tables, ranks, strict=True)), sizes, sparsity)
    if any(m.any() for m in masks.values()):  # a level always keeps one group
        for name, rank in spread.items():
            assert (rank >= found[name]).equal(masks[name])


def best_prefix(scores: dict[str, list[list[float]]], ties: list[dict[str, Any]], within: Any, budget: int) -> set[Any]:
    """The slow twin of `keep` with ties: a group is a list of (name, row, column); best mean first, while they fit."""
    ranked = []
    for tie_number, tie in enumerate(ties):
        for number, cells in tie.items():
            alive = [(n, i, j) for n, i, j in cells if within[n][i][j]]
            if alive:
                mean = sum(scores[n][i][j] for n, i, j in alive) / len(alive)
                ranked.append((-mean, tie_number, int(number), alive))
    chosen: set[Any] = set()
    for _, _, _, alive in sorted(ranked):
        if len(chosen) + len(alive) > budget:
            break
        chosen |= set(alive)
    return chosen


@hypothesis.settings(max_examples=60)
@given(st.integers(0, 500), st.floats(0, 0.99), st.booleans(), st.booleans())
def test_keep_with_ties_takes_the_best_groups_as_long_as_they_fit(
    seed: int, sparsity: float, some: bool, coarse: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"in": (3, 4), "out": (2, 3), "square": (4, 4)}
    steps = 3 if coarse else 1000  # few values: groups tie, and the earlier one is kept
    table = {n: torch.randint(-steps, steps + 1, s, generator=draw).double() for n, s in shapes.items()}
    alive = {n: torch.rand(s, generator=draw) < (0.7 if some else 2.0) for n, s in shapes.items()}
    ties = (CoupledGroups((("in", Row), ("out", Column))), CoupledGroups((("square", Block(2, 2)),)))
    left = sum(int(m.sum()) for m in alive.values())
    budget = round((1 - sparsity) * 34)
    if budget - left >= 6:  # a whole unit
        with pytest.raises(UserError, match="already sparser"):
            topk_masks(table, sparsity, pattern=ties, within=alive)
        return
    masks = topk_masks(table, sparsity, pattern=ties, within=alive if some else None)
    cells: list[dict[str, Any]] = [{}, {}]
    for unit in range(3):
        cells[0][str(unit)] = [("in", unit, j) for j in range(4)] + [("out", i, unit) for i in range(2)]
    for tile in range(4):
        corner = (tile // 2 * 2, tile % 2 * 2)
        cells[1][str(tile)] = [("square", corner[0] + i, corner[1] + j) for i in range(2) for j in range(2)]
    plain = {n: t.tolist() for n, t in table.items()}
    wanted = best_prefix(plain, cells, {n: m.tolist() for n, m in alive.items()}, budget)
    assert {(n, *place) for n, m in masks.items() for place in m.nonzero().tolist()} == wanted
    assert sum(int(m.sum()) for m in masks.values()) <= budget
    assert all((alive[n] | ~m).all() for n, m in masks.items())


SHAPES = {"a": torch.zeros(6, 4), "b": torch.zeros(4, 6), "c": torch.zeros(5, 4)}


@pytest.mark.parametrize(
    ("ties", "complaint"),
    [
        ([[("a", Block(4, 4))], [("b", Row)], [("c", Row)]], r"a 4x4 block does not tile a of shape (6, 4)"),
        ([[("a", Row), ("b", Column)]], "coupled groups name every scored parameter once, not so c"),
        (
            [[("a", Row), ("b", Column)], [("c", Row)], [("a", Row)]],
            "coupled groups name every scored parameter once, not so a",
        ),
        (
            [[("a", Row), ("b", Column)], [("c", Row)], [("d", Row)]],
            "coupled groups name every scored parameter once, not so d",
        ),
        (
            [[("a", Row), ("c", Row)], [("b", Row)]],
            "coupled matrices have different numbers of tiles: {'a': 6, 'c': 5}",
        ),
    ],
)
def test_ties_that_do_not_fit_are_refused_in_one_line(ties: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)) as caught:
        topk_masks(SHAPES, 0.5, pattern=tuple(CoupledGroups(tuple(members)) for members in ties))
    assert "\n" not in str(caught.value)


def test_what_a_tie_spares_stays_and_the_others_make_up_for_it() -> None:
    draw = torch.Generator().manual_seed(0)
    table = {n: torch.rand(s.shape, generator=draw) - 9.0 * (n == "c") for n, s in SHAPES.items()}
    ties = (CoupledGroups((("a", Row), ("b", Column))), CoupledGroups((("c", Block(0, 0)),), spared=True))
    masks = topk_masks(table, 0.25, pattern=ties)  # 17 of 68 weights go, in units of 8
    assert masks["c"].all()
    alone = topk_masks({n: table[n] for n in "ab"}, 17 / 48, pattern=ties[:1])
    assert all(masks[n].equal(m) for n, m in alone.items())
    within = {n: torch.ones_like(t, dtype=torch.bool) for n, t in table.items()} | {"c": table["c"] < -8.5}
    assert topk_masks(table, 0.5, pattern=ties, within=within)["c"].equal(within["c"])
    assert not topk_masks(table, 48 / 68, pattern=ties)["a"].any()
    with pytest.raises(UserError, match=r"to sparsity 0\.8000: the prunable groups hold 0\.7059 of the prunable"):
        topk_masks(table, 0.8, pattern=ties)


@hypothesis.settings(max_examples=30)
@given(st.integers(0, 500), st.floats(0, 0.99))
def test_by_scope_tensor_each_tie_keeps_its_own_share(seed: int, sparsity: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    table = {n: torch.rand(s.shape, generator=draw) for n, s in SHAPES.items()}
    ties = (CoupledGroups((("a", Row), ("b", Column))), CoupledGroups((("c", Row),)))
    masks = topk_masks(table, sparsity, pattern=ties, scope="tensor")
    goal, sizes, area = round((1 - sparsity) * 68), (48, 20), (8, 4)
    kept = [int(masks["a"].sum() + masks["b"].sum()), int(masks["c"].sum())]
    for count, size, group in zip(kept, sizes, area, strict=True):
        assert goal * size / 68 - group - 1 < count < goal * size / 68 + 1
    best = table["c"].sum(1).argsort(descending=True)[: kept[1] // 4]
    assert set(masks["c"].all(1).nonzero().flatten().tolist()) == set(best.tolist())


def targets_of(family: str) -> tuple[Targets, int]:
    """(targets, hidden units) of a model of three layers with four heads, not square anywhere."""
    if family == "gpt2":
        config = gpt2()
    elif family == "distilbert":
        config = CONFIGS[family](n_layers=3, n_heads=4, hidden_dim=24)
    else:
        config = CONFIGS[family](num_hidden_layers=3, num_attention_heads=4, intermediate_size=24)
    return find_prunable(AutoModelForSequenceClassification.from_config(config)), 24


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_every_layer_has_a_tie_of_units_and_each_unit_a_row_and_a_column(family: str) -> None:
    targets, count = targets_of(family)
    shapes = {name: target.shape for name, target in targets.items()}
    found = feed_forward_groups(targets)
    assert len(found) == 3
    assert len({block_of(name) for tie in found for name, _ in tie.members}) == 3
    for tie in found:
        assert tie.num_groups(shapes) == count
        assert len({block_of(name) for name, _ in tie.members}) == 1
        sides = {targets[name].role: block for name, block in tie.members}
        upright = {"feed-forward in": Row, "feed-forward out": Column}
        swapped = {"feed-forward in": Column, "feed-forward out": Row}  # GPT-2 stores [in, out]
        assert sides == (swapped if family == "gpt2" else upright)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_a_tie_of_heads_as_many_as_its_config_says(family: str) -> None:
    targets, _ = targets_of(family)
    shapes = {name: target.shape for name, target in targets.items()}
    found = attention_head_groups(targets)
    assert len(found) == 3
    for tie in found:
        assert tie.num_groups(shapes) == 4
        sides = {targets[name].role: block for name, block in tie.members}
        going_in = dict.fromkeys(("query", "key", "value"), Block(4, 0))
        assert sides == {**going_in, "output": Block(0, 4)}


def test_gpt2s_fused_attention_has_no_heads_to_tie() -> None:
    assert attention_head_groups(targets_of("gpt2")[0]) == []


@pytest.mark.parametrize("keys", [4, 2, 1])
def test_heads_are_tied_where_each_has_keys_of_its_own(keys: int) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=keys,
        intermediate_size=32, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    problem = bert(family=config)
    assert len(attention_head_groups(problem.targets)) == (2 if keys == 4 else 0)
    if keys < 4:
        with pytest.raises(UserError, match=r"its heads share keys\); set method.attention tiles"):
            HybridMovement(attention="heads", score_rate=1.0).run(problem, 0.5)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("bert.encoder.layer.3.attention.self.query.weight", "bert.encoder.layer.3"),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "encoder.block.0"),
        ("blocks.11.weight", "blocks.11"),
        ("0.weight", "0"),
        ("layer1.weight", ""),
        ("bert.pooler.dense.weight", ""),
    ],
)
def test_a_block_is_a_name_up_to_its_first_number(name: str, block: str) -> None:
    assert block_of(name) == block


def hybrid(steps: int = 40, score_rate: float = 0.5, **more: Any) -> tuple[Ticket, Any]:
    with watched() as watch:
        problem = bert(steps=steps, observer=watch)
        ticket = HybridMovement(score_rate=score_rate, **more).run(problem, 0.5)
    return ticket, problem


def whole(parts: list[Tensor]) -> bool:
    """Whether all weights of a group are kept, or none; its zeros plus zeros."""
    flat = torch.cat([part.flatten() for part in parts])
    assert not flat[flat == 0].signbit().any()
    assert bool((flat != 0).all()) != bool((flat == 0).all())
    return bool(flat.all())


def test_whole_heads_and_whole_units_are_cut_and_nothing_of_them_is_left() -> None:
    ticket, problem = hybrid(attention="heads")
    kept_heads, kept_units = [], []
    for layer in range(2):
        w = {n.removeprefix(f"bert.encoder.layer.{layer}."): t for n, t in ticket.weights.items()}
        for head in range(2):
            band = slice(8 * head, 8 * head + 8)
            rows = [w[f"attention.self.{name}.weight"][band] for name in ("query", "key", "value")]
            kept_heads.append(whole([*rows, w["attention.output.dense.weight"][:, band]]))
        for unit in range(32):
            row, bias = w["intermediate.dense.weight"][unit], w["intermediate.dense.bias"][unit]
            kept_units.append(whole([row, bias, w["output.dense.weight"][:, unit]]))
    assert 0 < sum(kept_heads) + sum(kept_units) < 68
    assert 0 < sum(kept_units) < 64
    # A head has 4 bands of 8 x 16 weights, a unit 2 of 16: nothing larger than a head is missing to the half.
    reached = 512 * sum(kept_heads) + 32 * sum(kept_units)
    assert 2048 - 512 < reached <= 2048
    assert set(ticket.masks) == set(problem.targets)
    assert ticket.weights.keys() == problem.pretrained.state_dict().keys()


def test_a_head_is_worth_what_the_one_of_its_four_matrices_says_that_wants_it_most() -> None:
    checkpointer = Searched(CostTracker())
    problem = bert(steps=40, meter=checkpointer.meter, checkpointer=checkpointer)
    ticket = HybridMovement(attention="heads", score_rate=0.5).run(problem, 0.5)
    worth: dict[bool, list[float]] = {True: [], False: []}
    for name, target in problem.targets.items():
        scores, mask = checkpointer.scores[name], ticket.masks[name]
        if target.role == "query":
            assert scores.shape == (4, 2)
            assert len(scores[:, 0].unique()) == 4
            groups = zip(scores.amax(0), mask.view(2, -1).all(1), strict=True)
        elif target.role == "feed-forward in":
            groups = zip(scores, mask.all(1), strict=True)
        else:
            continue
        for score, stays in groups:
            worth[bool(stays)].append(float(score))
    assert len(worth[True]) + len(worth[False]) == 2 * (2 + 32)
    assert min(worth[True]) >= max(worth[False])


def density_of_units(**more: Any) -> float:
    """The share of the feed-forward weights that stays, where half of all prunable weights do."""
    ticket, problem = hybrid(100, 0.1, tile=Block(4, 8), **more)
    inside = [ticket.masks[n].flatten() for n, t in problem.targets.items() if t.role.startswith("feed-forward")]
    return float(torch.cat(inside).float().mean())


def test_a_family_that_weighs_nothing_in_the_penalty_loses_less() -> None:
    even = density_of_units()
    assert density_of_units(attention_weight=0.0) < even - 0.3
    assert density_of_units(feed_forward_weight=0.0) > even + 0.3


def test_tiles_of_the_attention_are_cut_whole() -> None:
    ticket, problem = hybrid(attention="tiles", tile=Block(4, 8))
    for name, target in problem.targets.items():
        if "feed-forward" not in target.role:
            counts = Block(4, 8).sum_over_tiles(ticket.masks[name].float())
            assert set(counts.unique().tolist()) <= {0.0, 32.0}


@pytest.mark.parametrize(
    "method",
    [HybridMovement(tile=Block(4, 8), score_rate=0.5), SoftMovement(pattern=Block(4, 8), score_rate=0.5)],
)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_bias_of_a_row_that_is_masked_whole_goes_too_and_stays_away(method: Any, family: str) -> None:
    problem = bert(steps=40, family=gpt2() if family == "gpt2" else family)
    ticket, gone, left = method.run(problem, 0.7), 0, 0
    start = dict(problem.pretrained.named_parameters())
    for name, target in problem.targets.items():
        bias = ticket.weights[name.replace("weight", "bias")]
        lines = ticket.masks[name].any(0 if target.transposed else 1)
        assert not bias[~lines].any()
        gone += int((~lines).sum())
        left += int((bias != start[name.replace("weight", "bias")]).sum())
    assert gone > 30
    assert left > 50


def test_a_tile_that_does_not_fit_is_refused_before_the_first_step() -> None:
    problem = bert()
    with pytest.raises(UserError, match=r"a 32x32 block does not tile bert\.encoder.*of shape \(16, 16\)"):
        HybridMovement(score_rate=1.0).run(problem, 0.5)
    assert not problem.meter.to_json()
