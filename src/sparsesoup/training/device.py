"""The device that this process and those it starts train on, and what arithmetic it has."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from accelerate.state import AcceleratorState, PartialState, is_initialized

from sparsesoup.core.errors import UserError, list_names

AMPERE = (8, 0)  # compute capability from which on a CUDA device has bf16 and TF32
VARIABLE = "ACCELERATE_TORCH_DEVICE"  # accelerate reads it; processes that this one starts inherit it


def choose_device(name: str) -> torch.device:
    """Make a device that of all later runs of this process: cpu, cuda, cuda:<number> or mps.

    Without a call accelerate chooses: the first accelerator of the machine, else the CPU.

    Raises: UserError if the machine does not have it.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    check_device(name)
    device = torch.device(name)
    os.environ[VARIABLE] = name
    AcceleratorState._reset_state(reset_partial_state=True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextmanager
def device_chosen(name: str | None) -> Iterator[None]:
    """Make a device that of the runs in this block; None leaves the choice as it is."""
    if name is None:
        yield
        return
    before = os.environ.get(VARIABLE)
    choose_device(name)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        os.environ |= {} if before is None else {VARIABLE: before}
        AcceleratorState._reset_state(reset_partial_state=True)


def current_device() -> torch.device:
    """Return the device that runs use: the one chosen, else the first accelerator, else the CPU.

    >>> with device_chosen("cpu"):
    ...     current_device()
    device(type='cpu')
    """
    if is_initialized():
        return torch.device(PartialState().device)
    if name := os.environ.get(VARIABLE):
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def default_precision(device: torch.device) -> Literal["no", "bf16"]:
    """Return bf16 for a CUDA device that has it, else no."""
    return "bf16" if device.type == "cuda" and _has_ampere(device) else "no"


def check_precision(device: torch.device, precision: str, tf32: bool) -> None:
    """Raise a UserError if the device lacks a precision."""
    cuda = device.type == "cuda"
    if precision == "fp16" and not cuda:
        raise UserError(f"fp16 needs a CUDA device, and runs are on {device}; use bf16 or no", "train.precision")
    if precision == "bf16" and cuda and not _has_ampere(device):
        raise UserError(f"{device} has no bf16 arithmetic; use fp16 or no", "train.precision")
    if tf32 and not (cuda and _has_ampere(device)):
        raise UserError(f"{device} has no TF32; leave it out", "train.tf32")


def _has_ampere(device: torch.device) -> bool:
    if torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= AMPERE


def check_device(name: str) -> None:
    """Raise a UserError unless the machine has the device."""
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name):
        raise UserError(f"must be cpu, cuda, cuda:<number> or mps, got {name!r}", "device")
    present = devices_present()
    if name not in present and not (name == "cuda" and "cuda:0" in present):
        raise UserError(
            f"torch {torch.__version__} finds no {name} here, but {list_names(present)}; choose one of these",
            "device",
        )


def devices_present() -> list[str]:
    """Return the names of the devices that torch can use here, the CPU first."""
    found = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    return [*found, "mps"] if torch.backends.mps.is_available() else found
