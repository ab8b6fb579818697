"""Semi-structured export: 2:4 matrices for GPU sparse kernels, in the stock directory, with a table of their names."""

import copy
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import load_table, write_table
from sparsesoup.core.timing import time_interleaved
from sparsesoup.exports.base import PreparedExport
from sparsesoup.exports.dense import DenseFormat
from sparsesoup.exports.source import PrunedSource
from sparsesoup.exports.two_four import (
    KINDS,
    missing_device_support,
    require_two_four,
    to_semi_structured_,
    why_unsupported,
)
from sparsesoup.hub.models.dummy_inputs import dummy_inputs, forward_outputs
from sparsesoup.hub.models.loading import load_as_saved
from sparsesoup.hub.models.prunable import find_prunable

TABLE, FORMAT = "semi_structured.json", 1
ROWS, LENGTH = 32, 128  # of the timed batch
ROUNDS = 30
FAR = 0.05  # largest output difference, as a share of the largest, that rounding to 16 bits explains


@dataclass(frozen=True, kw_only=True)
class SemiStructuredFormat:
    """The stock folder with 2:4 matrices; `sparsesoup.load_semi_structured` runs them with GPU sparse kernels.

    The weights on disk are bit-identical to the masked model's. If there is a GPU of compute capability 8.0 or more,
    the outputs are checked and timed on it.
    """

    def make(self, source: PrunedSource) -> PreparedExport:
        """Return the export, after checking that every supported matrix is 2:4 along its inputs."""
        turned, left = _sort_matrices(source.model)
        for name in turned:
            require_two_four(name, source.model.get_parameter(name))
        dense, table = DenseFormat().make(source), {"format": FORMAT, "matrices": turned, "dense": left}

        def save(folder: Path) -> None:
            dense.save(folder)
            write_table(folder / TABLE, table)

        why = missing_device_support("cuda")
        found = _measure_on_gpu(source.model, turned) if not why else None
        notes = [
            "on the disk it is the dense model; on a GPU its 2:4 matrices take 9/16 of their memory in 16 bits",
            *(f"{name} stays dense: {reason}" for name, reason in left.items()),
            _describe_measurement(found) if found else f"neither its answers nor its speed were tried on a GPU: {why}",
        ]
        load = "sparsesoup.load_semi_structured(folder)"
        facts = {**dense.facts, "semi_structured": table, "gpu": found}
        return replace(dense, save=save, load=load, notes=tuple(notes), facts=facts)


def _sort_matrices(model: Any) -> tuple[list[str], dict[str, str]]:
    """Return (names of the matrices that can be 2:4, the reason for each other prunable one)."""
    turned, left = [], {}
    for name in find_prunable(model):
        reason = why_unsupported(model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name))
        if reason:
            left[name] = reason
        else:
            turned.append(name)
    if not turned:
        first, reason = next(iter(left.items()))
        raise UserError(
            f"no matrix of {type(model).__name__} can be 2:4 on a GPU, such as {first}: {reason}; take --to "
            f"packed for a small file"
        )
    return turned, left


def _measure_on_gpu(model: Any, names: list[str]) -> dict[str, Any]:
    """Measure on the GPU: the largest difference of outputs, and milliseconds per batch."""
    dense = copy.deepcopy(model).to("cuda", KINDS[0]).eval()
    sparse = copy.deepcopy(dense)
    to_semi_structured_(sparse, names, verify=True)
    longest = getattr(model.config, "max_position_embeddings", LENGTH + 4)
    batch = dummy_inputs(dense, ROWS, min(LENGTH, longest - 4))
    one, other = forward_outputs(dense, batch), forward_outputs(sparse, batch)
    apart = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
    if not apart <= FAR * max(float(a.abs().max()) for a in one):
        raise UserError(f"with 2:4 matrices this GPU's answers are off by {apart:.3g}; use the model dense on it")
    with torch.no_grad():
        took = time_interleaved([lambda: dense(**batch), lambda: sparse(**batch)], ROUNDS)
    medians = {
        f"{name}_ms": 1000 * statistics.median(seconds)
        for name, seconds in zip(("dense", "semi_structured"), took, strict=True)
    }
    shape = {"rows": ROWS, "length": LENGTH, "dtype": str(KINDS[0]).removeprefix("torch.")}
    return {"device": torch.cuda.get_device_name(), **shape, "largest_difference": apart, **medians}


def _describe_measurement(found: dict[str, Any]) -> str:
    gain = found["dense_ms"] / found["semi_structured_ms"]
    taken = f"{found['semi_structured_ms']:.2f} ms, dense {found['dense_ms']:.2f} ms ({gain:.2f} times as fast)"
    return (
        f"on {found['device']} {found['rows']} rows of {found['length']} tokens take {taken}, both in {found['dtype']}"
    )


def load_semi_structured(
    folder: str | Path, device: str | torch.device = "cuda", dtype: torch.dtype = torch.float16
) -> Any:
    """Load the model on a GPU, with 2:4 matrices in torch's sparse form (`to_sparse_semi_structured`).

    Args:
        folder: an export of `sparsesoup export --to semi-structured`.
        device: a CUDA device of compute capability 8.0 or more.
        dtype: float16 or bfloat16, to which all weights are rounded; torch has no 2:4 kernel for float32.
    Returns: the model, in evaluation mode, for inference only: it can be neither trained nor saved.
    Raises: UserError on other devices, or if a matrix is no longer 2:4; it names the first.

    >>> model = load_semi_structured("fast")  # doctest: +SKIP
    """
    names = _matrices_of(Path(folder))
    if dtype not in KINDS:
        raise UserError(f"2:4 matrices are of type {' or '.join(map(str, KINDS))}, got {dtype}")
    if why := missing_device_support(device):
        raise UserError(
            f"2:4 matrices need a CUDA device of compute capability 8.0 or more: {why}; here from_pretrained of "
            f"transformers loads {folder} with the same weights, dense"
        )
    model: Any = load_as_saved(str(folder))
    model.to(device, dtype).eval()
    to_semi_structured_(model, names)
    return model


def _matrices_of(folder: Path) -> list[str]:
    try:
        table = load_table(folder / TABLE)
        if table["format"] != FORMAT:
            raise UserError(f"{folder / TABLE} has format {table['format']}; this version reads {FORMAT}")
        return [str(name) for name in table["matrices"]]
    except UserError:
        raise
    except FileNotFoundError as error:
        wrote = "`sparsesoup export --to semi-structured` wrote"
        raise UserError(f"no {folder / TABLE}: give a folder that {wrote}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"damaged {folder / TABLE} ({error}); export it again") from error
