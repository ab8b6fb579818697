"""Arguments of a Trainer as settings of our loop, and those that it does not honour."""

from collections.abc import Sized
from typing import Any

from datasets import Dataset
from transformers import Trainer

# Arguments of a Trainer that our loop takes over, and those that do not touch the training.
HONOURED = {
    "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs",
    "weight_decay", "warmup_ratio", "warmup_steps", "max_grad_norm", "seed", "bf16", "label_smoothing_factor", "fp16",
    "tf32", "gradient_checkpointing", "torch_compile", "full_determinism",
}  # fmt: skip
HARMLESS = (
    "output_dir", "logging", "log_", "report_to", "run_name", "disable_tqdm", "eval", "per_device_eval", "save", "push",
    "hub", "do_", "use_cpu", "dataloader", "remove_unused", "label_names", "include", "metric_for", "greater_is",
    "resume", "prediction_loss_only", "trackio", "project", "data_seed", "accelerator_config", "parallelism",
)  # fmt: skip


def without_unused_columns(trainer: Trainer, dataset: Any) -> Any:
    """Return a table without the columns that the model does not take, as the Trainer would pass it on."""
    own = type(trainer).get_train_dataloader is not Trainer.get_train_dataloader  # takes columns as it likes
    if own or not isinstance(dataset, Dataset) or not trainer.args.remove_unused_columns:
        return dataset
    return trainer._remove_unused_columns(dataset, description="pruning")


def warmup_ratio_of(args: Any) -> float:
    """Return the share of the steps that a Trainer warms up for."""
    ratio, steps = float(getattr(args, "warmup_ratio", 0.0) or 0.0), float(getattr(args, "warmup_steps", 0) or 0)
    if 0 < steps < 1:  # transformers 5 takes a share here
        return steps
    return steps / args.max_steps if steps and args.max_steps > 0 else ratio


def eval_steps_of(trainer: Trainer) -> int | None:
    """Return the steps between validations that a Trainer asks for, by steps, by a share of them, or by epochs."""
    args, rows = trainer.args, trainer.train_dataset
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    epoch = max(1, len(rows) // size) if isinstance(rows, Sized) else None
    total = args.max_steps if args.max_steps > 0 else epoch and args.num_train_epochs * epoch
    strategy, every = getattr(args.eval_strategy, "value", args.eval_strategy), args.eval_steps
    if strategy == "steps" and every:
        return round(every) if every >= 1 else total and max(1, round(every * total))
    return epoch if strategy == "epoch" else None


def ignored_callbacks(trainer: Trainer) -> list[str]:
    """Return the callbacks of the user, which our loop does not call; progress and trackers of a library are none."""
    names = [
        (type(each).__module__.partition(".")[0], type(each).__name__) for each in trainer.callback_handler.callbacks
    ]
    own = ("transformers", "trl", "sentence_transformers")
    return [name for package, name in names if package not in own or name == "EarlyStoppingCallback"]


def ignored_arguments(args: Any) -> list[str]:
    """Return the arguments that differ from their defaults and that our loop does not honour."""
    plain = type(args)(output_dir=args.output_dir, use_cpu=args.use_cpu, report_to="none")
    names = [name for name in args.__dataclass_fields__ if name not in HONOURED and not name.startswith(HARMLESS)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) != getattr(plain, name)}
    return sorted(f"{name}={getattr(value, 'value', value)}" for name, value in given.items())
