"""Inference engines of exports, ONNX Runtime and OpenVINO, imported lazily."""

import importlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsesoup.core.errors import UserError

EXTRAS = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "openvino"}  # library -> our extra
ONNX_FILE, OPENVINO_FILE = "model.onnx", "model.xml"
# On a CPU with bf16, OpenVINO would round to it by default.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
Asked = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]  # inputs by name -> outputs by name


def require_library(name: str) -> Any:
    """Import an optional library.

    Raises: UserError naming the extra to install if it is missing.
    """
    before = os.environ.get("CI")
    os.environ["CI"] = "true"  # disables OpenVINO's telemetry, as in automatic tests
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = EXTRAS[name]
        raise UserError(f"{name} is not installed, which this needs: pip install 'sparsesoup[{extra}]'") from error
    finally:
        os.environ.pop("CI")
        if before is not None:
            os.environ["CI"] = before


def open_onnx(path: Path, threads: int = 0) -> Asked:
    """Load an ONNX file on the CPU.

    Args:
        path: path of the file.
        threads: maximum number of threads; 0 leaves it to the engine.
    Raises: UserError if ONNX Runtime is missing, or cannot read the file.
    """
    runtime = require_library("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # its messages are raised as errors anyway, and reported in one line
    options.intra_op_num_threads = threads
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base class below Exception
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
    """Load an OpenVINO model (or an ONNX file) on the CPU, in float32.

    Args:
        path: path of the .xml file, or of an .onnx file.
        threads: maximum number of threads; 0 leaves it to the engine.
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
    """Return the first informative line of an error, cut to terminal length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"\s+", " ", (lines or [type(error).__name__])[0])[:200]
