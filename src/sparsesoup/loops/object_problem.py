"""The problem of objects in memory, whose scores come from `compute_metrics` as the Trainer calls it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_concat, nested_numpify

from sparsesoup.training.batching import Batch
from sparsesoup.training.cost import Cost
from sparsesoup.training.problem import Problem, add_batch_cost, to_device


@dataclass(frozen=True, kw_only=True)
class ObjectProblem(Problem):
    """A problem of objects: the loss comes from the model or the user, scores from batches as they are evaluated.

    Args:
        compute_metrics: as of the Trainer.
        preprocess_logits: as `preprocess_logits_for_metrics` of the Trainer.
    """

    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None
    preprocess_logits: Callable[[Any, Any], Any] | None = None

    def score_validation(self, model: nn.Module, cost: Cost) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the scores on the evaluation rows; only what `compute_metrics` takes is kept in memory."""
        training, rows, total, kept = model.training, 0, 0.0, _Predictions(self.preprocess_logits)
        batches = self.validation.eval_batches(2 * self.training.batch_size)
        model.eval()
        self.observer.begin("validation", 0, len(batches))
        for indices in batches:
            batch = to_device(self.validation.batch(indices), self.accelerator.device)
            shape = ("forward", *(tuple(t.shape) for t in batch.values()))
            with torch.no_grad():
                work = functools.partial(self._loss_and_outputs, model, batch)
                (loss, outputs), flops = self.meter.run_and_count_flops(shape, work)
                if self.compute_metrics is not None:
                    kept.add(outputs, batch.get("labels"))
            rows, total = rows + len(indices), total + len(indices) * float(loss)
            add_batch_cost(cost, self.validation, indices, flops)
            self.observer.step({})
        self.observer.end()
        model.train(training)
        found = {} if self.compute_metrics is None else dict(self.compute_metrics(kept.prediction()))
        return {**found, "negative_loss": -total / max(rows, 1)}, {}

    def _loss_and_outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Return the loss and, for metrics, the outputs: a second pass, since the loss may be any function."""
        loss = self.training_loss(model, batch)
        if self.compute_metrics is None:
            return loss, None
        return loss, model(**{name: t for name, t in batch.items() if name != "labels"})


class _Predictions:
    """Logits and labels of all batches, padded to one length, on the CPU."""

    def __init__(self, preprocess: Callable[[Any, Any], Any] | None) -> None:
        self.preprocess, self.logits, self.labels = preprocess, None, None

    logits: Any
    labels: Any

    def add(self, outputs: Any, labels: Tensor | None) -> None:
        logits = outputs.logits if hasattr(outputs, "logits") else outputs
        logits = logits if self.preprocess is None else self.preprocess(logits, labels)
        for name, new in (("logits", logits.cpu()), ("labels", None if labels is None else labels.cpu())):
            before = getattr(self, name)
            setattr(self, name, new if before is None else nested_concat(before, new))

    def prediction(self) -> EvalPrediction:
        return EvalPrediction(predictions=nested_numpify(self.logits), label_ids=nested_numpify(self.labels))
