"""Prune model objects on dataset objects, or whatever a Trainer holds, with our own loop: every method runs."""

import inspect
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.files import atomic_write
from sparsesoup.core.masks import Masks, count_kept, count_total
from sparsesoup.core.single_process import require_single_process
from sparsesoup.core.ticket import Ticket
from sparsesoup.loops.attach import Prunable
from sparsesoup.loops.losses import TrainerLoss, borrowed_loss
from sparsesoup.loops.object_problem import Metrics
from sparsesoup.loops.object_settings import object_source
from sparsesoup.loops.object_source import load_object, read_ticket
from sparsesoup.loops.object_teacher import Teacher
from sparsesoup.loops.problem import Loss
from sparsesoup.loops.trainer_arguments import (
    check_metrics,
    collator_of,
    eval_steps_of,
    ignored_parts,
    trackers_of,
    warmup_ratio_of,
    without_unused_columns,
)
from sparsesoup.methods import Method
from sparsesoup.runs.run_folder import FinishedRun, write_run
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.model_copy import copy_model
from sparsesoup.training.observer import Observer


@dataclass(repr=False)
class PrunedModel:
    """The result of pruning a model object.

    Args:
        model: a pruned copy of the model, in eval mode; the given one is unchanged.
        ticket: masks, metrics, cost and notes.
        method: name of the method's row.
        path: directory of the run; None if it is in memory.
        report: content of report.json.
    """

    model: nn.Module
    ticket: Ticket
    method: str
    path: Path | None = None
    report: dict[str, Any] = field(default_factory=dict)
    _done: FinishedRun | None = None

    def __repr__(self) -> str:
        kept, total = count_kept(self.masks), count_total(self.masks)
        scores = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        where = f", in {self.path}" if self.path is not None else ""
        kind = type(self.model).__name__
        return f"<{kind} pruned by {self.method}: {kept:,} of {total:,} weights kept; {scores}{where}>"

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

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The validations during training, with `eval_steps`: step, sparsity, scores."""
        return list(self.report.get("evaluations", ()))

    def save(self, folder: str | Path) -> Path:
        """Write an ordinary run directory, which show, export, benchmark, push and tables of studies read.

        Its `model` folder is what save_pretrained writes, with the masks in `pruning`; of a module that is none of
        transformers' it has the state_dict as model.safetensors.

        Returns: the folder, which `path` is from then on if the run was in memory.
        Raises: UserError if there is something else.
        """
        path = Path(folder)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} is there already; give a folder that does not exist")
        with atomic_write(path) as temporary:
            if self._done is not None:
                write_run(temporary, self._done)
            else:
                assert self.path is not None
                shutil.copytree(self.path, temporary, ignore=shutil.ignore_patterns("stages", ".lock"))
        self.path = self.path or path
        return path


def prune_model(
    method: str | Method = "gradual", model: nn.Module | str | Path | None = None, train_dataset: Any = None,
    eval_dataset: Any = None, *, sparsity: float | None = None, steps: int | None = None, epochs: float | None = None,
    train: TrainingConfig | None = None, data_collator: Callable[[list[Any]], Any] | None = None,
    loss: Loss | None = None, compute_metrics: Metrics | None = None,
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None, batch_eval_metrics: bool = False,
    teacher: Teacher = None, processing_class: Any = None, prunable: Prunable | None = None, head: Sequence[str] = (),
    columns: Mapping[str, Any] | None = None, seed: int = 0, dataset: str = "objects", out: str | Path | None = None,
    progress: bool = True, observer: Observer | None = None, report_to: str | Sequence[str] = (),
    snapshots: str = "device", save_every: float = 30.0, label_names: Sequence[str] = (), row: str | None = None,
) -> PrunedModel:  # fmt: skip
    """Prune a model object on datasets in memory, by any method.

    Args:
        method: a method's name, or a method object with settings.
        model: any module; or a Hub id, folder or run directory. It is loaded with its saved head; for a table of
            raw texts or images, with the head and metrics of their task.
        train_dataset: a datasets.Dataset, a torch Dataset, a list; or, with `steps`, any iterable of rows.
        eval_dataset: rows for selection and metrics; default: the training rows; of raw texts a held-out tenth.
        sparsity: share of the prunable weights to remove; default 0.9.
        steps: T, the steps of one fine-tuning; or `epochs`, default 3.
        train: settings of the training; default: TrainingConfig().
        data_collator: rows -> batch; default: that of transformers, which pads if there is a tokenizer.
        loss: (model, batch) -> mean loss, or (mean loss, outputs); default: the loss that the model returns.
        compute_metrics: EvalPrediction -> scores, the higher the better; the first one is used for selection. Of rows
            that are tuples the last part is the labels.
        preprocess_logits_for_metrics: (logits, labels) -> what is kept of the logits, as in the Trainer.
        batch_eval_metrics: call `compute_metrics` with each batch, as the Trainer does; no outputs are kept.
        teacher: for distillation (`train.distill`): a module, run directory, folder, Hub id; or dense, trained first.
        processing_class: tokenizer or processor, saved with the model.
        prunable: (name, parameter) -> whether to prune it; see `sparsesoup.attach`.
        head: names of the task head's parameters.
        columns: settings for a table of texts or images, such as text_columns, label_column and max_length.
        seed: seed of all random choices.
        dataset: name of the rows in reports and folders.
        out: folder of runs, where the same call resumes a killed run or reads a finished one; default: in memory.
        progress: show progress on stderr.
        observer: receives the progress as well.
        report_to: trackers, as `--report-to` of the command line; tensorboard needs `out`.
        snapshots: keep forks and rewinding points on the device, in host memory (host) or on disk (disk).
        save_every: minimum seconds between saves of the state, from which a killed run resumes; it needs `out`.
        label_names: names of the labels in a batch; default: those that the model's forward takes, else labels.
        row: name of the method in report and folder; default: `method` if that is a name, else the row it fits best.
    Raises: UserError if something is missing, or the method does not fit.

    >>> import torch
    >>> network, rows = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), [*torch.randn(64, 4)]
    >>> found = prune_model("gradual", network, rows, sparsity=0.5, steps=20, progress=False,
    ...                     loss=lambda model, batch: model(batch[0]).square().mean())
    >>> int((found.model[0].weight == 0).sum())
    32
    """
    return _prune_given(dict(locals()))


def _prune_given(given: Mapping[str, Any]) -> PrunedModel:
    """Prune by the arguments of `prune_model`; with `trainer` among them most come from that."""
    require_single_process()
    source = object_source(given)
    done = source.run_method()
    if isinstance(done, FinishedRun):
        pruned = copy_model(source.problem.pretrained).eval()
        pruned.load_state_dict(done.ticket.weights)
        return PrunedModel(pruned, done.ticket, done.settings.name, None, done.report, done)
    pruned = load_object(source.problem.pretrained, done.path)
    return PrunedModel(pruned, read_ticket(done, pruned), source.settings.name, done.path, done.report)


def prune_trainer(method: str | Method, trainer: Trainer, *, sparsity: float | None = None, **more: Any) -> PrunedModel:
    """Prune the model of a Trainer by any method, in our own loop, which trains as often as the method needs.

    Model, rows, collator, metrics, arguments and an overridden `compute_loss` are the Trainer's. Arguments that our
    loop does not honour are named in one warning before the first step.

    Args:
        method: a method's name, or a method object with settings.
        trainer: any transformers.Trainer, before `train()`.
        sparsity: share of the prunable weights to remove.
        more: further arguments of `prune_model`.
    """
    require_single_process()
    require(isinstance(trainer, Trainer), "trainer", "a Trainer of transformers", type(trainer).__name__)
    if trainer.train_dataset is None:
        raise UserError("it has no train_dataset; make the Trainer with one", "trainer")
    args = trainer.args
    check_metrics(trainer, more.get("compute_metrics"))
    trackers = trackers_of(args, folder=more.get("out") is not None)
    if ignored := ignored_parts(trainer, more.get("report_to", trackers)):
        warnings.warn(f"not honoured while pruning: {', '.join(ignored)}", stacklevel=2)
    training = TrainingConfig(
        learning_rate=args.learning_rate, batch_size=args.per_device_train_batch_size, weight_decay=args.weight_decay,
        gradient_accumulation_steps=args.gradient_accumulation_steps, max_grad_norm=args.max_grad_norm or 0.0,
        warmup_ratio=warmup_ratio_of(args), precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        tf32=bool(args.tf32), gradient_checkpointing=args.gradient_checkpointing, torch_compile=args.torch_compile,
        full_determinism=args.full_determinism,
        eval_steps=eval_steps_of(trainer),
    )  # fmt: skip
    length = {"steps": args.max_steps} if args.max_steps > 0 else {"epochs": float(args.num_train_epochs)}
    given: dict[str, Any] = {
        **({} if more.keys() & {"steps", "epochs"} else length), "train": training,
        "compute_metrics": trainer.compute_metrics, "seed": args.seed,
        "preprocess_logits_for_metrics": trainer.preprocess_logits_for_metrics,
        "batch_eval_metrics": args.batch_eval_metrics,
        "processing_class": trainer.processing_class, "label_names": trainer.label_names,
        "report_to": trackers, "progress": not args.disable_tqdm,
    }  # fmt: skip
    given["data_collator"] = collator_of(trainer)
    rows, evaluation = (without_unused_columns(trainer, data) for data in (trainer.train_dataset, trainer.eval_dataset))
    with borrowed_loss(trainer) as compute_loss:
        given = {"loss": TrainerLoss(trainer, compute_loss), "eval_dataset": evaluation} | given | more
        given = {"train_dataset": rows} | given
        whole = inspect.signature(prune_model).bind(method, trainer.model, sparsity=sparsity, **given)
        whole.apply_defaults()
        extra = {"trainer": trainer, "brought": given.keys() - more.keys()}
        return _prune_given({**whole.arguments, **extra})
