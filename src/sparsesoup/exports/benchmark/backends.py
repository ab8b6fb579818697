"""Benchmark backends: torch in several modes, ONNX Runtime, OpenVINO."""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.exports.benchmark.flops import Kind, sparse_model
from sparsesoup.exports.graphs import trace_model
from sparsesoup.exports.runtimes import Asked, open_onnx, open_openvino, require_library
from sparsesoup.hub.models.dummy_inputs import forward_outputs

Batch = Mapping[str, Tensor]
BoundModel = Callable[[], list[Tensor]]  # runs the model on its fixed batch
Prepare = Callable[[Any, Batch, Path], BoundModel]


@dataclass(frozen=True)
class SpeedBackend:
    """A backend to run a model on.

    Args:
        label: name in tables.
        ready: (model, batch, folder for temporary files) -> callable that runs it on as many threads as torch has;
            raises a one-line error.
        zeros: True to also time the model with its zeros in place if they could be cut out.
        reads: extensions of files that it accepts instead of a model.
        dense: the backend for the dense model, if it is another one.
    """

    label: str
    ready: Prepare
    zeros: bool = False
    reads: tuple[str, ...] = ()
    dense: str = ""


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


def _graph_engine(open_file: Callable[[Path, int], Asked]) -> Prepare:
    def ready(model: Any, batch: Batch, folder: Path) -> BoundModel:
        path = model if isinstance(model, Path) else folder / f"{id(model)}.onnx"
        if not path.exists():
            for name in ("onnx", "onnxscript"):
                require_library(name)
            trace_model(model, [*batch]).save(path)
        ask, arrays = open_file(path, torch.get_num_threads()), {name: t.numpy() for name, t in batch.items()}
        return lambda: [torch.from_numpy(array) for array in ask(arrays).values()]

    return ready


BACKENDS = {
    "torch": SpeedBackend("torch", _torch_eager, zeros=True),
    "compile": SpeedBackend("torch.compile", _torch_compiled),
    "csr": SpeedBackend("torch CSR", _torch_sparse("csr"), zeros=True, dense="torch"),
    "bsr": SpeedBackend("torch BSR", _torch_sparse("bsr"), zeros=True, dense="torch"),
    "onnxruntime": SpeedBackend("ONNX Runtime", _graph_engine(open_onnx), reads=(".onnx",)),
    "openvino": SpeedBackend("OpenVINO", _graph_engine(open_openvino), reads=(".xml", ".onnx")),
}
