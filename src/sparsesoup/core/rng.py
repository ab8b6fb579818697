"""Named random streams: every random choice of a run is a function of the seed and its purpose."""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def derive_seed(seed: int, *path: object) -> int:
    """Return a 63-bit number derived from seed and path (SHA-256 of both).

    >>> derive_seed(0, "order", 3) == derive_seed(0, "order", 3) != derive_seed(0, "order", 4)
    True
    """
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def cpu_generator(seed: int, *path: object) -> torch.Generator:
    """Return a separate CPU generator for one purpose; drawing from it affects no other stream."""
    return torch.Generator().manual_seed(derive_seed(seed, *path))


def seed_everything(number: int) -> None:
    """Seed torch as `torch.manual_seed` does, but skip accelerators that are not there.

    torch.manual_seed would record a stack trace for each kind of accelerator: three at every step.
    """
    if _has_accelerator():
        torch.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


@contextmanager
def fork_rng_of(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the random state afterwards, of the CPU and of the devices of these tensors only.

    `torch.random.fork_rng` alone would start every accelerator of the machine.
    """
    devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta", "mps")}  # mps has no device numbers
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(devices=devices, device_type=kind):
        yield


@functools.cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()
