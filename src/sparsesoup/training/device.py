"""The device that this process and those it starts train on."""

import os
import re

import torch
from accelerate.state import AcceleratorState

from sparsesoup.core.errors import UserError, list_names

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
