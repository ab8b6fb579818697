"""Adapt a tokenizer to its model, so that training, testing and saving read every row alike."""

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import AutoModel

from sparsesoup.core.errors import UserError

MASK, KINDS = "attention_mask", "token_type_ids"


def tokenizer_settings(config: Any) -> dict[str, Any]:
    """Return the tokenizer settings for a model, which override its own file and are saved with it.

    A head reads the first token or the last one that is not padding, and learned positions count from the left; so rows
    are padded on the right, except for a head that reads the last position (XLNet's). Special tokens named in a text
    are tokenized as plain text.
    """
    last = getattr(config, "summary_type", "") == "last"
    return {"padding_side": "left" if last else "right", "split_special_tokens": True}


def input_names(made: list[str], config: Any) -> list[str]:
    """Return the inputs that tokenizer and model share: token types only if the model distinguishes two of them."""
    kind = AutoModel._model_mapping.get(type(config), None)
    if kind is None:  # code from the checkpoint
        return made
    taken = inspect.signature((kind[0] if isinstance(kind, tuple) else kind).forward).parameters  # Funnel has two
    names = [name for name in made if name in taken and name != MASK] + [MASK] * (MASK in taken)
    return [name for name in names if name != KINDS or getattr(config, "type_vocab_size", 2) > 1]


def config_settings(config: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the settings that a model's config.json needs for training with a tokenizer.

    A decoder's head reads the last token that is not `pad_token_id`. BigBird's sparse attention switches to full
    attention for good at the first short batch, so the attention of a row would depend on the rows before it.
    """
    sparse = getattr(config, "attention_type", "") == "block_sparse"
    return {"pad_token_id": tokenizer.pad_token_id} | ({"attention_type": "original_full"} if sparse else {})


def padding_of(config: Any) -> int | None:
    """Return the padding token of a config.json."""
    return getattr(config.get_text_config(), "pad_token_id", None)


def config_notes(config: Any, fixed: Mapping[str, Any], name: str) -> list[str]:
    """Return notes on settings of a model that were overridden."""
    own, pad = padding_of(config), fixed["pad_token_id"]
    padded = f"config.json of {name} pads with token {own} and its tokenizer with {pad}, which both say from now"
    full = (
        f"{name} is trained, tested and saved with full attention: its own block_sparse gives way to that at the first "
        f"short batch"
    )
    return [padded] * (own not in (None, pad)) + [full] * ("attention_type" in fixed)


def check_padding(name: str, model: Any, tokenizer: Any, own: int | None) -> None:
    """Raise a UserError if a model computes positions from another padding token, `own`, than its tokenizer's."""
    tables = [module for path, module in model.named_modules() if path.endswith("position_embeddings")]
    counts = own is not None and any(getattr(table, "padding_idx", None) == own for table in tables)
    if counts and tokenizer.pad_token_id != own:
        raise UserError(
            f"config.json of {name} has pad_token_id {own}, from which the model counts positions, and its tokenizer "
            f"pads with {tokenizer.pad_token} (token {tokenizer.pad_token_id}); correct the one that is wrong"
        )
