"""Fine-tune a pruned model with its zeros, and apply a ticket's masks to another copy of its base model."""

import inspect
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.files import atomic_write
from sparsesoup.core.low_rank import refuse_low_rank
from sparsesoup.core.masks import Masks
from sparsesoup.core.targets import weights_fingerprint
from sparsesoup.core.ticket import find_mask_folder, load_masks, match_parameter_names, save_masks
from sparsesoup.hub.models.checkpoint import load_processor, load_reader
from sparsesoup.hub.models.loading import load_as_saved, save_model
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.hub.models.weights import LoadingNotes
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
            refuse_low_rank(self.facts, Path(ticket), "hold")
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


def apply_ticket(
    ticket: Path, model: str, out: Path, other_weights: bool = False, account: LoadingNotes | None = None
) -> tuple[int, int]:
    """Write a copy of a model pruned by a ticket's masks; return (weights kept, weights in the masks).

    `other_weights` allows a model with other weights than the ticket's base, such as a fine-tuned one.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there already; give a folder that does not exist")
    masks, facts = load_masks(ticket)
    refuse_low_rank(facts, find_mask_folder(ticket), "apply")
    copy = load_as_saved(model, account=account or LoadingNotes())
    params = dict(copy.named_parameters())
    prefix = str(facts.get("base_model_prefix", ""))
    fitted = match_parameter_names(masks, {name: p.shape for name, p in params.items()}, prefix)
    # The fingerprint depends on the ticket's parameter names.
    own = dict(zip(masks, fitted, strict=True))
    if not other_weights and facts.get("origin") != weights_fingerprint({n: params[own[n]] for n in masks}):
        raise UserError(
            f"foreign ticket: {find_mask_folder(ticket)} was made from {facts.get('model')}, whose weights differ "
            f"from those of {model}; use its base model, or set --other-weights to prune this one anyway"
        )
    origin = weights_fingerprint({name: params[name] for name in fitted})  # under the names in the copy's ticket
    algebra.apply_masks_({name: params[name] for name in fitted}, fitted)
    kept, total = algebra.count_kept(fitted), algebra.count_total(fitted)
    brief = {"method": facts.get("method"), "base_model": model, "masks": "pruning/masks.safetensors"}
    with atomic_write(out) as temporary:
        numbers = {"sparsity": algebra.sparsity(fitted), "kept": kept, "total": total}
        reader = load_reader(model, copy.main_input_name == "pixel_values")
        save_model(copy, copy.state_dict(), temporary, reader, brief | numbers)
        if "pixel_values" in inspect.signature(copy.forward).parameters and copy.main_input_name != "pixel_values":
            load_processor(model).save_pretrained(temporary)  # for a model of texts and images
        save_masks(temporary / "pruning", fitted, {**facts, "model": model, "origin": origin})
    return kept, total
