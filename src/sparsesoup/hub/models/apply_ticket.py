"""Apply a ticket's masks to another copy of its base model."""

import inspect
from pathlib import Path

from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.files import atomic_write
from sparsesoup.core.targets import weights_fingerprint
from sparsesoup.core.ticket import find_mask_folder, load_masks, match_parameter_names, save_masks
from sparsesoup.hub.models.checkpoint import load_processor, load_reader
from sparsesoup.hub.models.loading import load_as_saved, save_model
from sparsesoup.hub.models.weights import LoadingNotes


def apply_ticket(
    ticket: Path, model: str, out: Path, other_weights: bool = False, account: LoadingNotes | None = None
) -> tuple[int, int]:
    """Write a copy of a model pruned by a ticket's masks; return (weights kept, weights in the masks).

    Args:
        ticket: run directory, model folder or pruning folder.
        model: the ticket's base model: Hub id, folder, or minilm.
        out: output folder, which must not exist.
        other_weights: allow a model with other weights than the ticket's base (a fine-tuned one).
    Raises: UserError if the ticket is damaged, does not fit, or the weights differ.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there already; give a folder that does not exist")
    masks, facts = load_masks(ticket)
    copy = load_as_saved(model, account=account or LoadingNotes())
    params = dict(copy.named_parameters())
    prefix = str(facts.get("base_model_prefix", ""))
    fitted = match_parameter_names(masks, {name: p.shape for name, p in params.items()}, prefix)
    # The fingerprint depends on the ticket's parameter names.
    own = dict(zip(masks, fitted, strict=True))
    if not other_weights and facts.get("origin") != weights_fingerprint({n: params[own[n]] for n in masks}):
        raise UserError(
            f"foreign ticket: {find_mask_folder(ticket)} was drawn from {facts.get('model')}, whose weights differ "
            f"from those of {model}; take its base model, or say --other-weights to prune these all the same"
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
