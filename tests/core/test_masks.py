"""Masks: their algebra, their agreement, their bits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import same
from reference import slow
from sparsesoup.core.masks import (
    Masks,
    apply_masks_,
    count_kept,
    count_total,
    count_votes,
    dense_masks,
    hamming_distance,
    intersection,
    jaccard_distance,
    keep_if_voted,
    pack_bits,
    sparsity,
    union,
    unpack_bits,
    vote_agreement,
)


@st.composite
def soups(draw: st.DrawFn, least: int = 1) -> list[Masks]:
    """Up to six masks of the same names and shapes."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=3))
    found = []
    for _ in range(draw(st.integers(least, 6))):
        one = {
            f"w{i}": draw(st.lists(st.booleans(), min_size=r * c, max_size=r * c)) for i, (r, c) in enumerate(shapes)
        }
        found.append({n: torch.tensor(v).reshape(shapes[i]) for i, (n, v) in enumerate(one.items())})
    return found


def within(one: Masks, other: Masks) -> bool:
    return all(not (one[n] & ~other[n]).any() for n in one)


@given(soups())
def test_one_vote_is_the_union_and_all_votes_are_the_intersection(masks: list[Masks]) -> None:
    for n in masks[0]:
        columns = torch.stack([m[n] for m in masks])
        assert keep_if_voted(masks, 1)[n].equal(columns.any(0))
        assert keep_if_voted(masks, len(masks))[n].equal(columns.all(0))
        assert count_votes(masks)[n].equal(columns.sum(0).byte())
    assert same(union(masks), keep_if_voted(masks, 1))
    assert same(intersection(masks), keep_if_voted(masks, len(masks)))


@given(soups())
def test_each_mask_lies_between_intersection_and_union(masks: list[Masks]) -> None:
    for m in masks:
        assert within(intersection(masks), m)
        assert within(m, union(masks))


@given(soups(), st.integers(2, 6))
def test_a_higher_quorum_keeps_no_more(masks: list[Masks], quorum: int) -> None:
    assert within(keep_if_voted(masks, quorum), keep_if_voted(masks, quorum - 1))


@given(soups(least=3))
def test_distance_is_a_metric(masks: list[Masks]) -> None:
    a, b, c = masks[:3]
    assert hamming_distance(a, a) == 0.0
    assert (hamming_distance(a, b) == 0.0) == same(a, b)
    assert hamming_distance(a, b) == hamming_distance(b, a)
    assert hamming_distance(a, c) <= hamming_distance(a, b) + hamming_distance(b, c) + 1e-12
    assert hamming_distance(a, {n: ~m for n, m in a.items()}) == 1.0


@given(soups(least=3))
def test_the_distance_of_kept_sets_is_a_metric_and_one_minus_their_overlap(masks: list[Masks]) -> None:
    a, b, c = masks[:3]
    assert jaccard_distance(a, a) == 0.0
    assert (jaccard_distance(a, b) == 0.0) == same(a, b)
    assert jaccard_distance(a, b) == jaccard_distance(b, a)
    assert jaccard_distance(a, c) <= jaccard_distance(a, b) + jaccard_distance(b, c) + 1e-12
    assert jaccard_distance(a, b) == pytest.approx(1 - vote_agreement(count_votes([a, b]), 2)["overlap"])


@given(soups(least=2))
def test_agreement_from_votes_equals_the_comparison_of_all_pairs(masks: list[Masks]) -> None:
    found = vote_agreement(count_votes(masks), len(masks))
    assert found == pytest.approx(slow.agreement(masks))


def test_votes_leave_the_masks_alone() -> None:
    masks: list[Masks] = [{"w": torch.tensor([True, False])}] * 3
    assert count_votes(masks)["w"].tolist() == [3, 0]
    assert masks[0]["w"].tolist() == [True, False]


def test_255_votes_are_counted_and_more_are_refused() -> None:
    one: Masks = {"w": torch.tensor([True])}
    assert count_votes([one] * 255)["w"].item() == 255
    for number in (0, 256):
        with pytest.raises(ValueError, match=rf"over 1 to 255 masks, got {number}"):
            count_votes([one] * number)
    with pytest.raises(ValueError, match="at least two masks, got 1"):
        vote_agreement(count_votes([one]), 1)


def test_masks_of_other_names_are_refused_by_name() -> None:
    one, other = {"w": torch.tensor([True])}, {"v": torch.tensor([True])}
    for call in (lambda: hamming_distance(one, other), lambda: count_votes([one, one, other])):
        with pytest.raises(ValueError, match="masks name different parameters: v, w"):
            call()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 99))
def test_packing_and_unpacking_is_the_identity_at_one_bit_a_weight(shape: list[int], seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    for layout in (mask, mask.transpose(0, -1).contiguous().transpose(0, -1), torch.stack([mask, ~mask], -1)[..., 0]):
        bits = pack_bits(layout)
        assert bits.dtype == torch.uint8
        assert bits.numel() == math.ceil(mask.numel() / 8)
        assert unpack_bits(bits, shape).equal(mask)


def test_the_first_weight_is_the_highest_bit() -> None:
    assert pack_bits(torch.tensor([[True, False], [False, True]])).tolist() == [0b10010000]


@pytest.mark.parametrize("bits", [torch.zeros(1, dtype=torch.uint8), torch.zeros(2), torch.zeros(3, dtype=torch.uint8)])
def test_bits_that_do_not_fill_the_shape_are_refused(bits: Tensor) -> None:
    with pytest.raises(ValueError, match=r"a mask of shape \(3, 3\) needs 2 bytes, got"):
        unpack_bits(bits, (3, 3))


def test_counts_and_sparsity_by_hand() -> None:
    masks: Masks = {"a": torch.tensor([[True, False, False]]), "b": torch.tensor([True])}
    assert (count_kept(masks), count_total(masks), sparsity(masks)) == (2, 4, 0.5)
    assert sparsity(dense_masks(masks)) == 0.0


def test_applying_zeroes_what_is_pruned_whatever_it_was() -> None:
    weight = torch.tensor([1.0, -2.0, torch.nan, torch.inf, -0.0])
    apply_masks_({"w": weight, "other": torch.ones(1)}, {"w": torch.tensor([True, False, False, False, False])})
    assert weight.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert not weight.signbit().any()
