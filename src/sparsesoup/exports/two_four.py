"""2:4 sparsity: two of each four consecutive weights of a row are zero, for GPUs from compute capability 8.0 on.

torch calls its implementation (`torch.sparse.to_sparse_semi_structured`) a prototype. It does not check the pattern
and drops weights that violate it, so the pattern is checked here.
"""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from sparsesoup.core.errors import UserError

# Of torch's two kernels for 16-bit matrices (cuSPARSELt, CUTLASS) the stricter one needs these multiples.
ROWS, COLUMNS = 32, 64
KINDS = (torch.float16, torch.bfloat16)
LEAST = (8, 0)  # compute capability


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
    row, place = found[0].tolist()
    return row, 4 * place, fours[row, place].tolist()


def require_two_four(name: str, weight: Tensor) -> None:
    """Raise a UserError naming the first four weights of a matrix that violate 2:4, with a remedy."""
    found = first_violation(weight)
    if found is not None:
        row, column, four = found
        held = ", ".join(f"{value:.4g}" for value in four)
        raise UserError(
            f"{name} is not 2:4: row {row} holds {held} in columns {column} to {column + 3}, where at most two may be "
            f"other than zero; prune with --method.scope 2:4, as in `sparsesoup prune magnitude --method.scope 2:4`"
        )


def why_unsupported(owner: nn.Module, weight: Tensor) -> str:
    """Return why torch has no 2:4 kernel for a weight, in a few words; '' if it has one."""
    if not isinstance(owner, nn.Linear) or weight is not owner.weight:
        return f"it is no weight of an nn.Linear but of a {type(owner).__name__}"
    if weight.shape[0] % ROWS or weight.shape[1] % COLUMNS:
        return f"shape {tuple(weight.shape)} is no multiple of {ROWS} x {COLUMNS}"
    return ""


def missing_device_support(device: str | torch.device) -> str:
    """Return what a device lacks for 2:4 kernels, in a few words; '' if nothing."""
    try:
        place = torch.device(device)
    except RuntimeError:
        return f"{device} is no device"
    if place.type != "cuda" or not torch.cuda.is_available():
        return f"{place} is no CUDA device" if place.type != "cuda" else "no CUDA device is there"
    if (place.index or 0) >= torch.cuda.device_count():
        return f"there is no {place}"
    able = torch.cuda.get_device_capability(place)
    return "" if able >= LEAST else f"{place} has compute capability {able[0]}.{able[1]}"


def to_semi_structured_(model: nn.Module, names: Iterable[str], verify: bool = False) -> None:
    """Convert weights of linear layers to torch's 2:4 form, in place; the model is then for inference only.

    Args:
        model: in float16 or bfloat16, on a device accepted by `missing_device_support`.
        names: weight names as in `named_parameters()`.
        verify: convert each back and compare.
    Raises: UserError if a weight is not 2:4, is missing, or is not restored exactly.
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
