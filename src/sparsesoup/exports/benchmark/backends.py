"""What models are measured on: torch in several ways, ONNX Runtime, OpenVINO."""

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
from sparsesoup.exports.benchmark.sparse_linear import Kind, sparse_model
from sparsesoup.exports.onnx import trace
from sparsesoup.exports.runtimes import Asked, library, open_onnx, open_openvino
from sparsesoup.hub.models.dummy_inputs import answers

Answer = Callable[[], list[Tensor]]  # answers the one batch that it was made for


@dataclass(frozen=True)
class Place:
    """What a model is made ready for.

    Args:
        batch: the inputs, the same each time.
        threads: how many may be used.
        folder: where files may be put.
    """

    batch: Mapping[str, Tensor]
    threads: int
    folder: Path


@dataclass(frozen=True)
class Backend:
    """A way to run a model.

    Args:
        label: what it is called in tables.
        ready: (model, place) -> what answers; raises whatever is wrong, in one line.
        zeros: whether it is given the model with its zeros in place even where they could be cut out.
        reads: endings of the files that it can be given instead of a model.
        dense: the backend that the dense model is measured on, where it is another one.
    """

    label: str
    ready: Callable[[Any, Place], Answer]
    zeros: bool = False
    reads: tuple[str, ...] = ()
    dense: str = ""


def _eager(model: Any, place: Place) -> Answer:
    return lambda: answers(model, place.batch)


def _compiled(model: Any, place: Place) -> Answer:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(f"there is no C++ compiler ({compiler}), which torch.compile needs on a CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, on torch's own code
        made = torch.compile(model, dynamic=False)
        # All models have the same code, of which torch would leave the ninth uncompiled without a word.
        with torch._dynamo.config.patch(recompile_limit=64):
            answers(made, place.batch)
    return lambda: answers(made, place.batch)


def _sparse(kind: Kind) -> Callable[[Any, Place], Answer]:
    return lambda model, place: _eager(sparse_model(model, kind), place)


def _engine(open_file: Callable[[Path, int], Asked]) -> Callable[[Any, Place], Answer]:
    def ready(model: Any, place: Place) -> Answer:
        path = model if isinstance(model, Path) else place.folder / f"{id(model)}.onnx"
        if not path.exists():
            for name in ("onnx", "onnxscript"):
                library(name)
            trace(model, [*place.batch]).save(path)
        ask, arrays = open_file(path, place.threads), {name: t.numpy() for name, t in place.batch.items()}
        return lambda: [torch.from_numpy(array) for array in ask(arrays).values()]

    return ready


BACKENDS = {
    "torch": Backend("torch", _eager, zeros=True),
    "compile": Backend("torch.compile", _compiled),
    "csr": Backend("torch CSR", _sparse("csr"), zeros=True, dense="torch"),
    "bsr": Backend("torch BSR", _sparse("bsr"), zeros=True, dense="torch"),
    "onnxruntime": Backend("ONNX Runtime", _engine(open_onnx), reads=(".onnx",)),
    "openvino": Backend("OpenVINO", _engine(open_openvino), reads=(".xml", ".onnx")),
}
