"""The engines that run exports, ONNX Runtime and OpenVINO: imported when they are asked for, and never before."""

import contextlib
import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsesoup.core.errors import UserError

EXTRAS = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "openvino"}  # library -> our extra
ONNX_FILE, OPENVINO_FILE = "model.onnx", "model.xml"
# On a CPU that has bf16, OpenVINO would round to it unasked.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
Asked = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]  # inputs by name -> outputs by name


def require_library(name: str) -> Any:
    """An optional library.

    Raises: UserError naming the extra to install if it is missing.
    """
    try:
        with _in_private():
            return importlib.import_module(name)
    except ImportError as error:
        extra = EXTRAS[name]
        raise UserError(f"{name} is not installed, which this needs: pip install 'sparsesoup[{extra}]'") from error


@contextlib.contextmanager
def _in_private() -> Iterator[None]:
    """OpenVINO reports each import to its makers unless told not to; in an automatic test it does not."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before


def open_onnx(path: Path, threads: int = 0) -> Asked:
    """An ONNX file, ready to be asked on the CPU.

    Args:
        path: of the file.
        threads: how many it may use; 0 leaves that to the engine.
    Raises: UserError if ONNX Runtime is missing, or cannot read the file.
    """
    runtime = require_library("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what it has to say comes as an error, told in one line
    options.intra_op_num_threads = threads
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class below Exception
        raise UserError(f"ONNX Runtime cannot read {path}: {first_error_line(error)}") from error
    inputs, outputs = [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]

    def ask(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            found = session.run(outputs, {name: batch[name] for name in inputs})
        except Exception as error:
            raise UserError(
                f"ONNX Runtime cannot run the graph: {first_error_line(error)}; one of --to onnx --opset 22 may do"
            ) from error
        return dict(zip(outputs, found, strict=True))

    return ask


def open_openvino(path: Path, threads: int = 0) -> Asked:
    """An OpenVINO model (or an ONNX file), ready to be asked on the CPU in float32.

    Args:
        path: of the .xml file, or of an .onnx file.
        threads: how many it may use; 0 leaves that to the engine.
    Raises: UserError if OpenVINO is missing, or cannot read the file.
    """
    core = require_library("openvino").Core()
    options: dict[str, Any] = {**EXACT, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        model = core.compile_model(str(path), "CPU", options)
    except RuntimeError as error:
        raise UserError(f"OpenVINO cannot read {path}: {first_error_line(error)}") from error
    inputs, outputs = [i.any_name for i in model.inputs], [o.any_name for o in model.outputs]

    def ask(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = model({name: batch[name] for name in inputs})
        return {name: found[i] for i, name in enumerate(outputs)}

    return ask


def first_error_line(error: BaseException) -> str:
    """The first telling line of an error, cut to what a terminal shows."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"\s+", " ", (lines or [type(error).__name__])[0])[:200]
