"""Encode texts for a model: tokenized once, padded per batch."""

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsesoup.core.errors import UserError, require
from sparsesoup.hub.tasks.labels import label_values
from sparsesoup.training.batching import Batch, RowBatches

Row = tuple[Any, ...]  # one array of token ids per tokenizer input, then the values from which `collate` makes labels
MASK = "attention_mask"
MOST = 250_000  # rows to keep tokenized: 100 MB of short texts
_KEPT: dict[bytes, tuple[list[str], list[list[Any]]]] = {}


def encode_texts(
    rows: Dataset,
    task: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    labels: Sequence[Any] | None = None,
) -> RowBatches:
    """Return the rows as token ids and labels, ready for batching; the longer text of a pair is truncated first.

    `labels` are a label, or an array of them, for each row; by default those of the task, which is then a `TextTask`.
    """
    check_tokenizer(tokenizer, max_length)
    columns = [text_column(rows, column, "the data") for column in task.texts]
    labels = label_values(rows, task, "the data") if labels is None else labels
    names, arrays = _tokenize_columns(columns, tokenizer, max_length)
    lengths = tuple(map(len, arrays[0]))
    if empty := lengths.count(0):
        text = " ".join(column[lengths.index(0)] for column in columns)
        raise UserError(
            f"{empty} of {len(lengths)} rows have no tokens in column {' and '.join(task.texts)}, where one is needed: "
            f"the tokenizer of {tokenizer.name_or_path} makes none of {text[:40]!r}; drop such rows, or use the "
            f"tokenizer that belongs to the model"
        )
    dtype = np.int64 if np.issubdtype(np.asarray(labels).dtype, np.integer) else np.float32
    pad = padding_function(names, tokenizer, tokenizer.padding_side == "left")

    def collate_rows(rows: Sequence[Row]) -> Batch:
        return pad(rows) | {"labels": torch.from_numpy(np.array([row[-1] for row in rows], dtype=dtype))}

    return RowBatches(list(zip(*arrays, labels, strict=True)), collate_rows, lengths)


def _tokenize_columns(
    columns: Sequence[list[str]], tokenizer: Any, max_length: int
) -> tuple[list[str], list[list[Any]]]:
    """Return (names of the inputs, an array per row for each), cached for later runs of this process."""
    # By default a later fork would warn or deadlock on the tokenizer's threads; one thread tokenizes SST-2 in seconds.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Slow tokenizers cannot be distinguished.
    key = _cache_key(columns, tokenizer, max_length) if tokenizer.is_fast else os.urandom(8)
    if key not in _KEPT:
        how = {"truncation": True, "padding": False, "return_attention_mask": False}
        encoded = tokenizer(*columns, max_length=max_length, **how)
        names = [name for name in tokenizer.model_input_names if name in encoded and name != MASK]
        _KEPT[key] = names, [[np.array(ids, dtype=np.int32) for ids in encoded[name]] for name in names]
        while len(_KEPT) > 1 and sum(len(arrays[0]) for _, arrays in _KEPT.values()) > MOST:
            del _KEPT[next(iter(_KEPT))]
    return _KEPT[key]


def _cache_key(columns: Sequence[list[str]], tokenizer: Any, max_length: int) -> bytes:
    """Return a hash of the texts and of everything that determines their ids."""
    digest = hashlib.blake2b(repr((max_length, tokenizer.model_input_names, tokenizer.truncation_side)).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for column in columns:
        digest.update(repr([len(text) for text in column]).encode() + "".join(column).encode(errors="surrogatepass"))
    return digest.digest()


def padding_function(names: Sequence[str], tokenizer: Any, left: bool) -> Callable[[Sequence[Row]], Batch]:
    """Return a function from rows to padded inputs; in numpy, as torch is slow on tensors this small."""
    known = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    fills = [(name, known.get(name, 0)) for name in names]
    masked = MASK in tokenizer.model_input_names

    def pad_rows(rows: Sequence[Row]) -> Batch:
        lengths = [len(row[0]) for row in rows]
        width = max(lengths)
        spans = [slice(width - n, width) if left else slice(n) for n in lengths]
        columns = list(zip(*rows, strict=True))
        batch = {name: _pad_values(columns[k], spans, width, fill) for k, (name, fill) in enumerate(fills)}
        if masked:
            batch[MASK] = _pad_values([1] * len(rows), spans, width, 0)
        return batch

    return pad_rows


def _pad_values(values: Sequence[Any], spans: Sequence[slice], width: int, fill: int) -> Tensor:
    padded = np.full((len(spans), width), fill, dtype=np.int64)
    for i, span in enumerate(spans):
        padded[i, span] = values[i]
    return torch.from_numpy(padded)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Raise a UserError if a tokenizer cannot pad, or cannot make rows of that length."""
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"the tokenizer of {name} has no padding token, where batches need one; set `tokenizer.pad_token = "
            "tokenizer.eos_token` and save the checkpoint again"
        )
    fewest, most = tokenizer.num_special_tokens_to_add(pair=True) + 2, tokenizer.model_max_length
    allowed = f"{fewest} to {most} for the tokenizer of {name}"
    require(fewest <= max_length <= most, "max_length", allowed, max_length)


def check_words(tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Raise a UserError for a tokenizer without a vocabulary: transformers makes one for a folder that has none."""
    if not {*tokenizer.get_vocab()} - {*tokenizer.all_special_tokens, "▁"}:
        raise UserError(
            f"model {model} has no tokenizer, or one that knows no words; save that of its base model into the same "
            f"folder, by AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)"
        )


def text_column(rows: Dataset, column: str, split: str) -> list[str]:
    """Return the texts of a column; raise a UserError that names the row of a value that is not a string."""
    values = rows[column][:]
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise UserError(
                f"{split}: row {i} has {value!r} of type {type(value).__name__} in column {column}, where a string is "
                "needed; correct or drop such rows, or name other columns",
                "text_columns",
            )
    return values
