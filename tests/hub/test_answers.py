"""Answers to questions are judged as SQuAD judges them, over all windows of a context."""

import itertools

import numpy as np
import pytest
import torch

from sparsesoup.core.errors import UserError
from sparsesoup.hub.tasks.metrics import (
    ContextWindow,
    best_span,
    exact_match,
    f1,
    normalize_answer,
    squad_metric,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Denver Broncos!", "denver broncos"),
        ("  an  Apple a day,  the end ", "apple day end"),
        ("theory of a-the", "theory of athe"),  # punctuation goes first and joins the words
        ("U.S.A.", "usa"),
        ("The", ""),
        ("Café\tau\nlait", "café au lait"),
    ],
)
def test_case_punctuation_articles_and_spaces_do_not_count(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("answer", "truth", "shared", "exact"),
    [
        ("Denver Broncos", "the Denver Broncos", 1.0, 1.0),
        ("Beyonce", "Beyoncé and Bruno Mars", 0.0, 0.0),
        ("Santa Clara, California", "Santa Clara", 0.8, 0.0),  # precision 2/3, recall 1
        ("in the year 1976", "1976", 0.5, 0.0),  # precision 1/3, recall 1
        ("very very good", "very good very good", 6 / 7, 0.0),  # three of three, three of four
        ("", "", 1.0, 1.0),
        ("1976", "", 0.0, 0.0),
        ("", "1976", 0.0, 0.0),
        ("the", "a", 1.0, 1.0),  # nothing is left of either
    ],
)
def test_f1_and_exact_match_agree_with_hand_arithmetic(answer, truth, shared, exact):
    assert f1(answer, truth) == pytest.approx(shared)
    assert exact_match(answer, truth) == exact


def test_the_best_span_is_that_of_a_search_through_all():
    for seed, size, longest in itertools.product(range(20), (1, 2, 9), (1, 3, 30)):
        draw = np.random.default_rng(seed)
        start, end = draw.integers(-3, 3, (2, size)).astype(np.float32)
        spans = [(i, j) for i in range(size) for j in range(i, min(size, i + longest))]
        expected = max(spans, key=lambda ij: (start[ij[0]] + end[ij[1]], -ij[0], -ij[1]))
        assert best_span(start, end, longest) == (start[expected[0]] + end[expected[1]], *expected)


# One context of six words; question 0 sees it in two windows, question 1 in one.
CONTEXT = "one two three four five six"
STORAGES = np.array([(0, 3), (4, 7), (8, 13), (14, 18), (19, 23), (24, 27)])
WINDOWS = [
    ContextWindow(0, 0, 0, 2, 4, 0, 0, 0),
    ContextWindow(1, 0, 0, 2, 4, 2, 0, 0),
    ContextWindow(2, 1, 0, 1, 6, 0, 0, 0),
]


def judged(said, truths=(["five"], ["two three", "one two three"]), unanswerable=False, order=(0, 1, 2)):
    """Scores of what each window says: (start, end, logit of both, logit of `none`), places in the row."""
    outputs = torch.full((3, 2, 8), -1e4)
    for i, (start, end, logit, none) in enumerate(said):
        outputs[i, :, 1:7] = 0.0
        outputs[i, 0, start], outputs[i, 1, end] = logit, logit
        outputs[i, :, 0] = none
    labels = torch.tensor([[i, 0, 0] for i in order])
    judging = squad_metric(WINDOWS, [CONTEXT] * 2, [STORAGES] * 2, truths, unanswerable)
    return judging(outputs[list(order)], labels)


def test_the_best_window_answers_and_the_nearest_truth_counts():
    # The second window of question 0 is surer: its third context token is the fifth of the context. Question 1 says
    # "two three four": two of three words right by either truth, the longer truth has three.
    said = [(2, 2, 1.0, 0.0), (4, 4, 2.0, 0.0), (2, 4, 1.0, 0.0)]
    assert judged(said) == pytest.approx({"f1": (1 + 4 / 5) / 2, "exact_match": 0.5})
    assert list(judged(said)) == ["f1", "exact_match"]
    assert judged([(2, 2, 3.0, 0.0), *said[1:]]) == pytest.approx({"f1": 0.4, "exact_match": 0.0})


def test_the_order_of_the_rows_does_not_matter_even_in_ties():
    tied = [(2, 2, 1.0, 0.0), (4, 4, 1.0, 0.0), (2, 3, 1.0, 0.0)]
    found = [judged(tied, order=order) for order in itertools.permutations(range(3))]
    assert found == [{"f1": 0.5, "exact_match": 0.5}] * 6


def test_only_questions_that_occur_are_counted():
    labels = torch.tensor([[2, 0, 0]])
    outputs = torch.zeros(1, 2, 8)
    outputs[0, 0, 2], outputs[0, 1, 3] = 1.0, 1.0
    judging = squad_metric(WINDOWS, [CONTEXT] * 2, [STORAGES] * 2, [["five"], ["two three"]], False)
    assert judging(outputs, labels) == {"f1": 1.0, "exact_match": 1.0}


def test_no_answer_wins_where_every_window_prefers_it_and_where_it_is_allowed():
    # Question 0 has no answer. Its windows' nulls are worth 6 and 2 * none, its best span is worth 4.
    for none, right in ((1.0, 0.0), (2.5, 1.0)):
        said = [(2, 2, 1.0, 3.0), (4, 4, 2.0, none), (2, 3, 1.0, 0.0)]
        assert judged(said, ([], ["two three"]), unanswerable=True)["exact_match"] == (right + 1) / 2
        assert judged(said, ([], ["two three"]), unanswerable=False)["exact_match"] == 0.5


def test_what_lies_outside_the_context_is_never_an_answer():
    # A question's token has the largest logits of all, and so has padding.
    outputs = torch.zeros(1, 2, 8)
    outputs[0, :, 1], outputs[0, :, 7] = 9.0, 9.0
    outputs[0, :, 3] = 1.0
    judging = squad_metric([ContextWindow(0, 0, 0, 2, 4, 0, 0, 0)], [CONTEXT], [STORAGES], [["two"]], False)
    assert judging(outputs, torch.tensor([[0, 0, 0]]))["exact_match"] == 1.0


def test_outputs_that_are_not_finite_end_in_one_line():
    with pytest.raises(UserError, match="outputs of the model are NaN or infinite"):
        judged([(2, 2, float("nan"), 0.0), (4, 4, 2.0, 0.0), (2, 3, 1.0, 0.0)])
