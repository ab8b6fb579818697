"""Semi-structured export (experimental): 2:4 matrices for GPU sparse kernels, in the stock directory, with their names.

2:4: two of each four consecutive weights of a row are zero, for GPUs from compute capability 8.0 on. torch calls its
implementation (`torch.sparse.to_sparse_semi_structured`) a prototype. It does not check the pattern and drops weights
that violate it, so the pattern is checked here.
"""

import copy
import statistics
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import load_table, write_table
from sparsesoup.core.timing import time_interleaved
from sparsesoup.exports.dense import DenseFormat
from sparsesoup.exports.source import PreparedExport, PrunedSource, largest_difference
from sparsesoup.hub.models.dummy_inputs import dummy_inputs, forward_outputs
from sparsesoup.hub.models.loading import load_as_saved
from sparsesoup.hub.models.prunable import find_prunable

TABLE, FORMAT = "semi_structured.json", 1
# Of torch's two kernels for 16-bit matrices (cuSPARSELt, CUTLASS) the stricter one needs these multiples.
OUT_MULTIPLE, IN_MULTIPLE = 32, 64
KINDS = (torch.float16, torch.bfloat16)
LEAST = (8, 0)  # compute capability
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
        if source.is_low_rank:
            raise UserError("layers of low rank are not made 2:4; merge them first, by export --to dense")
        turned, left = _sort_matrices(source.model)
        for name in turned:
            require_two_four(name, source.model.get_parameter(name))
        dense, table = DenseFormat().make(source), {"format": FORMAT, "matrices": turned, "dense": left}

        def save(folder: Path) -> None:
            dense.save(folder)
            write_table(folder / TABLE, table)

        why = missing_device_support("cuda")
        found = None if why else _measure_on_gpu(source.model, turned)
        measured = f"neither its answers nor its speed were tried on a GPU: {why}"
        if found:
            gain = found["dense_ms"] / found["semi_structured_ms"]
            measured = (
                f"on {found['device']} {found['rows']} rows of {found['length']} tokens take "
                f"{found['semi_structured_ms']:.2f} ms, dense {found['dense_ms']:.2f} ms ({gain:.2f} times as fast), "
                f"both in {found['dtype']}"
            )
        notes = [
            "experimental: its makers have not yet run it on a GPU",
            "on the disk it is the dense model; on a GPU its 2:4 matrices take 9/16 of their memory in 16 bits",
            *(f"{name} stays dense: {reason}" for name, reason in left.items()),
            measured,
        ]
        facts = {**dense.facts, "semi_structured": table, "gpu": found}
        return replace(dense, save=save, load="sparsesoup.load_semi_structured(folder)", notes=notes, facts=facts)


def _sort_matrices(model: Any) -> tuple[list[str], dict[str, str]]:
    """Return (names of the matrices that can be 2:4, the reason for each other prunable one)."""
    reasons = {
        name: why_unsupported(model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name))
        for name in find_prunable(model)
    }
    turned, left = [n for n in reasons if not reasons[n]], {n: why for n, why in reasons.items() if why}
    if not turned:
        first, reason = next(iter(left.items()))
        raise UserError(
            f"no matrix of {type(model).__name__} can be 2:4 on a GPU, such as {first}: {reason}; use --to "
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
    difference = largest_difference(
        forward_outputs(sparse, batch), forward_outputs(dense, batch), FAR,
        "with 2:4 matrices this GPU's answers are off", "; use the model dense on it", least=0.0,
    )  # fmt: skip
    with torch.no_grad():
        took = time_interleaved([lambda: dense(**batch), lambda: sparse(**batch)], ROUNDS)
    return {
        "device": torch.cuda.get_device_name(),
        "rows": ROWS,
        "length": LENGTH,
        "dtype": str(KINDS[0]).removeprefix("torch."),
        "largest_difference": difference,
        "dense_ms": 1000 * statistics.median(took[0]),
        "semi_structured_ms": 1000 * statistics.median(took[1]),
    }


def first_violation(weight: Tensor) -> tuple[int, int, list[float]] | None:
    """Return (row, first column, weights) of the first four weights with more than two nonzero; None if all fit.

    Args:
        weight: [out, in], `in` a multiple of four.

    >>> first_violation(torch.tensor([[0.0, 1.0, 2.0, 0.0, 3.0, 4.0, 0.0, 5.0]]))
    (0, 4, [3.0, 4.0, 0.0, 5.0])
    """
    fours = weight.detach().reshape(weight.shape[0], -1, 4)
    found = (torch.count_nonzero(fours, dim=2) > 2).nonzero()
    if not len(found):
        return None
    row, where = found[0].tolist()
    return row, 4 * where, fours[row, where].tolist()


def require_two_four(name: str, weight: Tensor) -> None:
    """Raise a UserError naming the first four weights of a matrix that violate 2:4, with a remedy."""
    if (found := first_violation(weight)) is not None:
        row, column, four = found
        raise UserError(
            f"{name} is not 2:4: row {row} holds {', '.join(f'{value:.4g}' for value in four)} in columns {column} to "
            f"{column + 3}, where at most two may be other than zero; prune with "
            f"--method.scope 2:4, as `sparsesoup prune magnitude --method.scope 2:4` does"
        )


def why_unsupported(owner: nn.Module, weight: Tensor) -> str:
    """Return why torch has no 2:4 kernel for a weight, in a few words; '' if it has one."""
    if not isinstance(owner, nn.Linear) or weight is not owner.weight:
        return f"it is no weight of an nn.Linear but of a {type(owner).__name__}"
    if weight.shape[0] % OUT_MULTIPLE or weight.shape[1] % IN_MULTIPLE:
        return f"shape {tuple(weight.shape)} is no multiple of {OUT_MULTIPLE} x {IN_MULTIPLE}"
    return ""


def missing_device_support(device: str | torch.device) -> str:
    """Return what a device lacks for 2:4 kernels, in a few words; '' if nothing."""
    try:
        where = torch.device(device)
    except RuntimeError:
        return f"{device} is no device"
    if where.type != "cuda" or not torch.cuda.is_available():
        return f"{where} is no CUDA device" if where.type != "cuda" else "no CUDA device is there"
    if (where.index or 0) >= torch.cuda.device_count():
        return f"there is no {where}"
    able = torch.cuda.get_device_capability(where)
    return "" if able >= LEAST else f"{where} has compute capability {able[0]}.{able[1]}"


def to_semi_structured_(model: nn.Module, names: Iterable[str], verify: bool = False) -> None:
    """Convert weights of linear layers (names as in `named_parameters()`) to torch's 2:4 form, in place.

    The model is in float16 or bfloat16, and for inference only afterwards. `verify` converts each back and compares.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's prototype warning, which our documentation mentions
        for name in names:
            try:
                owner = model.get_submodule(name.rpartition(".")[0])
                weight = owner.get_parameter("weight").detach().contiguous()
            except AttributeError as error:
                raise UserError(f"the model has no {name}, which is to be 2:4; export it again") from error
            require_two_four(name, weight)
            sparse = to_sparse_semi_structured(weight)
            if verify and not torch.equal(sparse.to_dense(), weight):
                raise UserError(f"torch does not give {name} back from its 2:4 form on {weight.device}; use it dense")
            owner.weight = nn.Parameter(sparse, requires_grad=False)


def load_semi_structured(
    folder: str | Path, device: str | torch.device = "cuda", dtype: torch.dtype = torch.float16
) -> Any:
    """Load the model on a GPU, with 2:4 matrices in torch's sparse form (`to_sparse_semi_structured`); experimental.

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
    path = folder / TABLE
    try:
        table = load_table(path)
        if (known := table["format"]) == FORMAT:
            return [str(name) for name in table["matrices"]]
    except FileNotFoundError as error:
        raise UserError(f"no {path}: give a folder that `sparsesoup export --to semi-structured` wrote") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"damaged {path} ({error}); export it again") from error
    raise UserError(f"{path} has format {known}; this version reads {FORMAT}")
