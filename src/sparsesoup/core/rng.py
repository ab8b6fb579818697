"""Named random streams: every random choice of a run is a function of the seed and its purpose."""

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


def devices_of(tensors: Iterable[Tensor]) -> set[torch.device]:
    """Return the devices of tensors that have random states of their own."""
    return {t.device for t in tensors if t.device.type not in ("cpu", "meta")}


def seed_everything(number: int, devices: Iterable[torch.device] = ()) -> None:
    """Seed the CPU and these devices as `torch.manual_seed` does, but no other device of the machine.

    torch.manual_seed would also record a stack trace for each kind of accelerator: three at every step.
    """
    torch.default_generator.manual_seed(number)
    for device in devices:
        if device.type == "mps":  # it has no device numbers
            torch.mps.manual_seed(number)
        else:
            getattr(torch, device.type).default_generators[device.index].manual_seed(number)


@contextmanager
def fork_rng_of(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the random state afterwards, of the CPU and of the devices of these tensors only.

    `torch.random.fork_rng` alone would start every accelerator of the machine.
    """
    devices = {device for device in devices_of(tensors) if device.type != "mps"}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(devices=devices, device_type=kind):
        yield
