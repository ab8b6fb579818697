"""OpenVINO export, for Intel's engine, without torch or sparsesoup."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsesoup.exports.base import PreparedExport
from sparsesoup.exports.onnx import CLOSE, compare_outputs, copy_config, example_code, graph_inputs, trace_model
from sparsesoup.exports.runtimes import EXACT, ONNX_FILE, OPENVINO_FILE, open_openvino, require_library
from sparsesoup.exports.shrink import shrink_if_possible
from sparsesoup.exports.source import PrunedSource, size_of

CLOSE_IN_HALF = 1e-2


@dataclass(frozen=True, kw_only=True)
class OpenVinoFormat:
    """OpenVINO's .xml and .bin for any number of texts of any length, cut down as in `compact`.

    Args:
        fp16: store weights in half precision; they are still computed in float32.
    """

    fp16: bool = False

    def make(self, source: PrunedSource) -> PreparedExport:
        """Return the graph in memory; once written, its outputs in OpenVINO are compared with torch."""
        engine = require_library("openvino")
        for name in ("onnx", "onnxscript"):
            require_library(name)
        small = shrink_if_possible(source)
        names = graph_inputs(small.model, source.folder)
        program = trace_model(small.model, names)

        def save(folder: Path) -> dict[str, Any]:
            copy_config(small.model, source, folder)
            with tempfile.TemporaryDirectory() as place:
                program.save(Path(place) / ONNX_FILE)
                graph = engine.Core().read_model(Path(place) / ONNX_FILE)
                engine.save_model(graph, folder / OPENVINO_FILE, compress_to_fp16=self.fp16)
            close = CLOSE_IN_HALF if self.fp16 else CLOSE
            return {
                "largest_difference": compare_outputs(small.model, names, open_openvino(folder / OPENVINO_FILE), close)
            }

        load = f'openvino.Core().compile_model("{OPENVINO_FILE}", "CPU", {EXACT})'
        lines = (
            "import openvino",
            f"model = {load}",
            "answers = model({i.any_name: batch[i.any_name] for i in model.inputs})",
        )
        notes = [*small.notes, "a CPU with bf16 computes in that unless float32 is asked for, as `load` does"]
        if self.fp16:
            notes.append("its weights are rounded to float16: check predictions against the source")
        return PreparedExport(
            save=save,
            size=size_of(small.model.named_parameters(), 0),
            layers=small.layers,
            load=load,
            notes=(*notes,),
            facts={"inputs": names, "example": example_code(small.model, names, source.folder, lines)},
        )
