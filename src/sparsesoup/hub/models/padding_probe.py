"""Check before the first step that a model's output for a row depends only on that row."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sparsesoup.core.errors import UserError, cause_line
from sparsesoup.core.rng import devices_of, fork_rng_of, seed_everything
from sparsesoup.hub.quiet import quiet_libraries
from sparsesoup.hub.tasks.registry import TaskType
from sparsesoup.training.batching import RowBatches

CLOSE = 1e-4  # largest difference of outputs, as a share of the largest; rounding gives 1e-6
REMEMBERED = (bool, int, float, str, type(None))


def probe_padding(name: str, kind: TaskType, model: nn.Module, data: RowBatches) -> None:
    """Raise a UserError if a row's output changes with the rest of its batch, or with an earlier batch.

    The first would make every score depend on how rows are batched. The second is a hidden state that is not a tensor
    and is not saved (BigBird switches to full attention on the first short batch), so a stopped run could not resume
    exactly. The shortest and the longest of the training rows are tried; the model, on the CPU, is not changed.
    """
    order = sorted(range(len(data)), key=lambda i: data.lengths[i] if data.lengths else 0)
    short, both = order[:1], [order[0], order[-1]]
    for training in (False, True):
        one, other = _shallow_copy(model, training), _shallow_copy(model, training)
        passes = ((one, both), (one, short), (one, both), (other, short))
        first, alone, again, fresh = (_outputs_for(name, kind, probe, data, rows) for probe, rows in passes)
        if _differ(first, again) or _differ(alone, fresh):
            changed = _module_state(one).items() ^ _module_state(_shallow_copy(model, training)).items()
            where = f"such as {min(changed, key=str)[0]}" if changed else "in its code"
            raise UserError(
                f"model {name} ({type(model).__name__}) answers a row otherwise after it was asked another: it keeps a "
                f"state beside its weights, {where}, which no run could go on from; use a model of another family"
            )
        if not training and data.lengths and _differ(first[:1], alone):
            raise UserError(
                f"model {name} ({type(model).__name__}) answers a row otherwise beside a longer one than alone, by "
                f"{float((first[0] - alone[0]).abs().max()):.2g}: its code reads the padding, so every score would "
                f"depend on how rows are batched; use a model of another family"
            )


def _shallow_copy(model: nn.Module, training: bool) -> nn.Module:
    """Return a copy that shares the weights, but not buffers and other state."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()}).train(training)


def _outputs_for(name: str, kind: TaskType, model: nn.Module, data: RowBatches, rows: list[int]) -> Tensor:
    """Return the outputs for some rows; raise a UserError unless they are finite."""
    batch = data.batch(rows)
    try:
        with torch.no_grad(), fork_rng_of(model.parameters()), quiet_libraries():
            seed_everything(0, devices_of(model.parameters()))
            answers = kind.predict(model, batch).float()
    except Exception as error:  # any error that a wrong number in config.json may cause
        if not kind.images:
            raise UserError(
                f"model {name} cannot answer a row of {len(batch['input_ids'][0])} tokens ({cause_line(error)}); use "
                f"config.json, weights and tokenizer as they were written"
            ) from error
        raise UserError(
            f"model {name} does not take images of {'x'.join(map(str, batch['pixel_values'].shape[1:]))} (channels, "
            f"height, width), as its image processor makes them: {cause_line(error)}; correct preprocessor_config.json"
        ) from error
    if not torch.isfinite(answers).all():
        raise UserError(
            f"model {name} answers with NaN or infinite numbers before any training, though its weights are finite; "
            f"use config.json as it was written"
        )
    return answers


def _differ(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > CLOSE * one.abs().max().clamp(min=1e-3))


def _module_state(model: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of a model's modules, by name."""
    return {
        f"{path}.{key}".lstrip("."): value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, REMEMBERED) and not key.startswith("_")
    }
