"""Low rank: two thin linear maps instead of one, by singular value decomposition."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsesoup.core.errors import UserError


def rank_at(shape: tuple[int, ...], compression: float) -> int:
    """Return the rank at which two thin maps have at most 1 / compression of the weights of a matrix, at least 1.

    PELA, Guo et al. 2024: floor(in out / (compression (in + out))).

    >>> [rank_at((768, 768), c) for c in (1.5, 2, 3)], [rank_at((3072, 768), c) for c in (1.5, 2, 3)]
    ([256, 192, 128], [409, 307, 204])
    """
    out, inside = shape
    return max(1, int(inside * out / (compression * (inside + out)) + 1e-9))


def low_rank_of(facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the counts and the compression of a run that removed parameters by rank; None for any other.

    Its masks are full. A method notes this as `low_rank`, which is in ticket.json too.

    Args:
        facts: ticket.json or report.json of a run.

    >>> low_rank_of({"notes": {"low_rank": {"compression": 2.0, "weights": 16, "left": 8, "removed": 0.5}}})["left"]
    8
    """
    found = facts.get("low_rank") or (facts.get("notes") or {}).get("low_rank")
    keys = ("compression", "weights", "left", "removed")
    return (
        found if isinstance(found, Mapping) and all(isinstance(found.get(key), int | float) for key in keys) else None
    )


def refuse_low_rank(facts: Mapping[str, Any], place: Path, verb: str) -> None:
    """Raise a UserError if a ticket is that of a run that removed parameters by rank, and so has full masks.

    >>> refuse_low_rank({"method": "gradual"}, Path("run"), "apply")
    """
    if low_rank_of(facts):
        raise UserError(
            f"{place} is of low rank, and its masks keep every weight, so there is nothing to {verb}; give a run that "
            f"prunes by masks, or write this one by `sparsesoup export --to low-rank`"
        )


def svd_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (first [rank, in], second [out, rank]) whose product second @ first is the nearest matrix of that rank.

    Each has the square root of the singular values; computed in float64.

    >>> first, second = svd_factors(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), 1)
    >>> (second @ first).abs().round(decimals=3).tolist()
    [[2.0, 0.0], [0.0, 0.0]]
    """
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    roots = values[:rank].sqrt()
    first, second = roots[:, None] * right[:rank], left[:, :rank] * roots
    return first.to(weight.dtype).contiguous(), second.to(weight.dtype).contiguous()


def product_of(pair: nn.Module) -> Tensor:
    """Return the matrix [out, in] that two thin maps stand for."""
    first, second = (layer.get_parameter("weight") for layer in pair.children())
    return second @ first


def check_linear(model: nn.Module, names: Iterable[str]) -> None:
    """Raise a UserError unless every named weight is that of a linear layer."""
    for name in names:
        owner = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, nn.Linear) or not name.endswith(".weight"):
            raise UserError(
                f"low rank is for linear layers, and {name} is in a {type(owner).__name__}; use another model"
            )


def split_layers_(model: nn.Module, ranks: Mapping[str, int], fill: bool = True) -> None:
    """Replace linear layers, named with their ranks, by two thin ones without and with the bias.

    Args:
        fill: compute the factors of the weights; else they are random, to be loaded.
    """
    for name, rank in ranks.items():
        owner, _, own = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        kind = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        first = nn.Linear(layer.in_features, rank, bias=False, **kind)
        second = nn.Linear(rank, layer.out_features, bias=layer.bias is not None, **kind)
        if fill:
            with torch.no_grad():
                for part, factor in zip((first, second), svd_factors(layer.weight, rank), strict=True):
                    part.weight.copy_(factor)
        second.bias = layer.bias
        setattr(model.get_submodule(owner), own, nn.Sequential(first, second).train(layer.training))


@torch.no_grad()
def merge_layers_(model: nn.Module, names: Iterable[str]) -> None:
    """Replace pairs of thin layers by one linear layer each."""
    for name in names:
        owner, _, own = name.rpartition(".")
        pair: Any = model.get_submodule(name)
        product = product_of(pair)
        layer = nn.Linear(product.shape[1], product.shape[0], bias=False, device=product.device, dtype=product.dtype)
        layer.weight.copy_(product)
        layer.bias = pair[1].bias
        setattr(model.get_submodule(owner), own, layer.train(pair.training))


def low_rank_facts(shapes: Iterable[tuple[int, ...]], ranks: Iterable[int], whole: int) -> dict[str, int | float]:
    """Return the numbers of weights before and after, and the shares removed of these matrices and of the model.

    Args:
        shapes, ranks: of the matrices.
        whole: parameters of the whole model.

    >>> low_rank_facts([(4, 4)], [1], 32)
    {'weights': 16, 'left': 8, 'removed': 0.5, 'removed_of_model': 0.25}
    """
    pairs = list(zip(shapes, ranks, strict=True))
    before, after = sum(out * inside for (out, inside), _ in pairs), sum(rank * sum(shape) for shape, rank in pairs)
    return {
        "weights": before, "left": after, "removed": 1 - after / before, "removed_of_model": (before - after) / whole,
    }  # fmt: skip
