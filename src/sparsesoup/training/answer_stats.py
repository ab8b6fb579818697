"""Statistics of a model's predictions on the validation rows, to tell learning from guessing."""

from collections.abc import Mapping

import torch
from torch import Tensor

FEW = 50  # rows; below this label frequencies are unreliable, so all labels count alike
NONE = -9999.0  # logits below this mark positions that cannot be an answer

Answered = Mapping[str, float]


def answer_statistics(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Return statistics of the predictions on some rows; an empty dict for unknown output shapes.

    Args:
        outputs: [rows, classes]; numbers [rows] or [rows, 1]; or logits of start and end [rows, 2, tokens].
        labels: [rows]; or [row, start, end] for each row.
    Returns: rows; chance, the loss of always predicting the label frequencies; for classes and spans the number of
        distinct predictions and labels, the accuracy, and the share of the commonest label; for numbers the spread of
        the predictions and of the labels, and the explained share of the labels' variance.

    >>> answer_statistics(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))["answers"]
    1
    """
    rows, outputs = len(labels), outputs.detach().float().cpu()
    labels = labels.detach().cpu()
    if labels.dim() == 1 and labels.is_floating_point() and outputs.numel() == rows:
        return {"rows": rows, **_regression_statistics(outputs.reshape(rows).double(), labels.double())}
    if labels.dim() == 1 and not labels.is_floating_point() and outputs.dim() == 2:
        shares = torch.unique(labels, return_counts=True)[1] / rows
        if rows < FEW:
            shares = torch.full_like(shares, 1 / len(shares))
        chance = float(-(shares * shares.log()).sum())
        return {"rows": rows, "chance": chance, **_class_statistics(outputs.argmax(-1, keepdim=True), labels[:, None])}
    if labels.dim() == 2 and labels.shape[1] == 3 and outputs.dim() == 3 and outputs.shape[1] == 2:
        positions = (outputs[:, 0] > NONE).sum(-1).clamp(min=1)
        chance = float(positions.double().log().mean())
        return {"rows": rows, "chance": chance, **_class_statistics(outputs.argmax(-1), labels[:, 1:])}
    return {}


def _class_statistics(answers: Tensor, labels: Tensor) -> dict[str, float]:
    given, often = torch.unique(answers, dim=0, return_counts=True)
    true, counts = torch.unique(labels, dim=0, return_counts=True)
    return {
        "answers": len(given), "labels": len(true), "answer": int(given[often.argmax()][0]),
        "right": float((answers == labels).all(-1).double().mean()), "commonest": float(counts.max() / len(labels)),
    }  # fmt: skip


def _regression_statistics(answers: Tensor, labels: Tensor) -> dict[str, float]:
    variance = float(labels.var(correction=0))
    if not variance:
        return {}
    missed = float((answers - labels).square().mean()) / variance
    spread = float(answers.var(correction=0) / variance) ** 0.5
    return {"chance": variance, "spread": spread, "answer": float(answers.mean()), "explained": 1 - missed}
