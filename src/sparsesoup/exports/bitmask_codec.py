"""Packed weights: a bit mask of the nonzero weights, followed by their values.

One safetensors file. A tensor `w` with enough zeros is stored as `w|bits` and `w|values`, any other as `w|whole`; the
header lists for each its shape, its type, the type of the values and a SHA-256 over these and the bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import from_json

FILE, FORMAT = "packed.safetensors", 1
TYPES = {str(kind).removeprefix("torch."): kind for kind in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)}  # fmt: skip
NAMES = {kind: name for name, kind in TYPES.items()}
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes per weight -> integer type
FLAWS = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, pyarrow.ArrowException)
Entry = dict[str, Any]  # shape, dtype, stored, sha256, and with zstd the size of each part
Packed = tuple[str, Entry, dict[str, Tensor]]  # name, entry, parts


def encode_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype | None = None, zstd: bool = False
) -> tuple[Entry, dict[str, Tensor]]:
    """Return (header entry, parts) of a weight tensor.

    Nonzero values are restored bit by bit. Zeros are restored as 0.0 whatever their sign: `weight * mask` leaves a -0.0
    for each negative weight that it prunes, and these would fill the file.

    Args:
        dtype: type to round the values to; None keeps all their bits.
        zstd: compress the parts.
    """
    if tensor.dtype not in NAMES:
        raise UserError(f"{name} has type {tensor.dtype}, which is not packed; allowed: {', '.join(TYPES)}")
    words = _as_integer_bits(tensor)
    alive = (tensor.detach() != 0).cpu().numpy().reshape(-1)
    stored = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if -(-words.size // 8) + int(np.count_nonzero(alive)) * stored.itemsize < words.size * stored.itemsize:
        values = torch.from_numpy(words[np.flatnonzero(alive)]).view(tensor.dtype)
        parts = {"bits": torch.from_numpy(np.packbits(alive)), "values": values.to(stored)}
    else:
        parts = {"whole": torch.from_numpy(words).view(tensor.dtype).to(stored)}
    entry: Entry = {"shape": list(tensor.shape), "dtype": NAMES[tensor.dtype], "stored": NAMES[stored]}
    if zstd:
        entry["zstd"] = {part: t.nbytes for part, t in parts.items()}
        parts = {part: _compress_bytes(t) for part, t in parts.items()}
    return entry | {"sha256": _entry_digest(name, entry, parts)}, {f"{name}|{part}": t for part, t in parts.items()}


def decode_tensor(name: str, entry: Entry, parts: dict[str, Tensor]) -> Tensor:
    """Rebuild the weights from the parts of `encode_tensor`."""
    facts, squeezed = {key: value for key, value in entry.items() if key != "sha256"}, entry.get("zstd")
    kinds = {part: torch.uint8 if part == "bits" else TYPES[entry["stored"]] for part in parts}
    # The digest covers the types in the table, not those in the file's own header.
    known = all(t.dtype == (torch.uint8 if squeezed else kinds[part]) for part, t in parts.items())
    if not known or _entry_digest(name, facts, parts) != entry.get("sha256"):
        raise UserError(f"damaged file: the bytes of {name} are not those that were written; copy it again")
    if squeezed:
        parts = {part: _decompress_bytes(t, kinds[part], squeezed[part]) for part, t in parts.items()}
    dtype, shape = TYPES[entry["dtype"]], entry["shape"]
    if not (count := int(np.prod(shape))):
        return torch.empty(shape, dtype=dtype)
    if "whole" in parts:
        return parts["whole"].to(dtype).reshape(shape)
    words = np.zeros(count, dtype=_as_integer_bits(torch.zeros(1, dtype=dtype)).dtype)
    # Indices instead of the mask: half the time.
    kept = np.flatnonzero(np.unpackbits(parts["bits"].numpy(), count=count).view(bool))
    words[kept] = _as_integer_bits(parts["values"].to(dtype))
    return torch.from_numpy(words).view(dtype).reshape(shape)


def write_packed(path: Path, packed: Iterable[Packed]) -> None:
    """Write a packed file."""
    table: dict[str, Entry] = {}
    parts: dict[str, Tensor] = {}
    for name, entry, some in packed:
        table[name] = entry
        parts |= some
    # One header entry, since safetensors writes several in random order: equal weights must give equal bytes.
    save_file(parts, path, metadata={"sparsesoup": json.dumps({"format": FORMAT, "tensors": table})})


def read_packed(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weights) of every tensor in a folder's packed file, each verified first."""
    path, where = folder / FILE, "the file"
    try:
        with safe_open(path, framework="pt") as file:
            table = _read_header(path, file)
            keys: dict[str, list[str]] = {}
            for key in sorted(file.keys()):
                keys.setdefault(key.rpartition("|")[0], []).append(key)
            if foreign := sorted(keys.keys() ^ table.keys()):
                raise UserError(f"damaged file: its tensors and its own table differ in {foreign[0]}; copy it again")
            for where, entry in table.items():
                parts = {key.rpartition("|")[2]: file.get_tensor(key) for key in keys[where]}
                yield where, decode_tensor(where, entry, parts)
    except UserError as error:  # also a ValueError
        raise UserError(str(error).replace("damaged file:", f"damaged file {path}:", 1)) from error
    except FileNotFoundError as error:
        raise UserError(f"no {path}: give a folder that `sparsesoup export --to packed` wrote") from error
    except FLAWS as error:
        raise UserError(f"damaged file {path}: {where} is not as it was written ({error}); copy it again") from error


def stored_kinds(folder: Path) -> dict[str, torch.dtype]:
    """Return tensor -> type of its values in a folder's packed file."""
    with safe_open(folder / FILE, framework="pt") as file:
        return {name: TYPES[entry["stored"]] for name, entry in _read_header(folder / FILE, file).items()}


def _read_header(path: Path, file: Any) -> dict[str, Entry]:
    header = from_json((file.metadata() or {}).get("sparsesoup", "{}"))
    if header.get("format") != FORMAT:
        raise UserError(f"{path} has format {header.get('format')}; this version reads {FORMAT}")
    return dict(header["tensors"])


def _as_integer_bits(tensor: Tensor) -> Any:
    """Return the weights' bits as integers, flat."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():  # may have a stride of 0, which torch cannot view as another type
        flat = torch.empty(0, dtype=tensor.dtype)
    return flat.view(WORDS[tensor.dtype.itemsize]).numpy()


def _entry_digest(name: str, entry: Entry, parts: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([name, entry], sort_keys=True).encode())
    for part in sorted(parts):
        digest.update(part.encode())
        digest.update(_as_integer_bits(parts[part]).data)
    return digest.hexdigest()


def _compress_bytes(tensor: Tensor) -> Tensor:
    """Compress bytes, grouped by their position in a number, since exponents resemble each other."""
    raw = _as_integer_bits(tensor).view(np.uint8).reshape(-1, tensor.dtype.itemsize).T
    squeezed = pyarrow.Codec("zstd").compress(np.ascontiguousarray(raw).data, asbytes=True)
    return torch.frombuffer(bytearray(squeezed), dtype=torch.uint8)


def _decompress_bytes(squeezed: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    raw = pyarrow.Codec("zstd").decompress(squeezed.numpy().data, decompressed_size=size, asbytes=True)
    columns = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1).T
    return torch.from_numpy(np.array(columns, order="C").reshape(-1)).view(dtype)
