"""Outputs, loss and metrics of the tasks: of classes and numbers, with GLUE's by name, and SQuAD's of answers."""

import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from sklearn import metrics
from torch import Tensor, nn
from torch.nn import functional

from sparsesoup.core.errors import UserError
from sparsesoup.hub.tasks.labels import TextTask
from sparsesoup.training.batching import Batch

ScoreFunction = Callable[[np.ndarray, np.ndarray], float]  # (truth, answers) -> score
MetricFunction = Callable[[Tensor, Tensor], dict[str, float]]  # (outputs, labels) -> scores by name

GLUE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # name -> its text columns, its metrics
    "cola": (("sentence",), ("matthews",)),
    "sst2": (("sentence",), ("accuracy",)),
    "mrpc": (("sentence1", "sentence2"), ("accuracy", "f1")),
    "qqp": (("question1", "question2"), ("accuracy", "f1")),
    "stsb": (("sentence1", "sentence2"), ("pearson", "spearman")),
    "mnli": (("premise", "hypothesis"), ("accuracy",)),
    "qnli": (("question", "sentence"), ("accuracy",)),
    "rte": (("sentence1", "sentence2"), ("accuracy",)),
    "wnli": (("sentence1", "sentence2"), ("accuracy",)),
}
LONGEST = 30  # maximum tokens of an answer, as in BERT's evaluation (Devlin et al. 2019)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def glue_task(name: str) -> str | None:
    """Return the GLUE task at the end of a dataset's name, if any.

    >>> glue_task("nyu-mll/glue:rte"), glue_task("glue/qnli_dev_split"), glue_task("data/colander")
    ('rte', 'qnli', None)
    """
    found = re.search(rf"(?:^|[/\\])glue[/\\:]({'|'.join(GLUE)})(?:_[^/\\:]*)?/?$", name)
    return found.group(1) if found else None


def default_metrics(labels: Sequence[str], glue: str | None) -> tuple[str, ...]:
    """Return the default metrics for classes, or for numbers if there are none; `glue` is the GLUE task, if any."""
    if not labels:
        return ("pearson", "spearman")
    # Another label column than GLUE's own may not fit GLUE's metric: F1 of one class needs two classes.
    fits = glue and glue != "stsb" and (len(labels) == 2 or glue == "mnli")
    return GLUE[glue][1] if glue and fits else ("accuracy", "macro_f1")


def predict_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return logits [rows, classes], or numbers [rows, 1] for regression."""
    return model(**{name: t for name, t in batch.items() if name != "labels"}).logits


def task_criterion(task: TextTask) -> Callable[[Tensor, Batch], Tensor]:
    """Return the loss of a task: cross-entropy, or mean squared error for regression."""
    if task.labels:
        return lambda outputs, batch: functional.cross_entropy(outputs.float(), batch["labels"])
    return lambda outputs, batch: functional.mse_loss(outputs.float().squeeze(-1), batch["labels"])


def task_metric(task: TextTask) -> MetricFunction:
    """Return the metric function of a task: (outputs, labels) -> every metric of `task.metrics` by name.

    Outputs are logits [rows, classes], or numbers [rows] or [rows, 1] for regression; labels are [rows].
    """

    def score_outputs(outputs: Tensor, labels: Tensor) -> dict[str, float]:
        scores, truth = as_finite_array(outputs), labels.detach().cpu().numpy()
        answers = scores.argmax(-1) if task.labels else scores.reshape(len(truth))
        return {name: METRICS[name](truth, answers) for name in task.metrics}

    return score_outputs


def as_finite_array(outputs: Tensor) -> np.ndarray:
    """Return a model's outputs as an array; raise a UserError if one is not finite."""
    scores = outputs.detach().float().cpu().numpy()
    if not np.isfinite(scores).all():
        raise UserError(
            f"{int((~np.isfinite(scores)).sum())} of {scores.size} outputs of the model are NaN or infinite, where "
            "numbers are needed: the training diverged; lower the learning rate"
        )
    return scores


def _unless_constant(score: Callable[[np.ndarray, np.ndarray], float]) -> ScoreFunction:
    """Return a judge that gives 0.0, "no better than chance", as GLUE does, where a side is constant."""

    def judge_varied(truth: np.ndarray, answers: np.ndarray) -> float:
        if len(np.unique(truth)) < 2 or len(np.unique(answers)) < 2:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy warns about nearly constant inputs
            found = float(score(truth, answers))
        return found if math.isfinite(found) else 0.0

    return judge_varied


METRICS: dict[str, ScoreFunction] = {
    "accuracy": lambda truth, answers: float((truth == answers).mean()),
    "matthews": _unless_constant(metrics.matthews_corrcoef),
    "f1": lambda truth, answers: float(metrics.f1_score(truth, answers, average="binary", zero_division=0.0)),
    "macro_f1": lambda truth, answers: float(metrics.f1_score(truth, answers, average="macro", zero_division=0.0)),
    "pearson": _unless_constant(lambda a, b: stats.pearsonr(a.astype(np.float64), b.astype(np.float64))[0]),
    "spearman": _unless_constant(lambda a, b: stats.spearmanr(a.astype(np.float64), b.astype(np.float64))[0]),
}


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

    `start` and `end` are logits of the context's tokens, [tokens] each; `longest` is the most tokens of a span.
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
