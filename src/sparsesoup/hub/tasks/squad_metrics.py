"""SQuAD metrics, as in its official evaluation, over all windows of a context."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from sparsesoup.hub.tasks.metrics import as_finite_array

LONGEST = 30  # maximum tokens of an answer, as in BERT's evaluation (Devlin et al. 2019)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ContextWindow(NamedTuple):
    """A part of a context with its question, as one row of tokens.

    Args:
        number, question: index of the window among all windows, and of its question among all questions.
        none: position in the row that stands for "no answer here".
        first, tokens: position in the row of the context's first token, and the number of its tokens.
        begin: index of that first token in the whole context.
        start, end: positions in the row of the labels, both `none` if the answer is not in this window.
    """

    number: int
    question: int
    none: int
    first: int
    tokens: int
    begin: int
    start: int
    end: int


def normalize_answer(text: str) -> str:
    """Normalise a text as SQuAD does: no case, punctuation, articles or extra spaces (Rajpurkar et al. 2016, sec. 6.1).

    >>> normalize_answer("The  Cat's  pyjamas, and a hat")
    'cats pyjamas and hat'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def exact_match(answer: str, truth: str) -> float:
    """Return 1 if both texts are equal up to case, punctuation, articles and spaces."""
    return float(normalize_answer(answer) == normalize_answer(truth))


def f1(answer: str, truth: str) -> float:
    """Return the F1 score of the words in answer and truth; two empty texts agree."""
    ours, theirs = normalize_answer(answer).split(), normalize_answer(truth).split()
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * sum((Counter(ours) & Counter(theirs)).values()) / (len(ours) + len(theirs))


def best_span(start: np.ndarray, end: np.ndarray, longest: int = LONGEST) -> tuple[float, int, int]:
    """Return (score, first, last) of the span with the largest start + end logit; the earliest of equal ones.

    Args:
        start, end: logits of the context's tokens, [tokens] each, at least one.
        longest: maximum tokens of a span.
    """
    padded = np.concatenate([end, np.full(longest - 1, -np.inf, end.dtype)])
    ends = np.lib.stride_tricks.sliding_window_view(padded, longest)
    totals = start + ends.max(1)
    first = int(totals.argmax())
    return float(totals[first]), first, first + int(ends[first].argmax())


def squad_metric(
    windows: Sequence[ContextWindow],
    contexts: Sequence[str],
    places: Sequence[np.ndarray],
    truths: Sequence[Sequence[str]],
    unanswerable: bool,
) -> Callable[[Tensor, Tensor], dict[str, float]]:
    """Return the metric of these windows: (outputs, labels) -> mean F1 and exact match of the questions in them.

    A question's answer is the best span of all its windows; its score is that for the best matching correct answer.

    Args:
        windows: windows indexed by `labels[:, 0]`; outputs are logits [rows, start and end, tokens].
        contexts, places, truths: for each question the context, the characters of each of its tokens ([tokens, 2],
            begin and end), and the correct answers; empty if there is none.
        unanswerable: predict no answer if that scores higher in every window (SQuAD 2.0).
    """

    def score_outputs(outputs: Tensor, labels: Tensor) -> dict[str, float]:
        scores, numbers = as_finite_array(outputs), labels[:, 0].tolist()
        best: dict[int, tuple[float, str]] = {}
        none: dict[int, float] = {}
        for row in np.argsort(numbers):  # so that ties do not depend on the evaluation order
            window = windows[numbers[row]]
            question, context = window.question, slice(window.first, window.first + window.tokens)
            none[question] = min(none.get(question, np.inf), float(scores[row, :, window.none].sum()))
            found = best_span(*scores[row][:, context]) if window.tokens else (-np.inf, 0, 0)
            if question not in best or found[0] > best[question][0]:
                spots = places[question][window.begin : window.begin + window.tokens]
                text = contexts[question][spots[found[1], 0] : spots[found[2], 1]] if window.tokens else ""
                best[question] = found[0], text
        given = {q: "" if unanswerable and none[q] > score else text for q, (score, text) in best.items()}
        return {
            measure.__name__: float(np.mean([max(measure(a, t) for t in truths[q] or [""]) for q, a in given.items()]))
            for measure in (f1, exact_match)
        }

    return score_outputs
