"""Benchmark candidates: a run or an export, and the dense model to compare it with."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import read_table
from sparsesoup.core.manifest import check_export
from sparsesoup.exports.bitmask_codec import encode_tensor, stored_kinds
from sparsesoup.exports.compact import shrink_if_possible, widths_in
from sparsesoup.exports.runtimes import ONNX_FILE, OPENVINO_FILE
from sparsesoup.exports.source import PrunedSource, open_source
from sparsesoup.hub.models.cut_layers import resize_layers_
from sparsesoup.hub.models.loading import unpruned_model

GRAPHS = {"onnx": ONNX_FILE, "openvino": OPENVINO_FILE}  # exports that are not torch models
AS_IT_IS, CUT = "as it is", "compact"


@dataclass(frozen=True)
class BenchmarkCandidate:
    """A pruned model in all forms to measure."""

    path: Path
    forms: dict[str, Any]  # form -> torch model, the smallest last; for a graph one with its shapes
    dense: Any  # a model of the same class before anything was cut out, with no zero weights
    sizes: dict[str, Any]  # bytes on disk, and number of parameters
    notes: list[str]  # what was cut out for the form `compact`, or why nothing was
    graph: Path | None = None  # file of a graph, which is timed instead of its model
    itemsize: int = 4  # bytes per weight in training, also used for the dense model


def open_candidate(path: Path) -> BenchmarkCandidate:
    """Open a run directory, a model folder with `pruning/`, or an export."""
    table = path / "export.json"
    facts = read_table(table, "export", "export it again") if table.is_file() else {}
    check_export(path, facts)
    if facts.get("to") in GRAPHS:
        return _graph_candidate(path, facts)
    source = open_source(path)
    (small, _, notes), itemsize = shrink_if_possible(source), source.model.dtype.itemsize
    # An export that is already compact, or one from which nothing can be cut, has only one form.
    gone = sum(p.numel() for p in source.model.parameters()) - sum(p.numel() for p in small.parameters())
    forms = {AS_IT_IS: source.model.float().cpu()} | ({CUT: small} if gone else {})
    dense = unpruned_model(str(source.folder), widths_in(source.folder, 0))
    return BenchmarkCandidate(path, forms, dense, _disk_sizes(source), notes, itemsize=itemsize)


def _graph_candidate(folder: Path, facts: Mapping[str, Any]) -> BenchmarkCandidate:
    file = folder / GRAPHS[facts["to"]]
    if not file.is_file():
        raise UserError(f"damaged export: {file} is missing; export it again")
    try:
        sizes = {key: int(facts["sizes"][key][1]) for key in ("parameters", "nonzero")}
        notes = [str(note) for note in facts["notes"][:1]]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UserError(f"damaged export: {folder / 'export.json'} lacks {error}; export it again") from error
    sizes["raw"] = sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".onnx", ".data", ".bin"))
    dense = unpruned_model(str(folder), widths_in(folder, 0))
    shapes = copy.deepcopy(dense)
    if kept := widths_in(folder, 1):
        resize_layers_(shapes, kept)
    return BenchmarkCandidate(folder, {AS_IT_IS: shapes}, dense, sizes, notes, graph=file)


def _disk_sizes(source: PrunedSource) -> dict[str, int]:
    """Return the bytes of the weights as is, packed, and packed and compressed, without headers; and their counts."""
    tensors, kinds = dict(source.iterate_tensors()), stored_kinds(source.folder) if source.is_packed else {}
    packed = [
        sum(p.nbytes for name, t in tensors.items() for p in encode_tensor(name, t, kinds.get(name), zstd)[1].values())
        for zstd in (False, True)
    ]
    size = source.model_size()
    counts = {key: size[key] for key in ("parameters", "nonzero")}
    raw = size["weights"] - sum(_header_bytes(path) for path in source.weight_files())
    return {"raw": raw, "packed": packed[0], "zstd": packed[1], **counts}


def _header_bytes(path: Path) -> int:
    """Return the length of a safetensors file's header, which is not counted for the dense model."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
