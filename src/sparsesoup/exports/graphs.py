"""ONNX and OpenVINO exports: graphs for other engines, which need neither torch nor sparsesoup."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsesoup.core.errors import UserError, require
from sparsesoup.exports.compact import shrink_if_possible
from sparsesoup.exports.runtimes import (
    EXACT,
    ONNX_FILE,
    OPENVINO_FILE,
    InferenceFunction,
    first_error_line,
    open_onnx,
    open_openvino,
    readable_by_openvino,
    require_library,
)
from sparsesoup.exports.source import PreparedExport, PrunedSource, forget_masks, largest_difference, size_of
from sparsesoup.hub.models.checkpoint import load_tokenizer
from sparsesoup.hub.models.dummy_inputs import dummy_inputs, forward_outputs
from sparsesoup.hub.models.loading import COMPACT, LOW_RANK
from sparsesoup.hub.quiet import quiet_libraries

OPSETS = range(18, 24)  # supported by both torch's exporter and ONNX Runtime
TURNED = 22  # the last one without a rotary embedding operator, which ONNX Runtime refuses as torch writes it
LARGE = 1_500_000_000  # bytes of weights above which they are stored beside the file: protobuf's limit is 2 GiB
CLOSE = 1e-3  # largest difference from torch's outputs, as a share of the largest; rounding gives 1e-6
CLOSE_IN_HALF = 1e-2
SHAPES = ((1, 4), (2, 8), (3, 13), (5, 9))  # rows and tokens of the random inputs to compare
AXES = {"pixel_values": ("images",)}  # dynamic axes; all other inputs have batch and length


@dataclass(frozen=True, kw_only=True)
class OnnxFormat:
    """An ONNX file for any number of texts of any length (images: any number), cut down as in `compact`.

    Args:
        opset: ONNX opset version; 23 has an attention operator, which is faster; older engines need 18. 0: 23, or 22
            for a model with rotary positions (Llama, ModernBERT).
    """

    opset: int = 0

    def __post_init__(self) -> None:
        require(self.opset in (0, *OPSETS), "opset", f"{OPSETS[0]} to {OPSETS[-1]}", self.opset)

    def make(self, source: PrunedSource) -> PreparedExport:
        """Return the graph in memory; once written, its outputs in ONNX Runtime are compared with torch."""
        require_library("onnxruntime")
        graph = trace_source(source, self.opset)

        def write(folder: Path) -> float:
            large = sum(4 * p.numel() for p in graph.model.parameters()) > LARGE
            graph.program.save(folder / ONNX_FILE, external_data=large)
            return compare_outputs(graph.model, graph.inputs, open_onnx(folder / ONNX_FILE), CLOSE)

        load = f'onnxruntime.InferenceSession("{ONNX_FILE}")'
        lines = [
            "from onnxruntime import InferenceSession",
            f'session = InferenceSession("{ONNX_FILE}")',
            "answers = session.run(None, {i.name: batch[i.name] for i in session.get_inputs()})",
        ]
        return _prepare_graph(source, graph, write, load, lines)


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
        graph = trace_source(source)

        def write(folder: Path) -> float:
            with tempfile.TemporaryDirectory() as scratch:
                graph.program.save(Path(scratch) / ONNX_FILE)
                with readable_by_openvino("the graph", "; export it --to onnx or compact"):
                    read = engine.Core().read_model(Path(scratch) / ONNX_FILE)
                    engine.save_model(read, folder / OPENVINO_FILE, compress_to_fp16=self.fp16)
            close = CLOSE_IN_HALF if self.fp16 else CLOSE
            return compare_outputs(graph.model, graph.inputs, open_openvino(folder / OPENVINO_FILE), close)

        load = f'openvino.Core().compile_model("{OPENVINO_FILE}", "CPU", {EXACT})'
        lines = [
            "import openvino",
            f"model = {load}",
            "answers = model({i.any_name: batch[i.any_name] for i in model.inputs})",
        ]
        notes = ["a CPU with bf16 computes in it unless float32 is requested, as `load` does"]
        if self.fp16:
            notes.append("its weights are rounded to float16: check predictions against the source")
        return _prepare_graph(source, graph, write, load, lines, notes)


class TracedModel(NamedTuple):
    """A source's model as narrow as its zeros allow, and its graph."""

    model: Any
    layers: list[dict[str, Any]]
    notes: list[str]
    inputs: list[str]
    program: Any  # torch's ONNX program


def trace_source(source: PrunedSource, opset: int = 0) -> TracedModel:
    """Trace the model of a source."""
    for name in ("onnx", "onnxscript"):
        require_library(name)
    model, layers, notes = shrink_if_possible(source)
    inputs = graph_inputs(model, source.folder)
    return TracedModel(model, layers, notes, inputs, trace_model(model, inputs, opset))


def _prepare_graph(
    source: PrunedSource, graph: TracedModel, write: Callable[[Path], float], load: str, lines: Sequence[str],
    notes: Sequence[str] = (),
) -> PreparedExport:  # fmt: skip
    """Return the export of a graph, which `lines` of Python load and run on `batch`.

    `write` writes it into a folder and returns the largest difference of its outputs from torch's.
    """

    def save(folder: Path) -> dict[str, Any]:
        source.copy_other_files(folder, config=False)
        config = copy.deepcopy(graph.model.config)  # has the meaning of the outputs
        for key in (COMPACT, LOW_RANK):
            if hasattr(config, key):
                delattr(config, key)
        with quiet_libraries():
            config.save_pretrained(folder)
        forget_masks(folder)
        return {"largest_difference": write(folder)}

    return PreparedExport(
        save=save,
        size=size_of(graph.model.named_parameters()),
        layers=graph.layers,
        load=load,
        notes=[*graph.notes, *notes],
        facts={"inputs": graph.inputs, "example": [*_example_batch(graph, source.folder), *lines]},
    )


def _example_batch(graph: TracedModel, folder: Path) -> list[str]:
    """Return lines of Python that make the inputs of a graph in its folder, without sparsesoup."""
    if _has_tokenizer(folder) and "pixel_values" not in graph.inputs:
        return [
            "from transformers import AutoTokenizer",
            'batch = AutoTokenizer.from_pretrained(".")(["a text", "another one"], padding=True, return_tensors="np")',
        ]
    drawn = [(name, t.numpy()) for name, t in dummy_inputs(graph.model, rows=1).items() if name in graph.inputs]
    arrays = [f'"{name}": numpy.ones({a.shape}, "{a.dtype}")' for name, a in drawn]
    return ["import numpy", f"batch = {{{', '.join(arrays)}}}"]


def opset_of(model: nn.Module, wanted: int) -> int:
    """Return the ONNX opset version for a model."""
    turned = any("Rotary" in type(module).__name__ for module in model.modules())
    if turned and wanted > TURNED:
        raise UserError(
            f"{type(model).__name__} has rotary positions, which ONNX Runtime does not run in opset {wanted}; set "
            f"--opset {TURNED} or leave it out"
        )
    return wanted or (TURNED if turned else OPSETS[-1])


def graph_inputs(model: Any, folder: Path) -> list[str]:
    """Return the graph's input names: the model's inputs, restricted to those its tokenizer makes."""
    names = [*dummy_inputs(model)]
    if _has_tokenizer(folder) and "token_type_ids" not in load_tokenizer(str(folder)).model_input_names:
        names = [name for name in names if name != "token_type_ids"]
    return names


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


class TupleOutputs(nn.Module):
    """A model with positional tensor inputs and a plain tuple of output tensors, by name in order, as graphs have."""

    def __init__(self, model: nn.Module, taken: Sequence[str], given: Sequence[str]) -> None:
        super().__init__()
        self.model, self.taken, self.given = model, taken, given

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, in order."""
        found = self.model(**dict(zip(self.taken, tensors, strict=True)), return_dict=True)
        return tuple(found[name] for name in self.given)


@torch.no_grad()
def trace_model(model: Any, names: Sequence[str], opset: int = 0) -> Any:
    """Trace a model into torch's ONNX program, with dynamic batch and length."""
    version = opset_of(model, opset)
    batch = {name: t for name, t in dummy_inputs(model).items() if name in names}
    shapes = tuple(dict(enumerate(AXES.get(name, ("batch", "length")))) for name in names)
    with quiet_libraries():
        try:
            answered = model(**batch, return_dict=True).items()
            found = [name for name, v in answered if isinstance(v, Tensor) and v.is_floating_point()]
            program: Any = torch.onnx.export(
                TupleOutputs(model, names, found), tuple(batch.values()), input_names=[*names], output_names=found,
                opset_version=version, dynamic_shapes=(shapes,), dynamo=True, verbose=False,
            )  # fmt: skip
        except Exception as error:  # from the exporter, onnx_ir's graph passes, or the model
            raise UserError(
                f"torch cannot make a graph of {type(model).__name__}: {first_error_line(error)}; export it --to "
                f"compact or packed"
            ) from error
    for part in (program.model.graph, *program.model.functions.values()):
        for node in part.all_nodes():
            node.metadata_props.clear()  # the stack trace: folders of this machine, and source lines
    return program


def compare_outputs(model: Any, names: Sequence[str], infer: InferenceFunction, close: float) -> float:
    """Return the largest difference between an engine's outputs and the model's, on random inputs of several shapes."""
    worst = []
    for rows, length in SHAPES:
        batch = {name: t for name, t in dummy_inputs(model, rows, length, seed=rows).items() if name in names}
        found = [torch.from_numpy(array) for array in infer({name: t.numpy() for name, t in batch.items()}).values()]
        worst.append(largest_difference(
            found, forward_outputs(model, batch), close,
            f"the graph of {type(model).__name__} answers otherwise than torch",
            ": these versions of torch and of the engine do not go together; export it --to compact or packed",
        ))  # fmt: skip
    return max(worst)
