"""Fine-tune a pruned model with the Trainer of transformers while its zeros stay."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsesoup.core.masks import Masks
from sparsesoup.core.ticket import load_masks, match_parameter_names, save_masks
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.training.zero_hooks import hold_zeros, zeros_of


class SparsityCallback(TrainerCallback):
    """Keep the zeros of a pruned model while the Trainer fine-tunes it, through clipping, weight decay and resumption.

    The masks are also saved with each checkpoint, in its `pruning` folder.

    Args:
        ticket: run directory, model folder or pruning folder with the masks; or the masks themselves; None uses the
            zeros of the model's prunable weights at the start of training.

    >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[SparsityCallback("run")])  # doctest: +SKIP
    """

    def __init__(self, ticket: str | Path | Masks | None = None) -> None:
        self.facts: dict[str, Any] = {}
        self._given: Masks | None = ticket if isinstance(ticket, dict) else None
        if isinstance(ticket, str | Path):
            self._given, self.facts = load_masks(Path(ticket))
        self._stop: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to model and optimizer, which the Trainer has created by now."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        masks = zeros_of(model, find_prunable(model)) if self._given is None else self._given
        shapes = {name: p.shape for name, p in model.named_parameters()}
        self.masks = match_parameter_names(masks, shapes, getattr(model, "base_model_prefix", ""))
        self._stop = hold_zeros(model, getattr(optimizer, "optimizer", optimizer), self.masks)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach: the model can then be saved, copied and pickled as usual."""
        if self._stop is not None:
            self._stop()
            self._stop = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the masks with the checkpoint."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / "pruning"
        facts = {k: v for k, v in self.facts.items() if k not in ("kept", "total", "format")}
        save_masks(folder, self.masks, facts)
