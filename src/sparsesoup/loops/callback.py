"""PruningCallback: prune a model while the Trainer of transformers, or one of its subclasses, trains it."""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import atomic_write, load_table, write_table
from sparsesoup.core.masking import check_sparsity
from sparsesoup.core.masks import Masks
from sparsesoup.loops.attach import Prunable, attach, named_method
from sparsesoup.loops.problem import Loss
from sparsesoup.loops.pruner import Pruner
from sparsesoup.methods import Method

TENSORS, TABLE = "pruner.safetensors", "pruner.json"


class PruningCallback(TrainerCallback):
    """Prune while a Trainer trains, with its loss, its rows, its optimizer and its schedule.

    Every checkpoint holds the state of the pruning, so that `resume_from_checkpoint` ends at the same masks.

    Args:
        method: a method's name, or a method object with settings.
        sparsity: share of the prunable weights to remove.
        loss: (model, batch) -> mean loss, for methods that need batches of their own; default: the loss that the model
            returns. Give it if your Trainer has a `compute_loss` of its own, which a callback cannot see.
        batches: batches for those methods; default: rows of the Trainer's training set, sampled separately.
        prunable, snapshots: see `sparsesoup.attach`.
    Raises: UserError if the method or the sparsity is invalid.

    >>> pruning = PruningCallback("gradual", sparsity=0.8)
    >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[pruning])  # doctest: +SKIP
    """

    def __init__(
        self,
        method: str | Method = "gradual",
        sparsity: float = 0.9,
        *,
        loss: Loss | None = None,
        batches: Iterable[Any] | None = None,
        prunable: Prunable | None = None,
        snapshots: str = "device",
    ) -> None:
        check_sparsity(sparsity)
        self.method, self.sparsity = named_method(method), sparsity
        self.loss, self.batches, self.prunable, self.snapshots = loss, batches, prunable, snapshots
        self.pruner: Pruner | None = None
        self.masks: Masks = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to model and optimizer, which the Trainer has created, and loaded, by now."""
        _check_arguments(args)
        if self.pruner is not None:  # of a training that was broken off
            self.pruner.remove_hooks()
        self.pruner = attach(
            kwargs["model"], kwargs["optimizer"], self.method, self.sparsity, steps=state.max_steps,
            loss=self.loss or _own_loss, batches=kwargs["train_dataloader"] if self.batches is None else self.batches,
            prunable=self.prunable, seed=args.seed, max_grad_norm=args.max_grad_norm,
            snapshots=self.snapshots,
        )  # fmt: skip
        if state.global_step:
            folder = _checkpoint(args, state)
            try:
                saved = load_table(folder / TABLE)
                saved["tensors"] = load_file(folder / TENSORS)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{folder} is no checkpoint of a training with this callback ({error}); begin without it"
                ) from error
            self.pruner.load_state_dict(saved)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the state of the pruning with the checkpoint."""
        if self.pruner is None:
            return
        saved, folder = self.pruner.state_dict(), _checkpoint(args, state)
        with atomic_write(folder / TENSORS) as temporary:
            save_file({name: t.detach().cpu().contiguous() for name, t in saved.pop("tensors").items()}, temporary)
        write_table(folder / TABLE, json.loads(json.dumps(saved)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the pruning; a training that was stopped early keeps the masks that it has, with a warning."""
        if self.pruner is None:
            return
        if self.pruner.step < state.max_steps:
            warnings.warn(
                f"the training ended at step {self.pruner.step} of {state.max_steps}, at sparsity "
                f"{self.pruner.sparsity:.3f} of {self.sparsity:g}",
                stacklevel=2,
            )
        self.masks = self.pruner.finish(early=True)


def _check_arguments(args: TrainingArguments) -> None:
    """Raise a UserError if an argument of the Trainer cannot be honoured."""
    wrong = {
        "load_best_model_at_end": "the best checkpoint may be one from before the final sparsity",
        "deepspeed": "weights are sharded",
        "torch_compile": "the compiled model does not see masks that come later",
    }
    for name, why in wrong.items():
        if getattr(args, name, None):
            raise UserError(f"{name} and pruning do not go together: {why}; leave {name} out")


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _own_loss(model: Any, batch: Any) -> Any:
    """Return the loss that a model of transformers returns."""
    loss = getattr(model(**batch), "loss", None) if isinstance(model, PreTrainedModel) else None
    if loss is None:
        raise UserError(
            f"{type(model).__name__} returns no loss, and the method needs that of batches of its own; give the "
            f"Trainer's, as PruningCallback(..., loss=lambda model, batch: ...)"
        )
    return loss
