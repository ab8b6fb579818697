"""ONNX export, for ONNX Runtime and many other engines, without torch or sparsesoup."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsesoup.core.errors import UserError
from sparsesoup.exports.base import PreparedExport
from sparsesoup.exports.runtimes import ONNX_FILE, Asked, first_error_line, open_onnx, require_library
from sparsesoup.exports.shrink import shrink_if_possible
from sparsesoup.exports.source import PrunedSource, forget_masks, size_of
from sparsesoup.hub.models.checkpoint import load_tokenizer, quiet_transformers
from sparsesoup.hub.models.dummy_inputs import dummy_inputs, forward_outputs
from sparsesoup.hub.models.loading import COMPACT

OPSETS = range(18, 24)  # supported by both torch's exporter and ONNX Runtime
TURNED = 22  # the last one without a rotary embedding operator, which ONNX Runtime refuses as torch writes it
LARGE = 1_500_000_000  # bytes of weights above which they are stored beside the file: protobuf's limit is 2 GiB
CLOSE = 1e-3  # largest difference from torch's outputs, as a share of the largest; rounding gives 1e-6
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
        if self.opset and self.opset not in OPSETS:
            raise UserError(f"opset must be {OPSETS[0]} to {OPSETS[-1]}, got {self.opset}")

    def make(self, source: PrunedSource) -> PreparedExport:
        """Return the graph in memory; once written, its outputs in ONNX Runtime are compared with torch."""
        for name in ("onnx", "onnxscript", "onnxruntime"):
            require_library(name)
        small = shrink_if_possible(source)
        names = graph_inputs(small.model, source.folder)
        program, size = trace_model(small.model, names, self.opset), size_of(small.model.named_parameters(), 0)

        def save(folder: Path) -> dict[str, Any]:
            copy_config(small.model, source, folder)
            program.save(folder / ONNX_FILE, external_data=4 * size.parameters > LARGE)
            return {"largest_difference": compare_outputs(small.model, names, open_onnx(folder / ONNX_FILE), CLOSE)}

        lines = (
            "from onnxruntime import InferenceSession",
            f'session = InferenceSession("{ONNX_FILE}")',
            "answers = session.run(None, {i.name: batch[i.name] for i in session.get_inputs()})",
        )
        return PreparedExport(
            save=save,
            size=size,
            layers=small.layers,
            load=f'onnxruntime.InferenceSession("{ONNX_FILE}")',
            notes=small.notes,
            facts={"inputs": names, "example": example_code(small.model, names, source.folder, lines)},
        )


def opset_of(model: nn.Module, asked: int) -> int:
    """Return the ONNX opset version for a model.

    Raises: UserError if the requested one makes a graph that ONNX Runtime cannot run.
    """
    turned = any("Rotary" in type(module).__name__ for module in model.modules())
    if turned and asked > TURNED:
        raise UserError(
            f"{type(model).__name__} has rotary positions, which ONNX Runtime does not run in opset {asked}; say "
            f"--opset {TURNED} or leave it out"
        )
    return asked or (TURNED if turned else OPSETS[-1])


def graph_inputs(model: Any, folder: Path) -> list[str]:
    """Return the graph's input names: the model's inputs, restricted to those its tokenizer makes."""
    names = [*dummy_inputs(model)]
    if has_tokenizer(folder) and "token_type_ids" not in load_tokenizer(str(folder)).model_input_names:
        names = [name for name in names if name != "token_type_ids"]
    return names


def has_tokenizer(folder: Path) -> bool:
    """Return True if the folder contains a tokenizer."""
    return (folder / "tokenizer_config.json").is_file()


class TupleOutputs(nn.Module):
    """A model with positional tensor inputs and a plain tuple of output tensors, as graphs have.

    Args:
        model: a transformers model.
        taken, given: names of its inputs and outputs, in order.
    """

    def __init__(self, model: nn.Module, taken: Sequence[str], given: Sequence[str]) -> None:
        super().__init__()
        self.model, self.taken, self.given = model, taken, given

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, in order."""
        found = self.model(**dict(zip(self.taken, tensors, strict=True)), return_dict=True)
        return tuple(found[name] for name in self.given)


@torch.no_grad()
def trace_model(model: Any, names: Sequence[str], opset: int = 0) -> Any:
    """Trace a model into torch's ONNX program, with dynamic batch and length.

    Raises: UserError if torch cannot trace the model, or the engine cannot run that opset.
    """
    version = opset_of(model, opset)
    batch = {name: t for name, t in dummy_inputs(model).items() if name in names}
    shapes = tuple(dict(enumerate(AXES.get(name, ("batch", "length")))) for name in names)
    with quiet_transformers(), silence_tracer():
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


@contextlib.contextmanager
def silence_tracer() -> Iterator[None]:
    """Suppress warnings and logs of the tracer in the block: they concern other libraries."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def copy_config(model: Any, source: PrunedSource, folder: Path) -> None:
    """Copy tokenizer and processor, and write a config.json with the meaning of the outputs."""
    source.copy_beside(folder, config=False)
    config = copy.deepcopy(model.config)
    if hasattr(config, COMPACT):
        delattr(config, COMPACT)
    with quiet_transformers():
        config.save_pretrained(folder)
    forget_masks(folder)


def compare_outputs(model: Any, names: Sequence[str], ask: Asked, close: float) -> float:
    """Return the largest difference between an engine's outputs and the model's, on random inputs of several shapes.

    Args:
        model: a transformers model on the CPU.
        names: input names of the engine.
        ask: the engine.
        close: largest difference allowed, as a share of the largest output.
    Raises: UserError if it is exceeded.
    """
    worst = 0.0
    for rows, length in SHAPES:
        batch = {name: t for name, t in dummy_inputs(model, rows, length, seed=rows).items() if name in names}
        found = [torch.from_numpy(array) for array in ask({name: t.numpy() for name, t in batch.items()}).values()]
        worst = max(worst, max_difference(forward_outputs(model, batch), found, close, type(model).__name__))
    return worst


def max_difference(one: Sequence[Tensor], other: Sequence[Tensor], close: float, name: str) -> float:
    """Return the largest difference between two lists of outputs; raise a UserError above a share of the largest."""
    pairs = list(zip(one, other, strict=True))
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    largest = max(float(a.abs().max()) for a, _ in pairs)
    if not difference <= close * max(largest, 1.0):
        raise UserError(
            f"the graph of {name} answers otherwise than torch, by {difference:.3g} of {largest:.3g}: these versions "
            f"of torch and of the engine do not go together; export it --to compact or packed"
        )
    return difference


def example_code(model: Any, names: Sequence[str], folder: Path, lines: Sequence[str]) -> list[str]:
    """Return lines of Python that run the export in its folder without sparsesoup."""
    if has_tokenizer(folder) and "pixel_values" not in names:
        first = [
            "from transformers import AutoTokenizer",
            'batch = AutoTokenizer.from_pretrained(".")(["a text", "another one"], padding=True, return_tensors="np")',
        ]
    else:
        drawn = [(name, t.numpy()) for name, t in dummy_inputs(model, rows=1).items() if name in names]
        arrays = [f'"{name}": numpy.ones({a.shape}, "{a.dtype}")' for name, a in drawn]
        first = ["import numpy", f"batch = {{{', '.join(arrays)}}}"]
    return [*first, *lines]
