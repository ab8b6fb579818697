"""Files of tensors and facts: written whole or not at all, tensor by tensor, and read as they were written."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsesoup.core.files import atomic_write, check_digest, digest_of, from_json

MAPPED = 1 << 26  # bytes of a file that are mapped at a time
FACTS = "facts"  # metadata of the safetensors file: the plain facts as JSON
CODES = {  # of the safetensors format
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written.

    Args:
        dtype, shape: of the tensor.
        make: returns it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def save_tensors(path: Path, tensors: Mapping[str, Tensor | LazyTensor], facts: Any = None) -> str:
    """Write tensors and plain facts into a safetensors file; return its digest.

    Raises: UserError if the disk is full.
    """
    with atomic_write(path) as temporary:
        write_tensors(temporary, tensors, facts)
        return digest_of(temporary)


def write_tensors(path: Path, tensors: Mapping[str, Tensor | LazyTensor], facts: Any = None) -> None:
    """Write tensors and plain facts into a new safetensors file, in place and without a digest.

    Tensors are written one after the other: safetensors' own writer would first copy all of them into host memory.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # aligned, as safetensors does it
    header, end = dict[str, Any](__metadata__={FACTS: json.dumps(facts)}), 0
    for name in names:
        kind, shape = tensors[name].dtype, tuple(tensors[name].shape)
        begin, end = end, end + torch.Size(shape).numel() * kind.itemsize
        header[name] = {"dtype": CODES[kind], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(_bytes_of(tensors[name]))


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is looked up.

    What has been read stays mapped, and counts as memory of the process, as long as the file is open; so it is opened
    anew after every 64 MB.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._mapped = path, 0
        self._file: Any = safe_open(path, framework="pt")
        self._names = list(self._file.keys())

    def close(self) -> None:
        """Close the file; no tensor can be read any more."""
        self._file = None

    @property
    def facts(self) -> Any:
        """The plain facts beside the tensors."""
        return from_json(self._file.metadata()[FACTS])

    def __getitem__(self, name: str) -> Tensor:
        if self._mapped >= MAPPED:
            with suppress(FileNotFoundError):  # removed since: what is open stays readable
                self._file, self._mapped = safe_open(self.path, framework="pt"), 0
        found: Tensor = self._file.get_tensor(name)
        self._mapped += found.nbytes
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_tensors(path: Path, digest: object = None) -> tuple[dict[str, Tensor], Any]:
    """Return (tensors, facts) of a file written by `save_tensors`.

    Raises: OSError or ValueError if it cannot be read, or does not match the digest, where one is given.
    """
    with open_tensors(path, digest) as (file, facts):
        return dict(file), facts


@contextmanager
def open_tensors(path: Path, digest: object = None) -> Iterator[tuple[TensorFile, Any]]:
    """Yield (the file, its facts), to read one tensor after the other.

    Raises: OSError or ValueError as `load_tensors` does.
    """
    check_digest(path, digest)
    try:
        with closing(TensorFile(path)) as file:
            yield file, file.facts
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error


def _bytes_of(tensor: Tensor | LazyTensor) -> memoryview:
    plain = (tensor.make() if isinstance(tensor, LazyTensor) else tensor).detach().cpu().contiguous()
    return memoryview(cast(Any, plain.reshape(-1).view(torch.uint8).numpy()))
