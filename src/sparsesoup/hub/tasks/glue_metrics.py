"""Metrics by name, from scikit-learn and scipy; quiet and defined for constant predictions."""

import math
import warnings
from collections.abc import Callable

import numpy as np
from scipy import stats
from sklearn import metrics as judged

Judge = Callable[[np.ndarray, np.ndarray], float]


def _accuracy(truth: np.ndarray, answers: np.ndarray) -> float:
    return float((truth == answers).mean())


def _matthews(truth: np.ndarray, answers: np.ndarray) -> float:
    # Undefined if either side is constant; GLUE then reports 0.0, "no better than chance".
    constant = len(np.unique(truth)) < 2 or len(np.unique(answers)) < 2
    return 0.0 if constant else float(judged.matthews_corrcoef(truth, answers))


def _f1(average: str) -> Judge:
    return lambda truth, answers: float(judged.f1_score(truth, answers, average=average, zero_division=0.0))


def _correlation_judge(of: Callable[..., tuple[float, float]]) -> Judge:
    def judge(truth: np.ndarray, answers: np.ndarray) -> float:
        if len(np.unique(truth)) < 2 or len(np.unique(answers)) < 2:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy warns about nearly constant inputs
            found = float(of(truth.astype(np.float64), answers.astype(np.float64))[0])
        return found if math.isfinite(found) else 0.0

    return judge


METRICS: dict[str, Judge] = {
    "accuracy": _accuracy,
    "matthews": _matthews,
    "f1": _f1("binary"),
    "macro_f1": _f1("macro"),
    "pearson": _correlation_judge(stats.pearsonr),
    "spearman": _correlation_judge(stats.spearmanr),
}
