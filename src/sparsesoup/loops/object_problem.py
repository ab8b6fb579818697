"""The problem of objects in memory: loss and outputs of any model, and scores as the Trainer computes them."""

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_concat, nested_detach, nested_numpify

from sparsesoup.core.errors import UserError, one_line, require
from sparsesoup.training.batching import Batch, shapes_of
from sparsesoup.training.cost import Cost
from sparsesoup.training.problem import Problem, add_batch_cost, to_device

LossAndOutputs = Callable[[nn.Module, Any], tuple[Tensor, Any]]
Metrics = Callable[..., dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class ObjectProblem(Problem):
    """A problem of objects: the loss comes from the model or the user, scores from batches as they are evaluated.

    Args:
        own_loss: (model, batch) -> mean loss of the task.
        answer: (model, batch) -> (mean loss, outputs).
        compute_metrics: as of the Trainer.
        preprocess_logits: as `preprocess_logits_for_metrics` of the Trainer.
        label_names: names of the labels in a batch, as the Trainer finds them.
        batch_eval_metrics: `compute_metrics` is called with each batch, and `compute_result` True for the last one.
    """

    own_loss: Callable[[nn.Module, Any], Tensor]
    answer: LossAndOutputs
    compute_metrics: Metrics | None = None
    preprocess_logits: Callable[[Any, Any], Any] | None = None
    batch_eval_metrics: bool = False
    label_names: tuple[str, ...] = ("labels",)

    def loss_and_outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (mean loss, outputs [rows, ...]); of several outputs the first."""
        loss, outputs = self.answer(model, batch)
        first = outputs
        while isinstance(first, Mapping | tuple | list) and len(first):
            first = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
        if not isinstance(first, Tensor):
            raise UserError(
                f"{type(model).__name__} returns no outputs besides its loss; let loss=... return (loss, outputs)"
            )
        return loss, first

    def outputs_alone(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the outputs [rows, ...]; the loss comes with them, which a teacher of another task may not have.

        Raises: UserError if the model does not take the batch.
        """
        try:
            return self.loss_and_outputs(model, batch)[1]
        except UserError:
            raise
        except (IndexError, RuntimeError, ValueError, TypeError) as error:
            message = one_line(error)[:150]
            raise UserError(
                f"the teacher does not take these batches ({message}); give one of the same task"
            ) from error

    def score_validation(self, model: nn.Module, cost: Cost) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the scores on the evaluation rows; only what `compute_metrics` takes is kept in memory."""
        training, total, weight = model.training, 0.0, 0
        batches = self.validation.eval_batches(2 * self.training.batch_size)
        kept = _BatchMetrics(self, len(batches)) if self.batch_eval_metrics else _AllPredictions(self)
        model.eval()
        self.observer.begin("validation", 0, len(batches))
        for indices in batches:
            batch = to_device(self.validation.batch(indices), self.accelerator.device)
            shape = ("forward", *shapes_of(batch))
            labels, count = labels_of(batch, self.label_names), _loss_weight(batch, len(indices))
            with torch.no_grad():
                work = functools.partial(self._pass, model, batch)
                (loss, outputs), flops = self.meter.run_and_count_flops(shape, work)
                if self.compute_metrics is not None:
                    if labels is None:
                        self._warn_of_missed_labels(model, batch)
                    kept.add(outputs, labels)
            weight, total = weight + count, total + count * float(loss)
            add_batch_cost(cost, self.validation, indices, flops)
            self.observer.step({})
        self.observer.end()
        model.train(training)
        return {**_finite_numbers(kept.scores()), "negative_loss": -total / max(weight, 1)}, {}

    def check_outputs(self, model: nn.Module) -> None:
        """Raise a UserError if the outputs of two evaluation batches cannot be kept, before anything is trained."""
        if self.compute_metrics is None or self.batch_eval_metrics:
            return
        batches, kept = self.validation.eval_batches(2 * self.training.batch_size), _AllPredictions(self)
        for indices in (batches[0], batches[-1]):
            batch = to_device(self.validation.batch(indices), self.accelerator.device)
            kept.add(self._pass(model, batch)[1], labels_of(batch, self.label_names))

    def _warn_of_missed_labels(self, model: nn.Module, batch: Batch) -> None:
        """Warn if a batch without labels has a part that the model does not take; accuracy against None is 0."""
        if len(batch) > 1 and batch.keys() - inspect.signature(model.forward).parameters.keys():
            warnings.warn(
                f"compute_metrics gets no labels: a batch has {', '.join(batch)}, and labels are looked up as "
                f"{' or '.join(self.label_names)}; name them with label_names=[...]",
                stacklevel=2,
            )

    def _pass(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        if self.compute_metrics is None:
            return self.own_loss(model, batch), None
        return self.answer(model, batch)


def _finite_numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores that are finite numbers; warn of others, such as a table of confusions, or nan."""
    plain = {n: v.item() if hasattr(v, "reshape") and len(v.reshape(-1)) == 1 else v for n, v in scores.items()}
    found = {name: float(v) for name, v in plain.items() if isinstance(v, Real) and math.isfinite(v)}
    for name in plain.keys() - found.keys():
        text = one_line(repr(scores[name]))[:60]
        warnings.warn(f"compute_metrics: {name} is no finite number ({text}), and is left out", stacklevel=2)
    return found


def labels_of(batch: Batch, names: Sequence[str]) -> Any:
    """Return the labels of a batch: a tensor, a tuple of several, or None; of rows that are tuples the last part."""
    found = tuple(batch[name] for name in names if name in batch)
    if not found and len(batch) > 1 and [*batch] == [str(i) for i in range(len(batch))]:
        return batch[str(len(batch) - 1)]
    return found[0] if len(found) == 1 else found or None


def _loss_weight(batch: Batch, rows: int) -> int:
    """Return over how many answers the loss of a batch is a mean: its labelled tokens, or its rows."""
    labels = batch.get("labels")
    if labels is None or labels.dim() < 2 or labels.is_floating_point():
        return rows
    return int((labels != -100).sum())


class _AllPredictions:
    """Outputs and labels of all batches, padded to one length, on the CPU."""

    def __init__(self, problem: ObjectProblem) -> None:
        self.problem, self.outputs, self.labels = problem, None, None

    outputs: Any
    labels: Any

    def add(self, outputs: Any, labels: Any) -> None:
        outputs = outputs if self.problem.preprocess_logits is None else self.problem.preprocess_logits(outputs, labels)
        self.outputs = _append(self.outputs, outputs)
        self.labels = None if labels is None else _append(self.labels, labels)

    def scores(self) -> dict[str, float]:
        if self.problem.compute_metrics is None:
            return {}
        labels = None if self.labels is None else nested_numpify(self.labels)
        found = self.problem.compute_metrics(EvalPrediction(nested_numpify(self.outputs), labels))
        require(isinstance(found, Mapping), "compute_metrics", "a function that returns a dict of scores", repr(found))
        return dict(found)


def _append(before: Any, new: Any) -> Any:
    new = _on_cpu(nested_detach(new))
    try:
        return new if before is None else nested_concat(before, new)
    except (RuntimeError, TypeError, AssertionError, IndexError) as error:
        raise UserError(
            f"the outputs of two batches cannot be joined ({str(error).splitlines()[0]}); keep a tensor of one row an "
            f"example by preprocess_logits_for_metrics=..., or set batch_eval_metrics=True"
        ) from error


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _on_cpu(part) for name, part in value.items()}
    return type(value)(map(_on_cpu, value)) if isinstance(value, list | tuple) else value.cpu()


class _BatchMetrics:
    """Metrics that accumulate batch by batch, so that no output is kept."""

    def __init__(self, problem: ObjectProblem, batches: int) -> None:
        self.problem, self.left, self.found = problem, batches, dict[str, float]()

    def add(self, outputs: Any, labels: Any) -> None:
        assert self.problem.compute_metrics is not None
        self.left -= 1
        outputs = outputs if self.problem.preprocess_logits is None else self.problem.preprocess_logits(outputs, labels)
        found = self.problem.compute_metrics(EvalPrediction(outputs, labels), compute_result=not self.left)
        self.found = dict(found or {})

    def scores(self) -> dict[str, float]:
        return self.found
