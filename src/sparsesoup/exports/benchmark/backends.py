"""Benchmark backends: torch in several modes, ONNX Runtime, OpenVINO; and the FLOPs and the parts of a model's work."""

import copy
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from sparsesoup.core.errors import UserError
from sparsesoup.exports.graphs import trace_model
from sparsesoup.exports.runtimes import InferenceFunction, open_onnx, open_openvino, require_library
from sparsesoup.hub.models.dummy_inputs import forward_outputs
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.training.cost import CountFlops, is_counted_op

BLOCK = 32  # side of a stored block of BSR
Kind = Literal["csr", "bsr"]  # stored are the nonzero values, or the 32 x 32 blocks with any
Batch = Mapping[str, Tensor]
BoundModel = Callable[[], list[Tensor]]  # runs the model on its fixed batch
Prepare = Callable[[Any, Batch, Path], BoundModel]


@torch.no_grad()
def forward_flops(model: Any, batch: Mapping[str, Tensor]) -> int:
    """Return the FLOPs of a forward pass, counted as in training: zeros are multiplied too."""
    with CountFlops() as count:
        forward_outputs(model, batch)
    return count.flops


def sparse_flops(model: Any, kind: Kind, batch: Mapping[str, Tensor]) -> int:
    """Return the FLOPs of a forward pass in which linear layers multiply only their stored values."""
    stored = {model.get_submodule(path): count for path, count in nonzeros_by_layer(model, kind).items()}
    saved = []

    def count_saved(module: Any, given: Any) -> None:
        if module in stored:
            rows, weight = given[0].numel() // module.in_features, module.weight
            saved.append(2 * rows * (weight.numel() - stored[module]))

    with register_module_forward_pre_hook(count_saved):
        return forward_flops(model, batch) - sum(saved)


class OpTimer(TorchDispatchMode):
    """Time the operations in the block: products (matrix products, attention, convolutions), and all others."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = {"products": 0.0, "others": 0.0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        began = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        self.seconds["products" if is_counted_op(func.overloadpacket) else "others"] += time.perf_counter() - began
        return out


@torch.no_grad()
def profile_model(model: Any, batch: Mapping[str, Tensor], passes: int = 3) -> dict[str, float]:
    """Return the seconds of a forward pass in `products`, which FLOPs count, and in `others`: medians of several."""
    forward_outputs(model, batch)
    timers = [OpTimer() for _ in range(passes)]
    for timer in timers:
        with timer:
            forward_outputs(model, batch)
    return {key: statistics.median(timer.seconds[key] for timer in timers) for key in timers[0].seconds}


class SparseLinear(nn.Module):
    """A linear layer with its weight [out, in] in CSR or BSR."""

    def __init__(self, linear: nn.Linear, kind: Kind) -> None:
        super().__init__()
        weight = linear.weight.detach()
        with warnings.catch_warnings(action="ignore"):  # torch warns that its sparse kernels are in beta
            self.weight = weight.to_sparse_csr() if kind == "csr" else weight.to_sparse_bsr((BLOCK, BLOCK))
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        # The sparse factor is on the left: torch's own order, with it on the right, is slower.
        found = (self.weight @ x.reshape(-1, x.shape[-1]).t()).t()
        return (found if self.bias is None else found + self.bias).reshape(*x.shape[:-1], -1)


def stored_values(weight: Tensor, kind: Kind) -> int:
    """Return the number of values that the sparse form of a weight [out, in] stores; all if it has no such form."""
    if kind == "csr":
        return int(torch.count_nonzero(weight))
    rows, columns = weight.shape
    if rows % BLOCK or columns % BLOCK:
        return weight.numel()
    blocks = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK).abs().amax(dim=(1, 3))
    return int(torch.count_nonzero(blocks)) * BLOCK * BLOCK


def nonzeros_by_layer(model: Any, kind: Kind) -> dict[str, int]:
    """Return prunable linear layer -> number of stored values, for layers with any zeros to leave out."""
    found = {}
    for target in find_prunable(model):
        path, _, own = target.rpartition(".")
        linear = model.get_submodule(path)
        if own != "weight" or not isinstance(linear, nn.Linear):
            continue  # such as a Conv1D of GPT-2, or a stack of experts
        if (count := stored_values(linear.weight.detach(), kind)) < linear.weight.numel():
            found[path] = count
    if not found:
        raise UserError(f"no nn.Linear has {'zeros' if kind == 'csr' else f'a {BLOCK} x {BLOCK} block of zeros'}")
    return found


def sparse_model(model: Any, kind: Kind) -> Any:
    """Return a copy whose prunable linear layers are stored sparsely."""
    made = copy.deepcopy(model)
    for name in nonzeros_by_layer(model, kind):
        made.set_submodule(name, SparseLinear(made.get_submodule(name), kind))
    return made


@dataclass(frozen=True)
class SpeedBackend:
    """A backend to run a model on."""

    label: str  # name in tables
    # (model, batch, folder for temporary files) -> callable that runs it on as many threads as torch has; raises a
    # one-line error
    ready: Prepare
    zeros: bool = False  # True to also time the model with its zeros in place if they could be cut out
    reads: tuple[str, ...] = ()  # extensions of files that it accepts instead of a model
    dense: str = ""  # the backend for the dense model, if it is another one


def _torch_eager(model: Any, batch: Batch, folder: Path) -> BoundModel:
    return lambda: forward_outputs(model, batch)


def _torch_compiled(model: Any, batch: Batch, folder: Path) -> BoundModel:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(f"there is no C++ compiler ({compiler}), which torch.compile needs on a CPU")
    # Compiler warnings are about torch's own code. All models share theirs: torch would leave the ninth uncompiled.
    with warnings.catch_warnings(action="ignore"), torch._dynamo.config.patch(recompile_limit=64):
        made = torch.compile(model, dynamic=False)
        forward_outputs(made, batch)
    return lambda: forward_outputs(made, batch)


def _torch_sparse(kind: Kind) -> Prepare:
    return lambda model, batch, folder: _torch_eager(sparse_model(model, kind), batch, folder)


def _graph_engine(open_file: Callable[[Path, int], InferenceFunction]) -> Prepare:
    def ready(model: Any, batch: Batch, folder: Path) -> BoundModel:
        path = model if isinstance(model, Path) else folder / f"{id(model)}.onnx"
        if not path.exists():
            for name in ("onnx", "onnxscript"):
                require_library(name)
            trace_model(model, [*batch]).save(path)
        infer, arrays = open_file(path, torch.get_num_threads()), {name: t.numpy() for name, t in batch.items()}
        return lambda: [torch.from_numpy(array) for array in infer(arrays).values()]

    return ready


BACKENDS = {
    "torch": SpeedBackend("torch", _torch_eager, zeros=True),
    "compile": SpeedBackend("torch.compile", _torch_compiled),
    "csr": SpeedBackend("torch CSR", _torch_sparse("csr"), zeros=True, dense="torch"),
    "bsr": SpeedBackend("torch BSR", _torch_sparse("bsr"), zeros=True, dense="torch"),
    "onnxruntime": SpeedBackend("ONNX Runtime", _graph_engine(open_onnx), reads=(".onnx",)),
    "openvino": SpeedBackend("OpenVINO", _graph_engine(open_openvino), reads=(".xml", ".onnx")),
}
