"""Fine-tune a pruned model with the Trainer of transformers: its zeros stay."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsesoup.core.masks import Masks
from sparsesoup.core.ticket import load_masks, match_parameter_names, save_masks
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.training.zero_hooks import hold_zeros, zeros_of


class SparsityCallback(TrainerCallback):
    """Keeps the zeros of a pruned model while the Trainer fine-tunes it, through clipping, decay and resumption.

    The masks are also written beside each checkpoint, in its `pruning` folder.

    Args:
        ticket: run directory, model folder or pruning folder that holds the masks; or the masks themselves; None takes
            the zeros that the model's prunable weights have when training begins.

    >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[SparsityCallback("run")])  # doctest: +SKIP
    """

    def __init__(self, ticket: str | Path | Masks | None = None) -> None:
        self.facts: dict[str, Any] = {}
        self.masks: Masks = {}
        self.found = ticket is None
        if isinstance(ticket, dict):
            self.masks = ticket
        elif ticket is None:
            pass
        else:
            self.masks, self.facts = load_masks(Path(ticket))
        self._stop: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take hold of model and optimizer, which the Trainer has made by now."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if self.found:
            self.masks = zeros_of(model, find_prunable(model))
        shapes = {name: p.shape for name, p in model.named_parameters()}
        self.masks = match_parameter_names(self.masks, shapes, getattr(model, "base_model_prefix", ""))
        self._stop = hold_zeros(model, getattr(optimizer, "optimizer", optimizer), self.masks)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go: the model can be saved, copied and pickled like any other."""
        if self._stop is not None:
            self._stop()
            self._stop = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the masks beside the checkpoint."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / "pruning"
        facts = {k: v for k, v in self.facts.items() if k not in ("kept", "total", "format")}
        save_masks(folder, self.masks, facts)
