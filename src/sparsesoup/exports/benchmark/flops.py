"""FLOPs needed by models, and a profile of their run time."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsesoup.exports.benchmark.sparse_linear import Kind, nonzeros_by_layer
from sparsesoup.hub.models.dummy_inputs import forward_outputs
from sparsesoup.training.cost import CountFlops, is_counted_op


@torch.no_grad()
def forward_flops(model: Any, batch: Mapping[str, Tensor]) -> int:
    """Return the FLOPs of a forward pass, counted as in training: zeros are multiplied too."""
    with CountFlops() as count:
        forward_outputs(model, batch)
    return count.flops


@torch.no_grad()
def sparse_flops(model: Any, kind: Kind, batch: Mapping[str, Tensor]) -> int:
    """Return the FLOPs of a forward pass in which linear layers multiply only their stored values.

    Raises: UserError if no linear layer has a sparse form.
    """
    saved = 0

    def see(linear: nn.Linear, given: tuple[Tensor, ...], count: int) -> None:
        nonlocal saved
        rows = given[0].numel() // linear.in_features
        saved += 2 * rows * (linear.weight.numel() - count)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, given, count=count: see(m, given, count))
        for name, count in nonzeros_by_layer(model, kind).items()
    ]
    try:
        return forward_flops(model, batch) - saved
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class TimeProfile:
    """Time of a forward pass in torch, by kind of operation.

    Args:
        products: seconds in operations that FLOPs count: matrix products, attention, convolutions.
        others: seconds in the rest: norms, activations, look-ups, copies.
    """

    products: float
    others: float


class OpTimer(TorchDispatchMode):
    """Time every operation in the block, separately for those that FLOPs count and all others."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.others = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        began = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - began
        if is_counted_op(func.overloadpacket):
            self.products += seconds
        else:
            self.others += seconds
        return out


@torch.no_grad()
def profile_model(model: Any, batch: Mapping[str, Tensor], passes: int = 3) -> TimeProfile:
    """Profile a forward pass: medians of several."""
    forward_outputs(model, batch)
    clocks = [OpTimer() for _ in range(passes)]
    for clock in clocks:
        with clock:
            forward_outputs(model, batch)
    return TimeProfile(*(statistics.median(getattr(c, key) for c in clocks) for key in ("products", "others")))
