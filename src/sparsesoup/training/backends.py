"""Settings of a training as those of accelerate, torch and the model."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from sparsesoup.core.errors import UserError
from sparsesoup.training.config import TrainingConfig

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_determinism = {"set": False}  # whether a training of this process has set it


def make_accelerator(training: TrainingConfig) -> Accelerator:
    """Return accelerate's view of this machine, and set how torch computes there: TF32, determinism.

    Raises: UserError if the device lacks the precision, or if the process is one of several that train together.
    """
    training.check_device()
    precision = training.mixed_precision
    try:
        accelerator = Accelerator(mixed_precision=precision)
    except ValueError:  # accelerate was set up with another precision
        AcceleratorState._reset_state()
        accelerator = Accelerator(mixed_precision=precision)
    if accelerator.num_processes > 1:
        raise UserError(f"training runs in one process, was launched in {accelerator.num_processes}; use 1")
    if accelerator.device.type != "cpu":  # on a CPU the same threads compute the same bits anyway
        _set_determinism(training.full_determinism)
    if accelerator.device.type == "cuda":
        allowed = "tf32" if training.tf32 else "ieee"
        torch.backends.cuda.matmul.fp32_precision = allowed
        torch.backends.cudnn.conv.fp32_precision = allowed  # type: ignore[attr-defined]
    return accelerator


def _set_determinism(on: bool) -> None:
    """Set all that torch offers for equal bits; if off, take back what an earlier training set, and nothing else."""
    if on:
        os.environ.setdefault(WORKSPACE, ":4096:8")  # read when cuBLAS starts; processes started here inherit it
    if on != _determinism["set"]:
        torch.use_deterministic_algorithms(on)
        torch.backends.cudnn.deterministic = on
        _determinism["set"] = on
    if on:
        torch.backends.cudnn.benchmark = False


def checkpoint_gradients_(model: nn.Module) -> None:
    """Keep only the inputs of blocks for the backward pass, and compute the rest again. Chen et al. 2016.

    Raises: UserError if the model cannot.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"{type(model).__name__} has no gradient checkpointing, as models of transformers have; leave it out",
            "train.gradient_checkpointing",
        )
    kind = _name_of_checkpointing(model)
    enable: Any = getattr(model, f"{kind}_checkpointing_enable")
    enable(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})


@contextmanager
def gradients_checkpointed(model: Any, on: bool) -> Iterator[None]:
    """Recompute the blocks of a model in the backward pass within this block, as with gradient checkpointing."""
    if not on:
        yield
        return
    training = model.training
    checkpoint_gradients_(model)
    model.train()  # in eval mode nothing is computed again
    try:
        yield
    finally:
        getattr(model, f"{_name_of_checkpointing(model)}_checkpointing_disable")()
        model.train(training)


def _name_of_checkpointing(model: Any) -> str:
    # Older versions of transformers know the second name alone.
    return "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"


def compile_(model: nn.Module) -> None:
    """Compile the forward and backward pass of a model in place, so that its parameters keep their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the compiler's imports use what torch itself deprecates
        model.compile()
