"""Random model inputs, to compare two models or to trace one."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.core.rng import cpu_generator


def dummy_inputs(model: Any, rows: int = 2, length: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Return a batch of random inputs for a model of texts, images or both.

    The last two of the `length` tokens of the first text are padding. If the model has an end-of-text token, each row
    has one, after all others: the heads of BART and T5 read there.

    Returns: `input_ids`, `attention_mask` and `token_type_ids` [rows, length], `pixel_values` [rows, channels, height,
        width], as the model takes them.
    """
    draw, found, kind = cpu_generator(seed, "sample"), {}, str(model.config.model_type)
    text, image = _text_and_vision_configs(model)
    if text is not None:
        mask = torch.ones((rows, length), dtype=torch.long)
        mask[0, -2:] = 0
        found = {"input_ids": _random_tokens(text, mask, draw), "attention_mask": mask}
        taken = inspect.signature(model.forward).parameters
        if (kinds := getattr(text, "type_vocab_size", 0)) > 1 and "token_type_ids" in taken:
            found["token_type_ids"] = torch.randint(0, kinds, (rows, length), generator=draw)
    if image is not None:
        found["pixel_values"] = torch.randn((rows, *_image_shape(image)), generator=draw).to(model.dtype)
    if not found:
        raise UserError(f"{type(model).__name__} (model type {kind}) takes neither texts nor images")
    return {name: t.to(model.device) for name, t in found.items()}


def _random_tokens(config: Any, mask: Tensor, draw: torch.Generator) -> Tensor:
    """Return random token ids [rows, length], with end of text and padding as from a tokenizer."""
    end, pad = (getattr(config, name, None) for name in ("eos_token_id", "pad_token_id"))
    end = end[0] if isinstance(end, list) else end
    ids, words = torch.randint(0, config.vocab_size, mask.shape, generator=draw), torch.arange(config.vocab_size)
    others = words[(words != end) & (words != pad)]
    ids = others[ids % len(others)]
    if end is not None and 0 <= end < config.vocab_size:
        ids.scatter_(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0), end)
    return ids if pad is None or pad < 0 else ids.masked_fill(mask == 0, pad)


def _image_shape(config: Any) -> tuple[int, ...]:
    """Return (channels, height, width) of a model's images; timm and open_clip have their own config tables."""
    if seen := (getattr(config, "pretrained_cfg", None) or {}).get("input_size"):
        return tuple(seen)
    size = getattr(config, "image_size", getattr(config, "model_cfg", {}).get("vision_cfg", {}).get("image_size"))
    if size is None:
        raise UserError(
            f"config.json of a {config.model_type} model does not say how large its images are; expected image_size, "
            f"or input_size in pretrained_cfg; add it"
        )
    return (getattr(config, "num_channels", 3), *([size] * 2 if isinstance(size, int) else size))


def _text_and_vision_configs(model: Any) -> tuple[Any, Any]:
    """Return (config of the text model, config of the vision model), None for a missing one."""
    config, name = model.config, model.main_input_name
    text, image = getattr(config, "text_config", None), getattr(config, "vision_config", None)
    if text is not None and image is not None:
        # CLIP's image classifier has the config of both towers but only one tower.
        return (text if hasattr(model, "text_model") else None), image
    return (config if name == "input_ids" else None), (config if name == "pixel_values" else None)


@torch.no_grad()
def forward_outputs(model: Any, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the output tensors of a model."""
    outputs = model(**batch, return_dict=True)
    return [value for value in outputs.values() if isinstance(value, Tensor) and value.is_floating_point()]
