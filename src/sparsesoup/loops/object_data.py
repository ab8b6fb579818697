"""Rows of dataset objects: collated into batches, and identified by a digest."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from dataclasses import fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator

from sparsesoup.core.errors import UserError, list_names, one_line
from sparsesoup.core.rng import fork_rng_of, seed_everything
from sparsesoup.loops.losses import CheckedLoss, scalar_loss
from sparsesoup.loops.object_problem import LossAndOutputs
from sparsesoup.loops.problem import Loss, as_mapping
from sparsesoup.training.batching import Batch, RowBatches
from sparsesoup.training.config import TrainingConfig

DIGESTED = 256  # rows of a dataset that its digest reads, evenly spread


def check_row_source(dataset: Any, name: str) -> None:
    """Raise a UserError if a dataset argument is no rows: a name, a DataLoader, a table of splits or a number."""
    if isinstance(dataset, pandas.DataFrame):
        raise UserError(
            "it is a table of pandas; give datasets.Dataset.from_pandas(table), or its rows as a list", name
        )
    if isinstance(dataset, Mapping):
        raise UserError(f"it is a table of splits ({list_names(dataset)}); give one of them", name)
    if isinstance(dataset, DataLoader):
        raise UserError("it is a DataLoader; give its dataset, and train=TrainingConfig(batch_size=...)", name)
    if isinstance(dataset, str | Path) or not (isinstance(dataset, Iterable) or hasattr(dataset, "__getitem__")):
        allowed = "rows, as a datasets.Dataset, a torch Dataset or a list (a name goes with dataset=...)"
        raise UserError(f"must be {allowed}, got {str(dataset)!r}", name)
    if isinstance(dataset, Sized) and not len(dataset):
        raise UserError("the dataset has no rows; give at least one", name)


def rows_of(
    dataset: Any,
    collator: Callable[[list[Any]], Any] | None,
    steps: int | None,
    training: TrainingConfig,
    processing_class: Any = None,
    taken: Collection[str] | None = None,
) -> RowBatches:
    """Return the rows of a dataset object; of an iterable without a length as many as T steps take.

    Args:
        taken: columns that the model takes, where its own loss is used. As in the Trainer, others are left out before
            a collator of transformers; a collator of the user's gets all.
    Raises: UserError if it has no rows, or no length and `steps` is not given.
    """
    if not (isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")):
        if steps is None or not isinstance(dataset, Iterable):
            raise UserError("this dataset has no length; give steps=..., the number of optimizer steps")
        dataset = list(islice(iter(dataset), (steps or 32) * training.rows_per_step))
    if not len(dataset):
        raise UserError("the dataset has no rows; give at least one")
    if taken is not None and collator is None and not isinstance(dataset[0], Mapping):
        raise UserError(
            f"a row is a {type(dataset[0]).__name__}, whose parts have no names; give mappings such as "
            f"{{'input_ids': ..., 'labels': ...}}, or loss=lambda model, batch: ..."
        )
    if collator is None or type(collator).__module__.startswith("transformers."):
        collator = _library_collator(collator or _default_collator(dataset[0], processing_class), taken)
    return RowBatches(dataset, lambda rows: as_mapping(collator(list(rows))))


def _default_collator(row: Any, processing_class: Any) -> Callable[[list[Any]], Any]:
    """Return the Trainer's collator: with a tokenizer it pads; rows that are no mappings are stacked by torch."""
    if not isinstance(row, Mapping):
        return torch.utils.data.default_collate
    known = isinstance(processing_class, PreTrainedTokenizerBase)
    return DataCollatorWithPadding(processing_class) if known else default_data_collator


def _library_collator(collator: Callable[[list[Any]], Any], taken: Collection[str] | None) -> Callable[[Any], Any]:
    """Return a collator that leaves out what the model does not take, and says which column cannot be stacked."""

    def collate(rows: list[Any]) -> Any:
        try:
            return collator([_without(row, taken) for row in rows])
        except (TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
            raise UserError(f"the rows cannot be stacked to a batch ({_why_not(rows, collator, error)}") from error

    return collate


def _without(row: Any, taken: Collection[str] | None) -> Any:
    if taken is None or not isinstance(row, Mapping):
        return row
    return {name: value for name, value in row.items() if name in taken} or row


def _why_not(rows: Sequence[Any], collator: Any, error: Exception) -> str:
    """Return which column of rows cannot be stacked, and the remedy; else the error of the collator."""
    if isinstance(rows[0], Mapping):
        texts = [name for name, value in rows[0].items() if isinstance(value, str)]
        if texts and not {"input_ids", "inputs_embeds"} & rows[0].keys():
            name = texts[0]
            return f"{name} is text); encode it first, as dataset.map(lambda row: tokenizer(row[{name!r}]))"
        padded = getattr(getattr(collator, "tokenizer", None), "model_input_names", ())
        for name in (name for name in rows[0] if name not in padded):
            sizes = sorted({len(row[name]) for row in rows if isinstance(row.get(name), Sized)})
            if len(sizes) > 1 and not isinstance(rows[0][name], str):
                remedy = "data_collator=DataCollatorWithPadding(tokenizer), or processing_class=tokenizer, which pads"
                if "label" in name:
                    remedy = "data_collator=DataCollatorForTokenClassification(tokenizer)"
                return f"{name} has {sizes[0]} and {sizes[1]} values); give {remedy}"
    return f"{one_line(error)[:150]}); give data_collator=..."


def rows_digest(rows: RowBatches) -> str:
    """Return a digest of the number of rows and of the contents of at most 256 of them, evenly spread."""
    count, digest = len(rows), hashlib.sha256()
    digest.update(f"{count} rows".encode())
    with fork_rng_of(()):
        seed_everything(0)  # rows that are sampled are the same ones each time
        for i in sorted({count * k // DIGESTED for k in range(DIGESTED)}):
            _digest_value(rows.rows[i], digest)
    return digest.hexdigest()


def _digest_value(value: Any, digest: Any) -> None:
    """Add a value to a digest; of what is no number, text, array or collection of these only the type counts."""
    digest.update(type(value).__name__.encode())
    if isinstance(value, Mapping):
        for name in sorted(value, key=str):
            digest.update(str(name).encode())
            _digest_value(value[name], digest)
    elif isinstance(value, list | tuple):
        for part in value:
            _digest_value(part, digest)
    elif isinstance(value, Tensor):
        _digest_value(value.detach().cpu().float().numpy(), digest)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, bytes):
        digest.update(value)
    elif isinstance(value, str | int | float | bool | np.generic) or value is None:
        digest.update(repr(value).encode())
    elif hasattr(value, "tobytes"):  # an image of Pillow
        digest.update(value.tobytes())


def loss_functions(loss: Loss | None, rows: RowBatches) -> tuple[Loss, LossAndOutputs]:
    """Return (batch -> loss, batch -> loss and outputs), from a loss of the user's or the model's own.

    Args:
        loss: (model, batch) -> mean loss, or (mean loss, outputs); None: the model's own.
        rows: rows that are no mappings come to the user's loss as a tuple.
    """
    if loss is None:
        return lambda model, batch: _own_loss(model, batch)[0], _own_loss
    plain, alone = not isinstance(rows.rows[0], Mapping), CheckedLoss(getattr(loss, "alone", loss))

    def given(batch: Batch) -> Any:
        return tuple(batch.values()) if plain else batch

    def only_loss(model: nn.Module, batch: Batch) -> Tensor:
        return alone(model, given(batch))

    def both(model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        found: Any = loss(model, given(batch))
        if isinstance(found, tuple) and len(found) == 2 and found[1] is not None:
            return scalar_loss(found[0]), outputs_of_model(model, found[1])
        if plain or isinstance(found, tuple):
            raise UserError("outputs are needed beside the loss; let loss=... return (loss, outputs)")
        outputs = model(**{n: t for n, t in batch.items() if "label" not in n})
        return scalar_loss(found), outputs_of_model(model, outputs)

    return only_loss, both


def _own_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
    """Return (loss, outputs) of a model of transformers."""
    found = model(**batch)
    loss = getattr(found, "loss", None)
    if loss is None:
        raise UserError(
            f"{type(model).__name__} returned no loss for a batch of {', '.join(batch)}; name the answers labels, or "
            f"give loss=lambda model, batch: ..."
        )
    return loss, outputs_of_model(model, found)


def outputs_of_model(model: nn.Module, found: Any) -> Any:
    """Return the outputs of a model without its loss, as the Trainer does: a single one, or a tuple."""
    ignored = {"loss", *getattr(getattr(model, "config", None), "keys_to_ignore_at_inference", ["past_key_values"])}
    if isinstance(found, Mapping):
        parts = _tensors_of(tuple(value for name, value in found.items() if name not in ignored))
        return parts[0] if len(parts) == 1 else parts
    return _tensors_of(found)


def _tensors_of(found: Any) -> Any:
    """Return outputs as tensors in mappings and tuples, without those that are None; a dataclass is a mapping.

    Raises: UserError if there is something else.
    """
    if isinstance(found, Tensor):
        return found
    if is_dataclass(found) and not isinstance(found, Mapping | type):
        found = {field.name: getattr(found, field.name) for field in fields(found)}
    if isinstance(found, Mapping):
        return {name: _tensors_of(part) for name, part in found.items() if part is not None}
    if isinstance(found, list | tuple):
        return tuple(_tensors_of(part) for part in found if part is not None)
    raise UserError(
        f"outputs are tensors, or mappings, tuples and dataclasses of tensors, got a {type(found).__name__}; let "
        f"loss=... return (loss, outputs)"
    )
