"""`keep`, the one top-k, against its slow twin and its promises."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparsesoup.core.topk
import sparsesoup.core.topk_passes
import sparsesoup.core.topk_rows
from conftest import same
from reference import slow
from reference.synchronisations import Synchronisations
from sparsesoup.core import masks as algebra
from sparsesoup.core.allocation import largest_remainder
from sparsesoup.core.granularity import Block, Column, Element, Row
from sparsesoup.core.masking import Scope, topk_masks
from sparsesoup.core.masks import Masks
from sparsesoup.core.topk import kth_largest, topk_exact
from sparsesoup.core.topk_tensors import TensorPasses

SPARSITY = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.95]), st.floats(0.0, 0.999))
KINDS = ("normal", "equal", "two", "few", "up", "down", "infinite", "zeros", "tiny", "skewed")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8)
MANY = settings(max_examples=150)


def values(kind: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scores of a kind that is hard on a selection."""
    draw = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    pick = torch.randint(0, 5, (count,), generator=draw)
    flat = {
        "normal": torch.randn(count, generator=draw, dtype=torch.float64),
        "equal": torch.full((count,), 3.0),
        "two": (pick % 2).double(),
        "few": pick.double(),
        "up": torch.arange(count).double(),
        "down": -torch.arange(count).double(),
        "infinite": torch.tensor([-torch.inf, -1.0, 0.0, 2.0, torch.inf])[pick],
        "zeros": torch.tensor([0.0, -0.0])[pick % 2],
        "tiny": pick * 1.4e-45,
        "skewed": torch.randn(count, generator=draw).exp().pow(8),
    }[kind]
    if dtype == torch.uint8:
        flat = flat.nan_to_num(0.0, 250.0, 0.0).abs().clamp(max=250)
    return flat.to(dtype).reshape(shape)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Tensor]:
    """A few matrices of scores, each of its own shape, kind, dtype and layout."""
    found = {}
    for i in range(draw(st.integers(1, 3))):
        shape = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
        dtype = draw(st.sampled_from(DTYPES))
        one = values(draw(st.sampled_from(KINDS)), shape, draw(st.integers(0, 99)), dtype)
        found[f"t{i}"] = one.t().contiguous().t() if draw(st.booleans()) else one
    return found


def some(scores: dict[str, Tensor], seed: int, share: float = 0.6) -> Masks:
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.rand(s.shape, generator=draw) < share for n, s in scores.items()}


def size(scores: dict[str, Tensor]) -> int:
    return sum(s.numel() for s in scores.values())


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Toy tensors are cut and sampled as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsesoup.core.topk_passes, "CHUNK", 7)
        patch.setattr(sparsesoup.core.topk_passes, "SAMPLE", 3)
        yield


@MANY
@given(tables(), SPARSITY)
def test_keep_equals_pythons_sort(scores: dict[str, Tensor], sparsity: float) -> None:
    count = round((1 - sparsity) * size(scores))
    found = topk_masks(scores, sparsity)
    assert same(found, slow.keep(scores, count))
    assert algebra.count_kept(found) == count


@MANY
@given(tables(), st.floats(0.0, 1.0), st.integers(0, 99), st.sampled_from(KINDS), st.booleans())
def test_keep_within_and_with_a_second_key_equals_pythons_sort(
    scores: dict[str, Tensor], part: float, seed: int, kind: str, bound: bool
) -> None:
    within = some(scores, seed) if bound else None
    then = {n: values(kind, tuple(s.shape), seed + i) for i, (n, s) in enumerate(scores.items())}
    count = int(part * (algebra.count_kept(within) if within else size(scores)))
    if count == 0:
        return
    found = topk_masks(scores, 1 - count / size(scores), then=then, within=within)
    assert same(found, slow.keep(scores, count, then, within))
    assert within is None or all(not (found[n] & ~within[n]).any() for n in found)


@MANY
@given(tables(), SPARSITY)
def test_the_least_kept_score_is_no_less_than_the_largest_cut_one(scores: dict[str, Tensor], sparsity: float) -> None:
    found = topk_masks(scores, sparsity)
    kept = [v for n, s in scores.items() for v in s[found[n]].double().tolist()]
    cut = [v for n, s in scores.items() for v in s[~found[n]].double().tolist()]
    assert not kept or not cut or min(kept) >= max(cut)


@MANY
@given(tables(), st.floats(0.0, 1.0), st.integers(0, 99), st.sampled_from(KINDS), st.booleans(), st.booleans())
def test_whole_tensors_as_on_a_gpu_select_what_pieces_select(
    scores: dict[str, Tensor], part: float, seed: int, kind: str, bound: bool, second: bool
) -> None:
    within = some(scores, seed) if bound else None
    then = {n: values(kind, tuple(s.shape), seed + i) for i, (n, s) in enumerate(scores.items())} if second else None
    count = int(part * (algebra.count_kept(within) if within else size(scores)))
    if count == 0:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsesoup.core.topk, "ArrayPasses", TensorPasses)
        found = topk_masks(scores, 1 - count / size(scores), then=then, within=within)
        level = kth_largest(list(scores.values()), count)
    assert same(found, slow.keep(scores, count, then, within))
    assert float(level) == sorted(slow.table(scores).values(), reverse=True)[count - 1]
    assert float(kth_largest(list(scores.values()), count)) == float(level)


@pytest.mark.parametrize("second", [False, True], ids=["scores", "votes-then-scores"])
@pytest.mark.parametrize("bound", [False, True], ids=["all", "within"])
def test_a_selection_on_a_device_reads_back_four_times_at_most(second: bool, bound: bool) -> None:
    scores = {f"w{i}": values("normal", (30, 40), i) for i in range(12)}
    votes = {n: values("few", (30, 40), i, torch.uint8) for i, n in enumerate(scores)}
    within = some(scores, 1) if bound else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsesoup.core.topk, "ArrayPasses", TensorPasses)
        patch.setattr(sparsesoup.core.topk_passes, "SAMPLE", 1 << 18)
        with Synchronisations() as seen:
            found = topk_masks(votes if second else scores, 0.75, then=scores if second else None, within=within)
    assert seen.count <= 4, seen.names
    first, other = (votes, scores) if second else (scores, None)
    assert same(found, slow.keep(first, 3600, other, within))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads: int) -> None:
    scores = {"a": values("skewed", (40, 50), 1), "b": values("few", (30, 21), 2)}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert same(topk_masks(scores, 0.5), slow.keep(scores, 1315))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("whole", [False, True], ids=["pieces", "whole"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_of_many_pieces_is_selected_exactly(kind: str, dtype: torch.dtype, whole: bool) -> None:
    scores = {"a": values(kind, (40, 50), 1, dtype), "b": values(kind, (30, 21), 2, dtype)}
    for count in (1, 2, 131, 1315, 2629, 2630):
        with pytest.MonkeyPatch.context() as patch:
            if whole:
                patch.setattr(sparsesoup.core.topk, "ArrayPasses", TensorPasses)
            patch.setattr(sparsesoup.core.topk_passes, "CHUNK", 256)
            patch.setattr(sparsesoup.core.topk_passes, "SAMPLE", 16)
            found = topk_masks(scores, 1 - count / 2630)
        assert same(found, slow.keep(scores, count))


def test_a_large_tensor_is_selected_exactly_at_the_real_piece_and_sample() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsesoup.core.topk_passes, "CHUNK", 1 << 20)
        patch.setattr(sparsesoup.core.topk_passes, "SAMPLE", 1 << 16)
        score = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0)).reshape(3000, 1000)
        found = topk_exact([score], 300_000)[0]
        votes = topk_exact([(score > 0.5).byte()], 2_000_000, then=[score])[0]
    order = score.flatten().sort(descending=True).values
    assert found.equal(score >= order[299_999])
    assert votes.equal(score >= order[1_999_999])


def test_ties_go_to_the_second_key_then_the_earlier_name_then_the_lower_index() -> None:
    level = {"b": torch.ones(1, 3), "a": torch.ones(1, 3)}  # the earlier name is the one that comes first
    assert topk_masks(level, 0.5)["b"].tolist() == [[True, True, True]]
    assert topk_masks(level, 2 / 3)["b"].tolist() == [[True, True, False]]
    then = {"b": torch.tensor([[0.0, 1.0, 1.0]]), "a": torch.tensor([[1.0, 2.0, 0.0]])}
    found = topk_masks(level, 0.5, then=then)
    assert found["b"].tolist() == [[False, True, True]]
    assert found["a"].tolist() == [[False, True, False]]


@MANY
@given(tables(), SPARSITY)
def test_the_order_of_names_decides_ties_alone(scores: dict[str, Tensor], sparsity: float) -> None:
    distinct = {}
    for i, (n, s) in enumerate(scores.items()):
        draw = torch.Generator().manual_seed(i)
        distinct[n] = (torch.randperm(s.numel(), generator=draw).double() + i / 8).reshape(s.shape)
    turned = dict(reversed(distinct.items()))
    one, other = topk_masks(distinct, sparsity), topk_masks(turned, sparsity)
    assert list(one) == list(distinct)
    assert list(other) == list(turned)
    assert same(one, {n: other[n] for n in one})


@MANY
@given(st.integers(0, 99), SPARSITY, st.sampled_from(DTYPES), st.sampled_from(["global", "tensor", "erk", "row"]))
def test_dtype_and_layout_change_nothing(seed: int, sparsity: float, dtype: torch.dtype, scope: Scope) -> None:
    whole = {"a": values("few", (6, 8), seed), "b": values("few", (5, 9), seed + 1)}
    other = {n: s.to(dtype).t().contiguous().t() for n, s in whole.items()}
    apart = {n: torch.stack([s, s], -1)[..., 0] for n, s in whole.items()}
    plain = topk_masks(whole, sparsity, scope=scope)
    assert same(plain, topk_masks(other, sparsity, scope=scope))
    assert same(plain, topk_masks(apart, sparsity, scope=scope))


def test_scores_of_two_dtypes_are_compared_without_rounding() -> None:
    third = torch.tensor([[1 / 3]], dtype=torch.float64)
    near = third.float()  # a little larger than 1/3
    assert near.double() > third
    for half in (torch.float16, torch.bfloat16, torch.float32):
        low = third.to(half)
        scores = {"a": third, "b": low}
        assert topk_masks(scores, 0.5)["b"].item() == (low.double() > third).item(), half
        level = {"b": torch.zeros(1, 1), "a": torch.zeros(1, 2)}
        both = {"b": low, "a": torch.cat([third, third], 1)}
        assert topk_masks(both, 2 / 3, then=level)["b"].item() == (low.double() > third).item(), half
        assert same(topk_masks(level, 2 / 3, then=both), slow.keep(level, 1, both)), half
        assert same(topk_masks(both, 2 / 3, then=level), slow.keep(both, 1, level)), half


@MANY
@given(tables(), SPARSITY)
def test_tensor_scope_gives_each_its_largest_remainder(scores: dict[str, Tensor], sparsity: float) -> None:
    goal = round((1 - sparsity) * size(scores))
    found = topk_masks(scores, sparsity, scope="tensor")
    counts = slow.shares({n: s.numel() for n, s in scores.items()}, goal)
    assert {n: int(m.sum()) for n, m in found.items()} == counts
    for n, s in scores.items():
        assert same({n: found[n]}, slow.keep({n: s}, counts[n]))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.floats(0.0, 1.0))
def test_largest_remainder_reaches_the_goal_and_strays_less_than_one(sizes: list[int], part: float) -> None:
    goal = round(part * sum(sizes))
    shares = [goal * s / sum(sizes) for s in sizes]
    found = largest_remainder(shares, goal)
    assert sum(found) == goal
    assert all(abs(whole - share) < 1 for whole, share in zip(found, shares, strict=True))


@MANY
@given(tables(), SPARSITY)
def test_erk_keeps_the_total_and_none_above_its_size(scores: dict[str, Tensor], sparsity: float) -> None:
    found = topk_masks(scores, sparsity, scope="erk")
    assert algebra.count_kept(found) == round((1 - sparsity) * size(scores))


def test_erk_densities_follow_the_sum_of_sides_over_their_product() -> None:
    scores = {n: values("normal", shape, 1) for n, shape in (("a", (40, 40)), ("b", (160, 40)), ("c", (2, 2)))}
    found = topk_masks(scores, 0.9, scope="erk")
    density = {n: float(m.float().mean()) for n, m in found.items()}
    assert density["c"] == 1.0  # its share would be above 1: the others take the rest
    assert density["a"] / density["b"] == pytest.approx((80 / 1600) / (200 / 6400), rel=0.02)
    for n, s in scores.items():
        assert same({n: found[n]}, slow.keep({n: s}, int(found[n].sum())))
    within = {n: torch.ones_like(s, dtype=torch.bool) for n, s in scores.items()}
    within["a"][:] = False
    within["a"][:2] = True
    bound = topk_masks(scores, 0.9, scope="erk", within=within)
    assert algebra.count_kept(bound) == algebra.count_kept(found)
    assert int(bound["a"].sum()) == 80


@MANY
@given(tables(), SPARSITY)
def test_row_scope_spreads_the_count_over_rows_that_differ_by_one_at_most(
    scores: dict[str, Tensor], sparsity: float
) -> None:
    found = topk_masks(scores, sparsity, scope="row")
    assert algebra.count_kept(found) == round((1 - sparsity) * size(scores))
    for n, s in scores.items():
        counts = found[n].sum(1).tolist()
        assert max(counts) - min(counts) <= 1
        for row, mask, count in zip(s, found[n], counts, strict=True):
            assert same({n: mask}, slow.keep({n: row}, count))


@MANY
@given(
    st.sampled_from([5, 16, 48, 64]),
    st.integers(0, 99),
    st.sampled_from([*KINDS, "normal", "normal"]),
    st.sampled_from(DTYPES),
    SPARSITY,
    st.booleans(),
    st.booleans(),
)
def test_rows_of_any_width_are_selected_exactly(
    width: int, seed: int, kind: str, dtype: torch.dtype, sparsity: float, bound: bool, second: bool
) -> None:
    score = values(kind, (14, width), seed, dtype)
    then = {"a": values("few", (14, width), seed + 1)} if second else None
    within = {"a": torch.rand(14, width, generator=torch.Generator().manual_seed(seed)) < 0.7} if bound else None
    goal = round((1 - sparsity) * score.numel())
    counts = [goal // 14 + (row < goal % 14) for row in range(14)]
    if within and any(int(live.sum()) < count for live, count in zip(within["a"], counts, strict=True)):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsesoup.core.topk_passes, "CHUNK", 5 * width)
        patch.setattr(sparsesoup.core.topk_rows, "SAMPLE", 12)
        found = topk_masks({"a": score}, sparsity, scope="row", then=then, within=within)
    for row, count in enumerate(counts):
        parts = [None if table is None else {"a": table["a"][row]} for table in (then, within)]
        assert same({"a": found["a"][row]}, slow.keep({"a": score[row]}, count, *parts))


@MANY
@given(st.integers(0, 99), st.sampled_from(KINDS), st.booleans(), st.sampled_from(DTYPES))
def test_two_of_four_are_kept_within_masks_with_a_second_key(
    seed: int, kind: str, second: bool, dtype: torch.dtype
) -> None:
    score = values(kind, (6, 12), seed, dtype)
    order = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    within = {"a": (order < 3).reshape(6, 12)}
    then = {"a": values("few", (6, 12), seed + 1)} if second else None
    found = topk_masks({"a": score}, 0.5, scope="2:4", then=then, within=within)
    for group in range(18):
        parts = [None if table is None else {"a": table["a"].reshape(-1, 4)[group]} for table in (then, within)]
        assert same({"a": found["a"].reshape(-1, 4)[group]}, slow.keep({"a": score.reshape(-1, 4)[group]}, 2, *parts))


@MANY
@given(st.integers(0, 99), st.sampled_from(KINDS), st.sampled_from([("1:4", 1, 4), ("2:4", 2, 4), ("4:8", 4, 8)]))
def test_each_few_neighbours_keep_their_own_best(seed: int, kind: str, scope: tuple[Scope, int, int]) -> None:
    name, count, width = scope
    scores = {"a": values(kind, (3, 16), seed), "b": values(kind, (5, 8), seed + 1)}
    then = {n: values("normal", tuple(s.shape), 5) for n, s in scores.items()}
    found = topk_masks(scores, 1 - count / width, scope=name, then=then)
    for n, s in scores.items():
        groups = zip(s.reshape(-1, width), then[n].reshape(-1, width), found[n].reshape(-1, width), strict=True)
        for score, second, mask in groups:
            assert same({n: mask}, slow.keep({n: score}, count, {n: second}))


@MANY
@given(
    st.integers(0, 99),
    SPARSITY,
    st.sampled_from([Block(2, 3), Block(3, 1), Row, Column, Block(0, 0)]),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
def test_blocks_are_kept_best_mean_first_as_long_as_they_fit(
    seed: int, sparsity: float, pattern: Block, dtype: torch.dtype, bound: bool
) -> None:
    scores = {"a": values("up", (6, 6), 0, dtype), "b": values("down", (6, 12), 0, dtype) * 3}
    draw = torch.Generator().manual_seed(seed)
    scores = {n: s.flatten()[torch.randperm(s.numel(), generator=draw)].reshape(s.shape) for n, s in scores.items()}
    within = some(scores, seed, 0.8) if bound else None
    budget = round((1 - sparsity) * 108)
    largest = max((pattern.rows or len(s)) * (pattern.cols or s.shape[1]) for s in scores.values())
    if within and budget - algebra.count_kept(within) >= largest:
        with pytest.raises(ValueError, match="cannot prune to sparsity"):
            topk_masks(scores, sparsity, pattern=pattern, within=within)
        return
    found = topk_masks(scores, sparsity, pattern=pattern, within=within)
    assert same(found, slow.blocks(scores, budget, pattern.rows, pattern.cols, within))
    assert algebra.count_kept(found) <= budget


def test_a_block_of_large_half_precision_scores_does_not_overflow() -> None:
    score = torch.tensor([[300.0] * 256, [400.0] * 256, [200.0] * 256]).half()
    assert topk_masks({"w": score}, 2 / 3, pattern=Row)["w"].all(1).tolist() == [False, True, False]
    close = torch.tensor([[1.0] * 8, [1.0] * 7 + [1.0078125]]).bfloat16()
    assert topk_masks({"w": close}, 0.5, pattern=Row)["w"].all(1).tolist() == [False, True]


def test_a_pruned_weight_that_scores_minus_infinity_does_not_spoil_its_block() -> None:
    score = {"w": torch.tensor([[-torch.inf, 1.0, 2.0, 3.0]])}
    within = {"w": torch.tensor([[False, True, True, True]])}
    assert topk_masks(score, 0.5, pattern=Block(1, 2), within=within)["w"].tolist() == [[False, False, True, True]]


def test_blocks_of_equal_mean_go_to_the_second_key_then_the_first_block() -> None:
    votes = {"w": torch.tensor([[1, 1, 2, 0, 0, 2]], dtype=torch.uint8)}
    assert topk_masks(votes, 2 / 3, pattern=Block(1, 2))["w"].tolist() == [[True, True, False, False, False, False]]
    then = {"w": torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])}
    assert topk_masks(votes, 2 / 3, pattern=Block(1, 2), then=then)["w"].tolist() == [[False] * 4 + [True] * 2]


def test_tensor_scope_of_blocks_keeps_within_each_tensors_share() -> None:
    scores = {"a": torch.full((4, 4), 9.0), "b": values("normal", (4, 8), 1)}
    found = topk_masks(scores, 0.5, pattern=Row, scope="tensor")
    assert [int(m.sum()) for m in found.values()] == [8, 16]


GOOD = {"w": torch.arange(16.0).reshape(4, 4)}
ALL: Masks = {"w": torch.ones(4, 4, dtype=torch.bool)}
FEW: Masks = {"w": torch.arange(16).reshape(4, 4) < 4}


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 2.0, float("nan")])
def test_a_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"^sparsity: the share .* in \[0, 1\), got "):
        topk_masks(GOOD, sparsity)


@pytest.mark.parametrize("pattern", [Element, Row])
def test_a_nan_is_refused_with_the_name_of_its_parameter(pattern: Block) -> None:
    bad = GOOD["w"].clone()
    bad[2, 3] = torch.nan
    with pytest.raises(ValueError, match="score of v has NaN"):
        topk_masks(GOOD | {"v": bad}, 0.5, pattern=pattern)
    with pytest.raises(ValueError, match="score of w has NaN"):
        topk_masks(GOOD, 0.5, then={"w": bad}, pattern=pattern)


def test_masks_that_are_sparser_than_asked_are_refused_with_both_figures() -> None:
    with pytest.raises(ValueError, match=r"^cannot prune to sparsity 0\.5000: the masks given are already at 0\.7500$"):
        topk_masks(GOOD, 0.5, within=FEW)
    with pytest.raises(ValueError, match=r"^v: cannot prune to sparsity 0\.5000: .* already at 0\.7500$"):
        topk_masks(GOOD | {"v": GOOD["w"]}, 0.5, within=ALL | {"v": FEW["w"]}, scope="tensor")
    with pytest.raises(ValueError, match="already sparser"):
        topk_masks(GOOD, 0.5, within=FEW, pattern=Row)
    with pytest.raises(ValueError, match="`within` leaves fewer than the 8 weights"):
        topk_masks(GOOD, 0.5, within=FEW, scope="erk")
    with pytest.raises(ValueError, match="row 1 of w cannot keep 2 weights: `within` has fewer left"):
        topk_masks(GOOD, 0.5, within=FEW, scope="2:4")


def test_a_block_that_does_not_tile_is_refused_with_the_name() -> None:
    with pytest.raises(ValueError, match=r"a 3x3 block does not tile w of shape \(4, 4\)"):
        topk_masks(GOOD, 0.5, pattern=Block(3, 3))
    with pytest.raises(ValueError, match="a block tiles matrices only, w has shape"):
        topk_masks({"w": torch.ones(2, 2, 2)}, 0.5, pattern=Row)
    with pytest.raises(ValueError, match="got -1x2"):
        Block(-1, 2)


def test_an_impossible_scope_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scope 2:4 fixes the sparsity at 0\.5, got 0\.6"):
        topk_masks(GOOD, 0.6, scope="2:4")
    with pytest.raises(ValueError, match="scope 4:8 needs rows of a multiple of 8 weights, w has"):
        topk_masks(GOOD, 0.5, scope="4:8")
    with pytest.raises(ValueError, match="scope row chooses single weights"):
        topk_masks(GOOD, 0.5, scope="row", pattern=Row)
    for odd in ("globl", ""):
        with pytest.raises(ValueError, match="unknown scope"):
            topk_masks(GOOD, 0.5, scope=odd)


def test_tables_of_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`within` name different parameters: \['v', 'w'\]"):
        topk_masks(GOOD, 0.5, within={"v": ALL["w"]})
    with pytest.raises(ValueError, match=r"`then` name different parameters: \['v', 'w'\]"):
        topk_masks(GOOD, 0.5, then={"v": GOOD["w"]})


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_a_mask_can_be_pruned_by_one_weight_at_a_time(scope: Scope) -> None:
    """A smaller sum may give a tensor a larger rounded share: that is no reason to refuse what can be done."""
    shapes = {"a": (6, 6), "b": (2, 6), "c": (6, 2), "d": (2, 2), "e": (2, 2)}
    scores = {n: values("normal", shape, i) for i, (n, shape) in enumerate(shapes.items())}
    total, inside = size(scores), None
    for kept in range(total, 0, -1):
        masks = topk_masks(scores, 1 - kept / total, scope=scope, within=inside)
        assert algebra.count_kept(masks) == kept
        assert inside is None or all(bool((inside[n] | ~m).all()) for n, m in masks.items())
        shares = {n: kept * s.numel() / total for n, s in scores.items()}
        assert all(abs(int(m.sum()) - shares[n]) < 2 for n, m in masks.items())
        inside = masks
