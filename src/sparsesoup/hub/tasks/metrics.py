"""Outputs, loss and metrics of classes and numbers; GLUE's tasks by name."""

import math
import re
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats
from sklearn import metrics
from torch import Tensor, nn
from torch.nn import functional

from sparsesoup.core.errors import UserError
from sparsesoup.hub.tasks.labels import TextTask
from sparsesoup.training.batching import Batch

Judge = Callable[[np.ndarray, np.ndarray], float]  # (truth, answers) -> score
Judged = Callable[[Tensor, Tensor], dict[str, float]]  # (outputs, labels) -> scores by name

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


def task_metric(task: TextTask) -> Judged:
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


def _unless_constant(score: Callable[[np.ndarray, np.ndarray], float]) -> Judge:
    """Return a judge that gives 0.0, "no better than chance", as GLUE does, where a side is constant."""

    def judge_varied(truth: np.ndarray, answers: np.ndarray) -> float:
        if len(np.unique(truth)) < 2 or len(np.unique(answers)) < 2:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy warns about nearly constant inputs
            found = float(score(truth, answers))
        return found if math.isfinite(found) else 0.0

    return judge_varied


METRICS: dict[str, Judge] = {
    "accuracy": lambda truth, answers: float((truth == answers).mean()),
    "matthews": _unless_constant(metrics.matthews_corrcoef),
    "f1": lambda truth, answers: float(metrics.f1_score(truth, answers, average="binary", zero_division=0.0)),
    "macro_f1": lambda truth, answers: float(metrics.f1_score(truth, answers, average="macro", zero_division=0.0)),
    "pearson": _unless_constant(lambda a, b: stats.pearsonr(a.astype(np.float64), b.astype(np.float64))[0]),
    "spearman": _unless_constant(lambda a, b: stats.spearmanr(a.astype(np.float64), b.astype(np.float64))[0]),
}
