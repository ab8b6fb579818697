"""Inference engines of exports, ONNX Runtime and OpenVINO, imported lazily."""

import importlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.exports.subprocess_runner import Arrays, onnx_runner, openvino_runner

EXTRAS = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "openvino"}  # library -> our extra
ONNX_FILE, OPENVINO_FILE = "model.onnx", "model.xml"
# On a CPU with bf16, OpenVINO would round to it by default.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
# How OpenVINO's errors begin: places in its sources.
NO_NEWS = re.compile(
    r"Exception from \S+:$|Check '.*' failed at \S+:$|FrontEnd API failed with|Model wasn't fully|Summary:$"
)
InferenceFunction = Callable[[Arrays], Arrays]  # inputs by name -> outputs by name


def require_library(name: str) -> Any:
    """Import an optional library."""
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


def open_onnx(path: Path, threads: int = 0) -> InferenceFunction:
    """Load an ONNX file on the CPU, for so many threads at most; 0 leaves it to the engine."""
    runtime = require_library("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # its messages are raised as errors anyway, and reported in one line
    options.intra_op_num_threads = threads
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base class below Exception
        raise UserError(f"ONNX Runtime cannot read {path}: {first_error_line(error)}") from error
    run = onnx_runner(session)

    def infer(batch: Arrays) -> Arrays:
        try:
            return run(batch)
        except Exception as error:
            raise UserError(
                f"ONNX Runtime cannot run the graph: {first_error_line(error)}; one of --to onnx --opset 22 may do"
            ) from error

    return infer


def open_openvino(path: Path, threads: int = 0) -> InferenceFunction:
    """Load an .xml file of OpenVINO, or an ONNX file, on the CPU in float32, for so many threads at most."""
    options: dict[str, Any] = {**EXACT, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    with readable_by_openvino(str(path)):
        return openvino_runner(require_library("openvino").Core().compile_model(str(path), "CPU", options))


@contextmanager
def readable_by_openvino(what: str, remedy: str = "") -> Iterator[None]:
    """Raise a UserError in the place of an error of OpenVINO, whose text is a list of checks in its sources."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"OpenVINO cannot read {what}: {first_error_line(error)}{remedy}") from error


def first_error_line(error: BaseException) -> str:
    """Return the first informative line of an error, cut to terminal length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not NO_NEWS.match(line)] or lines
    return re.sub(r"\s+", " ", (lines or [type(error).__name__])[0])[:200]
