"""Saved states: the kept weights and moments alone, a bit for each prunable weight, never a second state in memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsesoup.core.masks import pack_bits, unpack_bits
from sparsesoup.core.tensor_files import LazyTensor, open_tensors, save_tensors

BITS, KEPT = "bits|", "kept|"  # prefixes of a packed mask, and of the values at kept weights
MASKS = "masks/"


def save_state(path: Path, tensors: Mapping[str, Tensor], facts: Any) -> str:
    """Write the tensors of a state, as `TrainState.tensors` names them, and its facts; return the digest.

    Masks take a bit a weight. Of weights and moments that are zero wherever their mask is, only the others are
    written; they are read back as they were, but for the sign of zeros.
    """
    masks = {name.removeprefix(MASKS): m for name, m in tensors.items() if name.startswith(MASKS)}
    stored: dict[str, Tensor | LazyTensor] = {}
    for name, t in tensors.items():
        mask = masks.get(_parameter_of(name))
        if name.startswith(MASKS) and t.dtype == torch.bool:
            stored[f"{BITS}{name}"] = LazyTensor(torch.uint8, (-(-t.numel() // 8),), partial(pack_bits, t))
        elif mask is not None and mask.shape == t.shape and (count := _kept_alone(t, mask)) < t.numel():
            stored[f"{KEPT}{name}"] = LazyTensor(t.dtype, (count,), partial(torch.masked_select, t.detach(), mask))
        else:
            stored[name] = t
    shapes = {name: tuple(m.shape) for name, m in masks.items()}
    return save_tensors(path, stored, {"state": facts, "shapes": shapes})


@contextmanager
def open_state(path: Path, digest: object = None) -> Iterator[tuple[Mapping[str, Tensor], Any]]:
    """Yield (tensors, facts) of a saved state; each tensor is read when it is looked up.

    Raises: OSError or ValueError if the file cannot be read, or does not match the digest, where one is given.
    """
    with open_tensors(path, digest) as (file, facts):
        packed = isinstance(facts, dict) and facts.keys() == {"state", "shapes"}  # not so in those of older versions
        yield SavedTensors(file, facts["shapes"] if packed else {}), facts["state"] if packed else facts


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of an open file of a state."""

    def __init__(self, file: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> None:
        self._file, self._shapes = file, shapes
        self._stored = {key.removeprefix(BITS).removeprefix(KEPT): key for key in file}

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        values = self._file[stored]
        if stored.startswith(BITS):
            return unpack_bits(values, self._shapes[name.removeprefix(MASKS)])
        if stored.startswith(KEPT):
            mask = self[f"{MASKS}{_parameter_of(name)}"]
            return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter_(mask, values)
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _parameter_of(name: str) -> str:
    """Return the parameter that a weight or moment of a state belongs to; '' for other tensors."""
    kind, _, rest = name.partition("/")
    return rest if kind == "model" else rest.partition("/")[2] if kind == "optimizer" else ""


def _kept_alone(tensor: Tensor, mask: Tensor) -> int:
    """Return the number of kept entries if all others are zero, else of all."""
    kept = int(torch.count_nonzero(mask))
    zero = int(torch.count_nonzero(tensor)) == int(torch.count_nonzero(torch.masked_select(tensor.detach(), mask)))
    return kept if zero else tensor.numel()
