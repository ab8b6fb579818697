"""Load the weights of a checkpoint: only permitted ones are randomly initialised, none may be NaN or infinite."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from sparsesoup.core.errors import UserError, list_names, one_line
from sparsesoup.core.rng import fork_rng_of
from sparsesoup.core.targets import block_of

REMEDY = "take config.json and weights as they were written"


@dataclass
class LoadingNotes:
    """Notes on a loaded model: its randomly initialised weights, and one sentence each for the user."""

    new: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def note_weights(self, model: str, seed: int, new: Collection[str], left: Collection[str]) -> None:
        """Note the randomly initialised weights, and those of the checkpoint that were left out."""
        self.new = (*self.new, *sorted(new))
        if new:
            self.notes.append(
                f"not in the checkpoint of {model}, so initialised with seed {seed}: {list_names(sorted(new))}"
            )
        if left:
            why = "and left out, since its config.json does not use them"
            self.notes.append(f"in the checkpoint of {model} {why}: {list_names(sorted(left))}")


def load_weights(
    kind: Any, name: str, options: Mapping[str, Any], **more: Any
) -> tuple[Any, dict[str, str], list[str]]:
    """Load a model of a class with the weights of a checkpoint, all finite; missing ones are randomly initialised.

    Returns: the model; name -> what is wrong with it in the checkpoint, for randomly initialised weights; names of
        weights unknown to the model.
    """
    given = {**options, **more, "use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, found = kind.from_pretrained(**given)
    check_finite(name, model)
    lacking = dict.fromkeys(found["missing_keys"], "is missing")
    for key, there, wanted in found["mismatched_keys"]:
        lacking[key] = f"has shape {tuple(there)}, expected {tuple(wanted)}"
    state = model.state_dict()
    # Integers are not weights: position tables, counters, which the class computes.
    drawn = {key: why for key, why in lacking.items() if key not in state or state[key].is_floating_point()}
    return model, drawn, sorted(found["unexpected_keys"])


def check_finite(name: str, model: nn.Module) -> None:
    """Raise a UserError that names the first weight of a model that is NaN, infinite, or not floating-point."""
    weights = dict(model.named_parameters())
    for key, t in model.state_dict().items():
        if not t.is_floating_point():
            if key in weights:
                raise UserError(f"the weights of model {name!r} have {key} as {t.dtype}, where floats are; {REMEDY}")
        elif wrong := t.numel() - int(torch.isfinite(t).sum()):
            raise UserError(
                f"the weights of model {name!r} have {wrong} of {t.numel()} numbers NaN or infinite in {key}; use "
                f"another copy of it, or an earlier one of its training"
            )


def check_vocabulary(name: str, model: Any, tokenizer: Any) -> None:
    """Raise a UserError if a tokenizer makes ids for which a model has no embedding."""
    try:
        rows = len(model.get_input_embeddings().weight)
    except (NotImplementedError, AttributeError):  # a model of bytes or characters has no such table
        return
    used = {getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "unk", "sep", "pad", "cls")}
    idle = {*tokenizer.all_special_ids} - used  # never made from text; BART's mask id lies one beyond its embeddings
    highest = max(number for number in tokenizer.get_vocab().values() if number not in idle)
    if highest >= rows:
        raise UserError(
            f"the tokenizer of model {name!r} has ids up to {highest}, the model {rows} embeddings, for ids up to "
            f"{rows - 1}; call model.resize_token_embeddings(len(tokenizer)) and save both again, or use the tokenizer "
            f"that belongs to the model"
        )


def check_weights(
    name: str, model: Any, lacking: Mapping[str, str], left: Collection[str], allowed: Collection[str] = ()
) -> list[str]:
    """Return the weights of whole blocks of a checkpoint that a model has not; those of other heads are not listed.

    `lacking` and `left` are as `load_weights` returns them; those of `lacking` that are not `allowed` are refused.
    """
    misfit = f"the weights of model {name!r} do not fit its config.json"
    if wrong := sorted({*lacking} - {*allowed}):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        others = f", and they have {min(left)}, which it does not know" if left else ""
        raise UserError(f"{misfit}: {wrong[0]} {lacking[wrong[0]]}{more}{others}; {REMEDY}")
    prefix = f"{model.base_model_prefix}."
    blocks = {block_of(key.removeprefix(prefix)) for key in model.state_dict()} - {""}
    block_names = {key: block_of(key.removeprefix(prefix)) for key in left}
    if foreign := [key for key in left if key.endswith(".weight") and block_names[key] in blocks]:
        raise UserError(f"{misfit}: they have {foreign[0]}, which it does not know; {REMEDY}")
    lists = {block.rpartition(".")[0] for block in blocks}
    return [key for key in left if block_names[key] and block_names[key].rpartition(".")[0] in lists]


def may_be_new(model: Any) -> set[str]:
    """Return the weights that a checkpoint may lack: those of a head or a pooler, and computed tables."""
    poolers = {key for key in model.state_dict() if "pooler" in key.split(".")}
    computed = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    return {*randomly_drawn_head(model)} | poolers | computed


def randomly_drawn_head(model: Any) -> list[str]:
    """Return the names of the head's weights: those besides the base model; empty for a base model.

    In some classes (CLIP's, T5's for questions) the parts of the base model are direct members, and the head follows
    the last one with blocks.
    """
    names, prefix = [*model.state_dict()], model.base_model_prefix
    if isinstance(getattr(model, prefix, None), nn.Module):
        outside = [key for key in names if not key.startswith(f"{prefix}.")]
        return outside or [key for key, _ in _output_layer(model, names)]
    own = AutoModel._model_mapping.get(type(model.config), ())
    if type(model) in (own if isinstance(own, tuple | list) else (own,)):
        return []
    parts = [key.partition(".")[0] for key in names]
    last = max((i for i, key in enumerate(names) if block_of(key)), default=-1)
    return [key for key, part in zip(names, parts, strict=True) if part not in parts[: last + 1]]


def _output_layer(model: Any, names: Collection[str]) -> list[tuple[str, Tensor]]:
    """Return those of the named weights in the layer with one output per label: the last with that many rows."""
    labels, held = model.config.num_labels, model.state_dict()
    rows = [key for key in names if key.endswith("weight") and held[key].dim() > 1 and len(held[key]) == labels]
    path = rows[-1].rpartition(".")[0] if rows else None
    return [(key, held[key]) for key in names if key.rpartition(".")[0] == path]


def unused_weights(model: Any, inputs: Mapping[str, Tensor]) -> set[str]:
    """Return the weights that a model does not use for such inputs: those without a gradient from any output."""
    weights = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    with fork_rng_of(model.parameters()):
        answers = [t for t in model(**inputs).to_tuple() if isinstance(t, Tensor) and t.requires_grad]
    slopes = torch.autograd.grad([t.sum() for t in answers], [*weights.values()], allow_unused=True)
    return {key for key, slope in zip(weights, slopes, strict=True) if slope is None}


def order_of(own: Sequence[str], labels: Sequence[str]) -> list[int]:
    """Return for each of the data's labels its row in a head of as many: that of the same name, or else the next left.

    >>> order_of(["neutral", "Positive", "negative "], ["negative", "neutral", "positive"])
    [2, 0, 1]
    >>> order_of(["a", "b", "c"], ["x", "a", "y"])
    [1, 0, 2]
    """
    rows, wanted = _comparable_names(own), _comparable_names(labels)
    left = iter([i for i, key in enumerate(rows) if key not in wanted])
    return [rows.index(key) if key in rows else next(left) for key in wanted]


def match_rows_(
    name: str, model: Any, own: Sequence[str], labels: Sequence[str], inputs: Callable[[], Mapping[str, Tensor]]
) -> str:
    """Reorder the rows of a fine-tuned head, named `own`, to match the data's labels, equally many.

    The outputs for the row that `inputs` returns must be the same except for their order.
    Returns: a note on what was done, or on rows with other label names; '' if all names agree.
    """
    order = order_of(own, labels)
    unlike = [_comparable_names(own)[i] for i in order] != _comparable_names(labels)
    if order != [*range(len(own))]:
        _reorder_rows_(name, model, order, inputs())
        how = "matched by name where a name is the same, the others in turn" if unlike else "matched by name"
        return f"the head's rows are {', '.join(own)}; they were put in the order {', '.join(labels)}, {how}"
    if unlike:
        return f"the head's rows {', '.join(own)} are taken in this order for the labels {', '.join(labels)}"
    return ""


@torch.no_grad()
def _reorder_rows_(name: str, model: Any, order: Sequence[int], inputs: Mapping[str, Tensor]) -> None:
    before = model(**inputs).logits
    for _, t in _output_layer(model, randomly_drawn_head(model)):
        t.copy_(t[list(order)])
    if not torch.allclose(model(**inputs).logits, before[:, list(order)], rtol=1e-4, atol=1e-5):
        raise UserError(
            f"model {name!r} answers in another order than the data's labels, and its head is of a form that cannot be "
            f"reordered here; save it with labels in the order of the data"
        )


def _comparable_names(names: Sequence[str]) -> list[str]:
    """Return names without irrelevant differences: case, spaces, and LABEL_ before a mere number."""
    keys = [re.sub(r"^label[ _]?(?=\d+$)", "", one_line(name).casefold()) for name in names]
    return keys if len({*keys}) == len(keys) else [str(name) for name in names]
