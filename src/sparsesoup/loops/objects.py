"""Prune model objects on dataset objects, or whatever a Trainer holds, with our own loop: every method runs."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, Trainer, default_data_collator

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import write_json
from sparsesoup.core.masks import Masks
from sparsesoup.core.ticket import Ticket, save_masks
from sparsesoup.loops.attach import Prunable, find_targets, named_method
from sparsesoup.loops.object_problem import ObjectProblem
from sparsesoup.loops.problem import Loss, as_mapping
from sparsesoup.methods import TABLE, Method, row_of
from sparsesoup.training.batching import RowBatches
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.problem import NullObserver, Observer

EPOCHS = 3.0  # of a fine-tuning without a number of steps
# Arguments of a Trainer that our loop takes over, and those that do not touch the training.
HONOURED = {
    "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs",
    "weight_decay", "warmup_ratio", "warmup_steps", "max_grad_norm", "seed", "bf16", "label_smoothing_factor",
}  # fmt: skip
HARMLESS = (
    "output_dir", "logging", "log_", "report_to", "run_name", "disable_tqdm", "eval", "per_device_eval", "save", "push",
    "hub", "do_", "use_cpu", "dataloader", "remove_unused", "label_names", "include", "metric_for", "greater_is",
    "resume", "prediction_loss_only", "trackio", "project", "data_seed", "accelerator_config", "parallelism",
)  # fmt: skip


@dataclass
class PrunedModel:
    """The result of pruning a model object.

    Args:
        model: a pruned copy of the model, in eval mode; the given one is as it was.
        ticket: masks, metrics, cost and notes.
        method: name of the method's row.
    """

    model: nn.Module
    ticket: Ticket
    method: str

    @property
    def masks(self) -> Masks:
        """The kept weights by name, True = kept."""
        return self.ticket.masks

    @property
    def metrics(self) -> dict[str, float]:
        """The scores on the evaluation rows."""
        return self.ticket.metrics

    @property
    def cost(self) -> dict[str, dict[str, float]]:
        """Steps, rows, FLOPs and seconds by label."""
        return self.ticket.cost

    def save(self, folder: str | Path) -> Path:
        """Write the model with its masks into a folder, which `export`, `benchmark` and `from_pretrained` read.

        Raises: UserError if the model is not one of transformers.
        """
        if not isinstance(self.model, PreTrainedModel):
            raise UserError(
                f"{type(self.model).__name__} has no save_pretrained; save its state_dict() as you do, its zeros are "
                f"the masks"
            )
        path = Path(folder)
        self.model.save_pretrained(path)
        facts = {"method": self.method, "metrics": self.metrics}
        save_masks(path / "pruning", self.masks, facts)
        write_json(path / "pruning" / "cost.json", self.cost)
        return path


def prune_model(
    method: str | Method = "gradual",
    model: nn.Module | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    *,
    sparsity: float | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    train: TrainingConfig | None = None,
    data_collator: Callable[[list[Any]], Any] | None = None,
    loss: Loss | None = None,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    prunable: Prunable | None = None,
    head: Sequence[str] = (),
    seed: int = 0,
    checkpoints: str | Path | None = None,
    observer: Observer | None = None,
) -> PrunedModel:
    """Prune a model object on datasets in memory, by any method but those that need logits of a teacher (pins).

    Args:
        method: a method's name, or a method with settings of its own.
        model: any module; a model of transformers brings its loss.
        train_dataset: a datasets.Dataset, a torch Dataset, a list; or, with `steps`, any iterable of rows.
        eval_dataset: rows for selection and for the metrics of the result; default: the training rows.
        sparsity: share of the prunable weights to remove; default 0.9.
        steps: T, the steps of one fine-tuning; or `epochs`, default 3.
        train: settings of the training; default: TrainingConfig().
        data_collator: rows -> batch; default: that of transformers.
        loss: (model, batch) -> mean loss; default: the loss that the model returns.
        compute_metrics: EvalPrediction -> scores, the higher the better; the first one is used for selection.
        preprocess_logits_for_metrics: (logits, labels) -> what is kept of the logits, as of the Trainer.
        prunable: (name, parameter) -> whether to prune it; see `sparsesoup.attach`.
        head: names of the task head's parameters.
        seed: seed of all random choices.
        checkpoints: folder from which a killed call resumes.
        observer: receives the progress.
    Raises: UserError if something is missing, or the method does not fit.

    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> rows = [{"x": torch.randn(4), "y": torch.tensor(i % 2)} for i in range(64)]
    >>> found = prune_model(
    ...     "gradual", model, rows, sparsity=0.5, steps=20,
    ...     loss=lambda model, batch: nn.functional.cross_entropy(model(batch["x"]), batch["y"]),
    ... )
    >>> int((found.model[0].weight == 0).sum())
    32
    """
    problem = _make_problem(
        model, train_dataset, eval_dataset, train or TrainingConfig(), (steps, epochs or EPOCHS), data_collator, loss,
        prunable, head=tuple(head), seed=seed, compute_metrics=compute_metrics,
        preprocess_logits=preprocess_logits_for_metrics, observer=observer or NullObserver(),
        journal=Checkpointer(CostTracker(), Path(checkpoints) if checkpoints else None),
    )  # fmt: skip
    return _prune_problem(named_method(method), problem, sparsity)


def _make_problem(
    model: nn.Module | None,
    train_dataset: Any,
    eval_dataset: Any,
    training: TrainingConfig,
    length: tuple[int | None, float],
    collator: Callable[[list[Any]], Any] | None,
    loss: Loss | None,
    prunable: Prunable | None,
    **rest: Any,
) -> ObjectProblem:
    """Return the problem of objects; `length` is T, or None and the epochs of it."""
    if model is None or train_dataset is None:
        raise UserError("give model=... and train_dataset=..., both as objects, or both by name")
    if loss is None and not isinstance(model, PreTrainedModel):
        raise UserError(f"{type(model).__name__} brings no loss; give loss=lambda model, batch: ...")
    rows = _rows_of(train_dataset, collator, length[0], training)
    evaluation = rows if eval_dataset is None else _rows_of(eval_dataset, collator, None, training)
    total = length[0] or max(1, round(length[1] * max(1, len(rows) // training.rows_per_step)))
    objective = _as_objective(loss or _own_loss, rows)
    return ObjectProblem(
        pretrained=model, targets=find_targets(model, prunable), train=rows, validation=evaluation, steps=total,
        training=training, objective=objective, predict=lambda model, batch: objective(model, batch)[None],
        criterion=lambda outputs, batch: outputs.mean(), metric=lambda outputs, labels: {}, meter=rest["journal"].meter,
        **rest,
    )  # fmt: skip


def _prune_problem(method: Method, problem: ObjectProblem, sparsity: float | None) -> PrunedModel:
    if sparsity is None:
        sparsity = 0.0 if TABLE[row_of(method)].dense else 0.9
    if any(phase.own_loss for phase in method.plan(problem.size, sparsity)):
        raise UserError(f"{type(method).__name__} needs logits beside the loss; take platon, or a name for model=...")
    ticket = method.run(problem, sparsity)
    pruned = copy.deepcopy(problem.pretrained).eval()
    pruned.load_state_dict(ticket.weights)
    return PrunedModel(pruned, ticket, row_of(method))


def prune_trainer(method: str | Method, trainer: Trainer, *, sparsity: float | None = None, **more: Any) -> PrunedModel:
    """Prune what a Trainer would train, by any method, in our own loop, which trains as often as the method asks.

    Model, rows, collator, metrics, arguments and an overridden `compute_loss` are the Trainer's. Arguments that our
    loop does not honour are named in one warning before the first step.

    Args:
        method: a method's name, or a method with settings of its own.
        trainer: any transformers.Trainer, before `train()`.
        sparsity: share of the prunable weights to remove.
        more: further arguments of `prune_model`.
    """
    args = trainer.args
    if ignored := _ignored_arguments(args):
        warnings.warn(f"not honoured while pruning: {', '.join(ignored)}", stacklevel=2)
    training = TrainingConfig(
        learning_rate=args.learning_rate, batch_size=args.per_device_train_batch_size, weight_decay=args.weight_decay,
        gradient_accumulation_steps=args.gradient_accumulation_steps, max_grad_norm=args.max_grad_norm or 0.0,
        warmup_ratio=_warmup_ratio(args), precision="bf16" if args.bf16 else "no",
    )  # fmt: skip
    given: dict[str, Any] = {
        "steps": args.max_steps if args.max_steps > 0 else None, "epochs": args.num_train_epochs, "train": training,
        "data_collator": trainer.data_collator, "compute_metrics": trainer.compute_metrics, "seed": args.seed,
        "preprocess_logits_for_metrics": trainer.preprocess_logits_for_metrics,
        "loss": lambda model, batch: trainer.compute_loss(model, dict(batch)),
    }  # fmt: skip
    rows, evaluation = (
        _without_unused_columns(trainer, data) for data in (trainer.train_dataset, trainer.eval_dataset)
    )
    return prune_model(method, trainer.model, rows, evaluation, sparsity=sparsity, **(given | more))


def _without_unused_columns(trainer: Trainer, dataset: Any) -> Any:
    """Return a table without the columns that the model does not take, as the Trainer would pass it on."""
    if not isinstance(dataset, Dataset) or not trainer.args.remove_unused_columns:
        return dataset
    return trainer._remove_unused_columns(dataset, description="pruning")


def _warmup_ratio(args: Any) -> float:
    ratio, steps = float(getattr(args, "warmup_ratio", 0.0) or 0.0), float(getattr(args, "warmup_steps", 0) or 0)
    if 0 < steps < 1:  # transformers 5 takes a share here
        return steps
    return steps / args.max_steps if steps and args.max_steps > 0 else ratio


def _ignored_arguments(args: Any) -> list[str]:
    """Return the arguments that differ from their defaults and that our loop does not honour."""
    plain = type(args)(output_dir=args.output_dir, use_cpu=args.use_cpu, report_to="none")
    names = [name for name in args.__dataclass_fields__ if name not in HONOURED and not name.startswith(HARMLESS)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) != getattr(plain, name)}
    return sorted(f"{name}={getattr(value, 'value', value)}" for name, value in given.items())


def _rows_of(
    dataset: Any, collator: Callable[[list[Any]], Any] | None, steps: int | None, training: TrainingConfig
) -> RowBatches:
    """Return the rows of a dataset object; of an iterable without a length as many as T steps take."""
    if not (isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")):
        if steps is None or not isinstance(dataset, Iterable):
            raise UserError("this dataset has no length; give steps=..., the number of optimizer steps")
        dataset = list(islice(iter(dataset), steps * training.rows_per_step))
    if not len(dataset):
        raise UserError("the dataset has no rows; give at least one")
    collate = collator or (
        default_data_collator if isinstance(dataset[0], Mapping) else torch.utils.data.default_collate
    )
    return RowBatches(dataset, lambda rows: as_mapping(collate(list(rows))))


def _as_objective(loss: Loss, rows: RowBatches) -> Loss:
    """Return the loss of a batch as a mapping; rows that are no mappings come to the user's loss as a tuple."""
    if isinstance(rows.rows[0], Mapping):
        return loss
    return lambda model, batch: loss(model, tuple(batch.values()))


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    loss = model(**batch).loss
    if loss is None:
        raise UserError(
            f"{type(model).__name__} returned no loss for a batch of {', '.join(batch)}; name the answers labels, or "
            f"give loss=lambda model, batch: ..."
        )
    return loss
