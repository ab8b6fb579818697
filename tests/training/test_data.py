"""Batches: random, reproducible, of like length."""

from itertools import islice

import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from sparsesoup.training.batching import Batch, RowBatches


def collate(rows: object) -> Batch:
    return {"labels": torch.tensor(rows)}


def data(count: int, lengths: bool = False) -> RowBatches:
    drawn = torch.empty(count).geometric_(1 / 12, generator=torch.Generator().manual_seed(0)).int()
    return RowBatches(range(count), collate, tuple((drawn + 1).tolist()) if lengths else ())


@given(st.integers(1, 90), st.integers(1, 40), st.integers(0, 30), st.integers(0, 9), st.booleans())
def test_the_batches_from_a_start_are_all_batches_less_the_first(
    count: int, size: int, start: int, seed: int, lengths: bool
) -> None:
    rows = data(count, lengths)
    late = list(islice(rows.train_batches(size, start, seed, "a"), 12))
    assert late == list(islice(rows.train_batches(size, 0, seed, "a"), start, start + 12))


@given(st.integers(1, 90), st.integers(1, 40), st.integers(0, 9), st.booleans())
def test_an_epoch_shows_every_row_at_most_once_in_full_batches(count: int, size: int, seed: int, lengths: bool) -> None:
    rows, full = data(count, lengths), min(size, count)
    each = count // full
    batches = list(islice(rows.train_batches(size, 0, seed), 3 * each))
    for epoch in range(3):
        seen = [i for batch in batches[epoch * each : (epoch + 1) * each] for i in batch]
        assert len(seen) == len(set(seen)) == each * full
        assert set(seen) <= set(range(count))
    assert {len(batch) for batch in batches} == {full}


def test_the_order_depends_on_seed_path_and_epoch() -> None:
    rows = data(64)

    def order(seed: int, *path: object) -> list[list[int]]:
        return list(islice(rows.train_batches(8, 0, seed, *path), 16))

    assert order(0, "a") == order(0, "a")
    found = [order(0, "a"), order(1, "a"), order(0, "b"), order(0)]
    assert all(one != other for i, one in enumerate(found) for other in found[i + 1 :])
    assert order(0)[:8] != order(0)[8:]
    assert order(0)[0] != sorted(order(0)[0])


def test_rows_left_out_of_an_epoch_come_in_others() -> None:
    rows = data(10)
    seen = [{i for batch in list(islice(rows.train_batches(4, epoch * 2, 0), 2)) for i in batch} for epoch in range(6)]
    assert all(len(epoch) == 8 for epoch in seen)
    assert set.union(*seen) == set(range(10))


def test_grouped_by_length_a_tenth_is_padding_at_most_and_the_order_is_random() -> None:
    rows = data(20_000, lengths=True)
    assert 12 < sum(rows.lengths) / len(rows) < 14
    batches = list(islice(rows.train_batches(32, 0, 0), 625))
    computed, padding = (sum(column) for column in zip(*map(rows.count_tokens, batches), strict=True))
    assert padding / computed <= 0.10
    plain = list(islice(data(20_000).train_batches(32, 0, 0), 625))
    whole, lost = (sum(column) for column in zip(*map(rows.count_tokens, plain), strict=True))
    assert lost / whole > 0.5  # what grouping saves
    means = [sum(rows.lengths[i] for i in batch) / 32 for batch in batches]
    assert abs(spearmanr(means, range(625)).statistic) < 0.12
    assert abs(spearmanr(means[1:], means[:-1]).statistic) < 0.12
    assert [i for batch in batches for i in batch] != sorted(i for batch in batches for i in batch)


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(0, 9))
def test_a_share_is_the_same_rows_for_the_same_seed_and_path(count: int, part: float, seed: int) -> None:
    rows = data(count, lengths=True)
    one, other = rows.random_subset(part, seed, "weak", 1), rows.random_subset(part, seed, "weak", 1)
    assert list(one.rows) == list(other.rows)
    assert len(one) == max(1, round(part * count)) == len(set(one.rows))
    assert one.lengths == tuple(rows.lengths[i] for i in one.rows)


def test_shares_differ_by_path_and_seed() -> None:
    rows = data(60)
    found = [list(rows.random_subset(0.5, *key).rows) for key in ((0, 1), (0, 2), (1, 1))]
    assert all(one != other for i, one in enumerate(found) for other in found[i + 1 :])
    assert rows.random_subset(1.0, 0) is rows


@given(st.integers(1, 60), st.integers(1, 20), st.booleans())
def test_evaluation_sees_every_row_once_with_like_lengths_together(count: int, size: int, lengths: bool) -> None:
    rows = data(count, lengths)
    batches = rows.eval_batches(size)
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(count))
    assert all(len(batch) == size for batch in batches[:-1])
    assert order == sorted(order, key=rows.lengths.__getitem__) if lengths else order == sorted(order)


def test_tokens_count_what_is_computed_and_what_of_it_is_padding() -> None:
    rows = RowBatches("abc", collate, (2, 5, 3))
    assert rows.count_tokens([0, 1]) == (10, 3)
    assert rows.count_tokens([2]) == (3, 0)
    assert RowBatches("abc", collate).count_tokens([0, 1]) == (2, 0)
    assert RowBatches(range(5, 9), collate).batch([2, 0])["labels"].tolist() == [7, 5]
