"""Problem: pre-trained model, training and validation rows, loss and metric. It has no test split."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from torch import Tensor, nn
from torch.nn import Parameter

from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.schedules import LinearWarmupDecay
from sparsesoup.core.targets import Targets, target_parameters, weights_fingerprint
from sparsesoup.core.ticket import Ticket
from sparsesoup.training.answer_stats import answer_statistics
from sparsesoup.training.backends import checkpoint_gradients_, compile_, make_accelerator
from sparsesoup.training.batching import Batch, RowBatches, shapes_of
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.cost import Cost, CostTracker
from sparsesoup.training.forks import ParallelMap, serial_map
from sparsesoup.training.loss_parts import LossParts
from sparsesoup.training.model_copy import copy_model
from sparsesoup.training.observer import Observer
from sparsesoup.training.optimizers import make_optimizer
from sparsesoup.training.prefetch import prepare_batches
from sparsesoup.training.size import RunSize
from sparsesoup.training.snapshots import SnapshotStore
from sparsesoup.training.state import TrainState, named_weights
from sparsesoup.training.train_cache import TrainingCache

GateParameters = tuple[Sequence[Parameter], float]  # trainable gate parameters, and the factor on their learning rate


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A pre-trained model and the task to prune it for.

    Args:
        pretrained: the model, head included; never modified.
        targets: its prunable parameters.
        train, validation: rows for training and for selection. A method sees no others.
        predict: (model, batch) -> outputs [rows, ...].
        criterion: (outputs, batch) -> mean loss of the task.
        objective: (model, batch) -> training loss, or its parts, if it differs from the criterion (distillation).
        teacher: the teacher of the objective, for methods with a loss of their own.
        metric: (outputs, labels) -> named scores, higher = better; the first one is used for selection.
        steps: T, the steps of one normal fine-tuning.
        training: training settings.
        seed: seed of all random choices.
        meter, checkpointer, observer: costs, checkpoints, progress.
        cache: trainings shared with other runs.
        map: runs a function on copies of the state (serially or in processes).
        snapshots: where forks and rewinding points are kept.
        head: names of the task head's parameters, on top of the pre-trained model.
        fresh: names of the randomly initialised parameters, which are in no checkpoint.
        notes: remarks on the model for the user, one sentence each.
    """

    pretrained: nn.Module
    targets: Targets
    train: RowBatches
    validation: RowBatches
    predict: Callable[[nn.Module, Batch], Tensor]
    criterion: Callable[[Tensor, Batch], Tensor]
    metric: Callable[[Tensor, Tensor], dict[str, float]]
    steps: int
    training: TrainingConfig = field(default_factory=TrainingConfig)
    objective: Callable[[nn.Module, Batch], Tensor | LossParts] | None = None
    teacher: nn.Module | None = None
    seed: int = 0
    meter: CostTracker = field(default_factory=CostTracker)
    checkpointer: Checkpointer = field(default_factory=lambda: Checkpointer(CostTracker()))
    observer: Observer = field(default_factory=Observer)
    cache: TrainingCache = field(default_factory=TrainingCache)
    map: ParallelMap = serial_map
    snapshots: SnapshotStore = field(default_factory=SnapshotStore)
    head: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean training loss of a batch."""
        return self.loss_parts(model, batch).total

    def loss_parts(self, model: nn.Module, batch: Batch) -> LossParts:
        """Return the parts of the mean training loss of a batch."""
        if self.objective is None:
            return LossParts(self.criterion(self.predict(model, batch), batch))
        loss = self.objective(model, batch)
        return loss if isinstance(loss, LossParts) else LossParts(loss)

    def outputs_alone(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the outputs [rows, ...] of one pass, of a teacher for example."""
        return self.predict(model, batch)

    def loss_and_outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (mean loss of the task, outputs [rows, ...]) of one pass."""
        outputs = self.predict(model, batch)
        return self.criterion(outputs, batch), outputs

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in an epoch."""
        return max(1, len(self.train) // self.training.rows_per_step)

    @property
    def size(self) -> RunSize:
        """All that a method's schedule depends on."""
        return RunSize(self.steps, self.steps_per_epoch, self.training, self.seed)

    def rate_schedule(self, total: int | None = None) -> LinearWarmupDecay:
        """Return the learning rate schedule for `total` steps (default T): warm-up, then linear decay to 0."""
        return self.size.rate_schedule(total)

    @property
    def accelerator(self) -> Accelerator:
        """accelerate's view of this machine: device and precision."""
        known: Accelerator | None = self.__dict__.get("_accelerator")
        # accelerate has one device and one precision per process: setting others changes those of earlier problems.
        if known is None or not is_initialized() or known.mixed_precision != self.training.mixed_precision:
            known = self.__dict__["_accelerator"] = make_accelerator(self.training)
        return known

    def start_run(self, attach: Callable[[nn.Module], GateParameters] | None = None) -> TrainState:
        """Start a run: a copy of the pre-trained model, a fresh optimizer, all weights kept.

        Stages and costs of earlier runs on this problem are dropped.

        Args:
            attach: puts gates on the copy and returns their parameters with their learning rate factor.
        """
        self.checkpointer.begin_run(self.meter)
        model = copy_model(self.pretrained)
        if self.training.freeze_embeddings:
            _freeze_embeddings(model)
        if self.training.gradient_checkpointing:
            checkpoint_gradients_(model)
        scores, factor = attach(model) if attach else ([], 1.0)
        learned = {id(score) for score in scores}
        weights = [p for p in model.parameters() if p.requires_grad and id(p) not in learned]
        groups = [
            _parameter_group([p for p in weights if p.dim() > 1], self.training.weight_decay, decays=True),
            _parameter_group([p for p in weights if p.dim() <= 1]),
            _parameter_group(list(scores), factor=factor),
        ]
        model = self.accelerator.prepare_model(model)
        if self.training.torch_compile:
            compile_(model)
        optimizer = make_optimizer(self.training.optimizer, [g for g in groups if g["params"]])
        masks = algebra.dense_masks(target_parameters(model, self.targets))
        half = self.training.mixed_precision == "fp16"
        scaler = torch.amp.GradScaler(self.accelerator.device.type) if half else None
        return TrainState(model=model, optimizer=optimizer, targets=self.targets, masks=masks, scaler=scaler)

    @torch.no_grad()
    def reset_to_pretrained_(self, state: TrainState) -> None:
        """Reset a state to its beginning: theta_0, a fresh optimizer, all weights kept. Memory and notes stay.

        Copies from the pre-trained model, so no snapshot is needed. Not for a state with gates.
        """
        plain = named_weights(self.pretrained)
        for name, t in named_weights(state.model).items():
            t.copy_(plain[name])
        state.reset_optimizer_()
        state.step, state.masks = 0, algebra.dense_masks(state.prunable_parameters())

    def base_fingerprint(self) -> str:
        """Return the fingerprint of the pre-trained prunable weights, which identifies the base model of a ticket."""
        return weights_fingerprint(target_parameters(self.pretrained, self.targets))

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Return the scores on the validation rows; the cost is recorded."""
        with record_time(self.meter, "validation") as cost:
            return self.score_validation(model, cost)[0]

    def score_validation(self, model: nn.Module, cost: Cost) -> tuple[dict[str, float], dict[str, Any]]:
        """Return (scores on the validation rows, statistics of the answers); the cost is added to `cost`."""
        outputs, labels = collect_outputs(self, model, self.validation, cost)
        return self.metric(outputs, labels), answer_statistics(outputs, labels)

    def finish_run(self, state: TrainState, **notes: Any) -> Ticket:
        """Validate the final model, end the run and return its ticket."""
        self.checkpointer.end_run()
        algebra.apply_masks_(state.prunable_parameters(), state.masks)
        with record_time(self.meter, "validation") as cost:
            metrics, answers = self.score_validation(state.model, cost)
        found = {name: t.detach().cpu().clone() for name, t in state.model.state_dict().items()}
        masks = {name: m.cpu() for name, m in state.masks.items()}
        found_notes = {**state.notes, **notes}
        return Ticket(masks, found, metrics, self.meter.to_json(), found_notes, answers)


def _freeze_embeddings(model: nn.Module) -> None:
    """Freeze every module that is an embedding or is named so; raise a UserError if there is none."""
    found = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) or name.endswith("embeddings")]
    if not found:
        raise UserError("this model has no embeddings to freeze; leave train.freeze_embeddings out")
    for module in found:
        module.requires_grad_(False)


def _parameter_group(
    params: list[Parameter], decay: float = 0.0, decays: bool = False, factor: float = 1.0
) -> dict[str, Any]:
    """Return an optimizer group: `rate_factor` on the rate of the run; `decays`: overrides may set its weight decay."""
    return {"params": params, "weight_decay": decay, "decays": decays, "factor": factor}


@contextmanager
def record_time(meter: CostTracker, label: str) -> Iterator[Cost]:
    """Yield a cost to fill in; its time is measured and it is added to the label, even if the block fails."""
    cost, began = Cost(), time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds += time.perf_counter() - began
        meter.add_cost(label, cost)


def evaluate_model(
    problem: Problem, model: nn.Module, data: RowBatches, cost: Cost, label: str = "validation"
) -> dict[str, float]:
    """Return the scores of a model on any rows, in eval mode, without gradients; the cost is added to `cost`.

    Args:
        label: what an observer calls the pass.
    """
    return problem.metric(*collect_outputs(problem, model, data, cost, label))


def collect_outputs(
    problem: Problem, model: nn.Module, data: RowBatches, cost: Cost, label: str = "validation"
) -> tuple[Tensor, Tensor]:
    """Return (outputs, labels) of a model on any rows, as `evaluate_model` computes them."""
    training = model.training
    model.eval()
    outputs, labels = [], []
    batches = data.eval_batches(2 * problem.training.batch_size)
    problem.observer.begin(label, 0, len(batches))
    device = problem.accelerator.device
    prepared = prepare_batches(data.batch, batches, problem.training.dataloader_num_workers, device)
    with torch.no_grad(), contextlib.closing(prepared):
        for indices, found in zip(batches, prepared, strict=True):
            batch = to_device(found, device)
            shape = ("forward", problem.pretrained, *shapes_of(batch))
            out, flops = problem.meter.run_and_count_flops(shape, functools.partial(problem.predict, model, batch))
            outputs.append(out.float().cpu())
            labels.append(batch["labels"].cpu())
            add_batch_cost(cost, data, indices, flops)
            problem.observer.step({})
    problem.observer.end()
    model.train(training)
    return torch.cat(outputs), torch.cat(labels)


def add_batch_cost(cost: Cost, data: RowBatches, indices: list[int], flops: int) -> None:
    """Add a batch to a cost."""
    tokens, padding = data.count_tokens(indices)
    cost.examples += len(indices)
    cost.tokens += tokens
    cost.padding += padding
    cost.flops += flops


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on the model's device."""
    return {n: t.to(device, non_blocking=True) if isinstance(t, Tensor) else t for n, t in batch.items()}
