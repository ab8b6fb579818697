"""Arguments of a Trainer as settings of our loop, and those that it does not honour."""

from collections.abc import Sequence, Sized
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from sparsesoup.core.errors import UserError
from sparsesoup.runs.trackers import TRACKERS

# Arguments of a Trainer that our loop takes over.
HONOURED = {
    "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs",
    "weight_decay", "warmup_ratio", "warmup_steps", "max_grad_norm", "seed", "bf16", "label_smoothing_factor", "fp16",
    "tf32", "gradient_checkpointing", "activation_checkpointing", "torch_compile", "full_determinism", "eval_strategy",
    "eval_steps", "batch_eval_metrics", "label_names", "remove_unused_columns", "disable_tqdm",
}  # fmt: skip
# Those that change neither the training nor its scores, nor ask for something that our loop leaves out.
HARMLESS = {
    "output_dir", "overwrite_output_dir", "per_device_eval_batch_size", "eval_accumulation_steps",
    "eval_use_gather_object", "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "skip_memory_metrics",
    "include_num_input_tokens_seen", "average_tokens_across_devices", "local_rank", "ddp_timeout", "project",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "prediction_loss_only",  # scores are computed if there is a compute_metrics
    "dataloader_multiprocessing_context", "dataloader_in_order", "dataloader_drop_last",
}  # fmt: skip
HARMLESS_GROUPS = ("logging_", "log_", "hub_", "trackio_", "ddp_")  # hub_: push_to_hub is named; ddp_: one process
OWN_LOOP = (  # methods of a Trainer that our loop does not call
    "training_step", "create_optimizer", "create_scheduler", "get_train_dataloader", "get_eval_dataloader",
    "prediction_step", "evaluation_loop", "evaluate",
)  # fmt: skip
PARTS = ("optimizer", "lr_scheduler", "optimizer_cls_and_kwargs", "evaluator")  # evaluator: of sentence-transformers
LIBRARIES = ("transformers", "trl", "sentence_transformers")


def without_unused_columns(trainer: Trainer, dataset: Any) -> Any:
    """Return a table without the columns that the model does not take, as the Trainer would pass it on."""
    own = type(trainer).get_train_dataloader is not Trainer.get_train_dataloader  # takes columns as it likes
    if own or not isinstance(dataset, Dataset) or not trainer.args.remove_unused_columns:
        return dataset
    return trainer._remove_unused_columns(dataset, description="pruning")


def collator_of(trainer: Trainer) -> Any:
    """Return the collator of a Trainer; it leaves out the unused columns of rows that are no table."""
    own = type(trainer).get_train_dataloader is not Trainer.get_train_dataloader
    data = (trainer.train_dataset, trainer.eval_dataset)
    if own or all(rows is None or isinstance(rows, Dataset) for rows in data):
        return trainer.data_collator
    return trainer._get_collator_with_removed_columns(trainer.data_collator, "pruning")


def check_metrics(trainer: Trainer, other: Any) -> None:
    """Raise a UserError if a Trainer's metrics are of generated tokens, which our loop does not make.

    Args:
        other: `compute_metrics` that take their place, or None.
    """
    metrics = trainer.compute_metrics if other is None else None
    if metrics is not None and getattr(trainer.args, "predict_with_generate", False):
        raise UserError(
            "this one is for generated tokens (predict_with_generate=True), and while pruning it would get logits; "
            "give compute_metrics=... for logits, or set the Trainer's to None and generate afterwards",
            "compute_metrics",
        )


def warmup_ratio_of(args: Any) -> float:
    """Return the share of the steps that a Trainer warms up for."""
    ratio, steps = float(getattr(args, "warmup_ratio", 0.0) or 0.0), float(getattr(args, "warmup_steps", 0) or 0)
    if 0 < steps < 1:  # transformers 5 takes a share here
        return steps
    return steps / args.max_steps if steps and args.max_steps > 0 else ratio


def eval_steps_of(trainer: Trainer) -> int | None:
    """Return the steps between validations that a Trainer makes, by steps, by a share of them, or by epochs."""
    args, rows = trainer.args, trainer.train_dataset
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    epoch = max(1, len(rows) // size) if isinstance(rows, Sized) else None
    total = args.max_steps if args.max_steps > 0 else epoch and args.num_train_epochs * epoch
    strategy, every = getattr(args.eval_strategy, "value", args.eval_strategy), args.eval_steps
    if strategy == "steps" and every:
        return round(every) if every >= 1 else total and max(1, round(every * total))
    return epoch if strategy == "epoch" else None


def trackers_of(args: Any, folder: bool) -> list[str]:
    """Return the trackers of a Trainer that our loop reports to; tensorboard needs the folder of a run."""
    named = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    return [name for name in named if name in TRACKERS and (folder or name != "tensorboard")]


def ignored_parts(trainer: Trainer, trackers: Sequence[str]) -> list[str]:
    """Return all that a Trainer was given and that our loop does not honour, in the words of who gave it.

    Args:
        trackers: those that are reported to.
    """
    own = [name for name in OWN_LOOP if _library(getattr(type(trainer), name, None)) not in LIBRARIES]
    given = [name for name in PARTS if getattr(trainer, name, None)]
    methods = [f"{type(trainer).__name__}.{name}" for name in own]
    return [*_ignored_arguments(trainer.args, trackers), *given, *methods, *_ignored_callbacks(trainer)]


def _library(part: Any) -> str:
    return str(getattr(part, "__module__", None) or "transformers").partition(".")[0]


def _ignored_callbacks(trainer: Trainer) -> list[str]:
    """Return the callbacks of the user, which our loop does not call; progress and trackers of a library are none."""
    names = [(_library(type(each)), type(each).__name__) for each in trainer.callback_handler.callbacks]
    return [name for library, name in names if library not in LIBRARIES or name == "EarlyStoppingCallback"]


def _ignored_arguments(args: Any, trackers: Sequence[str]) -> list[str]:
    """Return the arguments that differ from their defaults and that our loop does not honour."""
    where = {"output_dir": args.output_dir, "use_cpu": args.use_cpu, "report_to": "none"}
    plain, own = TrainingArguments(**where), type(args)(**where)
    # What TRL adds to the arguments is for its preparation of rows, its collators and its losses, which are used.
    fields = TrainingArguments if _library(type(args)) == "trl" else type(args)
    found = {}
    for name in fields.__dataclass_fields__:
        if name in HONOURED | HARMLESS or name.startswith(HARMLESS_GROUPS):
            continue
        value = getattr(args, name, None)
        if value != getattr(plain if hasattr(plain, name) else own, name):
            found[name] = value
    found.pop("report_to", None)
    if untold := [name for name in args.report_to or [] if name not in trackers]:
        found["report_to"] = ",".join(untold)
    if args.use_cpu and torch.accelerator.is_available():
        found["use_cpu"] = True
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "no":
        found = {name: value for name, value in found.items() if not name.startswith("save_")}
    return sorted(f"{name}={getattr(value, 'value', value)}" for name, value in found.items())
