"""Files of tensors and facts: written whole or not at all, and read as they were written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsesoup.core.files import atomic_write, check_digest, digest_of, from_json

FACTS = "facts"  # metadata of the safetensors file: the plain facts as JSON


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Any = None) -> str:
    """Write tensors and plain facts into a safetensors file; return its digest."""
    with atomic_write(path) as temporary:
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(plain, temporary, metadata={FACTS: json.dumps(facts)})
        return digest_of(temporary)


def load_tensors(path: Path, digest: object = None) -> tuple[dict[str, Tensor], Any]:
    """Return (tensors, facts) of a file written by `save_tensors`.

    Raises: OSError or ValueError if it cannot be read, or does not match the digest, where one is given.
    """
    check_digest(path, digest)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}, from_json(file.metadata()[FACTS])
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error
