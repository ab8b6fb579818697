"""One seed, many named streams: every random choice of a run is a function of the seed and of what it is for."""

import functools
import hashlib

import torch


def derive_seed(seed: int, *path: object) -> int:
    """A 63-bit number that is a function of seed and path (SHA-256 of both).

    >>> derive_seed(0, "order", 3) == derive_seed(0, "order", 3) != derive_seed(0, "order", 4)
    True
    """
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def cpu_generator(seed: int, *path: object) -> torch.Generator:
    """A CPU generator of its own for one purpose; drawing from it disturbs no other stream."""
    return torch.Generator().manual_seed(derive_seed(seed, *path))


def seed_everything(number: int) -> None:
    """What `torch.manual_seed` does, but nothing for accelerators where there are none.

    It would note for each kind of them from where it was called: three stack traces at every step.
    """
    if _has_accelerator():
        torch.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


@functools.cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()
