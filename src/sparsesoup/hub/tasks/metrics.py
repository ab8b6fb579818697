"""The loss and the metrics of a task."""

from collections.abc import Callable

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from sparsesoup.core.errors import UserError
from sparsesoup.hub.tasks.columns import TextTask
from sparsesoup.hub.tasks.glue_metrics import METRICS
from sparsesoup.training.batching import Batch

Judged = Callable[[Tensor, Tensor], dict[str, float]]  # (outputs, labels) -> scores by name


def predict_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return logits [rows, classes], or numbers [rows, 1] for regression."""
    return model(**{name: t for name, t in batch.items() if name != "labels"}).logits


def task_criterion(task: TextTask) -> Callable[[Tensor, Batch], Tensor]:
    """Return the loss of a task: cross-entropy, or mean squared error for regression."""

    def classify(outputs: Tensor, batch: Batch) -> Tensor:
        return functional.cross_entropy(outputs.float(), batch["labels"])

    def regress(outputs: Tensor, batch: Batch) -> Tensor:
        return functional.mse_loss(outputs.float().squeeze(-1), batch["labels"])

    return classify if task.labels else regress


def task_metric(task: TextTask) -> Judged:
    """Return the metric function of a task: (outputs, labels) -> every metric of `task.metrics` by name.

    Outputs are logits [rows, classes], or numbers [rows] or [rows, 1] for regression; labels are [rows].
    """

    def judge(outputs: Tensor, labels: Tensor) -> dict[str, float]:
        scores, truth = as_finite_array(outputs), labels.detach().cpu().numpy()
        answers = scores.argmax(-1) if task.labels else scores.reshape(len(truth))
        return {name: METRICS[name](truth, answers) for name in task.metrics}

    return judge


def as_finite_array(outputs: Tensor) -> np.ndarray:
    """Return a model's outputs as an array; raise a UserError if one is not finite."""
    scores = outputs.detach().float().cpu().numpy()
    if not np.isfinite(scores).all():
        raise UserError(
            f"{int((~np.isfinite(scores)).sum())} of {scores.size} outputs of the model are NaN or infinite, where "
            "numbers are needed: the training diverged; lower the learning rate"
        )
    return scores
