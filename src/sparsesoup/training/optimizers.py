"""Optimizers by name: those of torch, and 8-bit ones of bitsandbytes, which is imported only if one is used."""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from sparsesoup.core.errors import UserError

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "adam": functools.partial(torch.optim.Adam, fused=True),
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
    "rmsprop": functools.partial(torch.optim.RMSprop, momentum=0.9),
    "nadam": functools.partial(torch.optim.NAdam, decoupled_weight_decay=True),
    "radam": functools.partial(torch.optim.RAdam, decoupled_weight_decay=True),
    "adafactor": torch.optim.Adafactor,
}
BITSANDBYTES = {"adamw_bnb_8bit": "AdamW8bit", "lion_8bit": "Lion8bit"}  # as transformers calls them -> class


def make_optimizer(name: str, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimizer of a name for groups of parameters, with learning rate 0.

    Raises: UserError if its library is missing.
    """
    if name in BITSANDBYTES:
        check_optimizer_library(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its imports warn of torch's own deprecations
            library = importlib.import_module("bitsandbytes.optim")
        return getattr(library, BITSANDBYTES[name])([*groups], lr=0.0)
    return OPTIMIZERS[name]([*groups], lr=0.0)


def check_optimizer_library(name: str) -> None:
    """Raise a UserError if the library of an optimizer is missing."""
    if name in BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{name} needs bitsandbytes, which is not installed; pip install 'sparsesoup[optimizers]', or use adamw",
            "train.optimizer",
        )
