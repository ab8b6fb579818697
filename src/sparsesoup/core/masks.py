"""Masks: plain dicts of boolean tensors, and the operations on them."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

Masks = dict[str, Tensor]  # parameter name -> bool tensor of the parameter's shape, True = kept


def dense_masks(params: Mapping[str, Tensor]) -> Masks:
    """Return masks that keep every weight."""
    return {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}


def count_total(masks: Masks) -> int:
    """Return the number of weights covered by the masks."""
    return sum(m.numel() for m in masks.values())


def count_kept(masks: Masks) -> int:
    """Return the number of weights kept by the masks."""
    return sum(int(torch.count_nonzero(m)) for m in masks.values())


def sparsity(masks: Masks) -> float:
    """Return the share of weights removed, in [0, 1].

    >>> sparsity({"w": torch.tensor([[True, False], [False, False]])})
    0.75
    """
    return 1.0 - count_kept(masks) / count_total(masks)


def count_votes(masks: Sequence[Masks]) -> dict[str, Tensor]:
    """Return the number of masks that keep each weight, as uint8.

    Raises: ValueError if there are no masks, more than 255, or if they name different parameters.
    """
    if not 1 <= len(masks) <= 255:
        raise ValueError(f"votes are counted over 1 to 255 masks, got {len(masks)}")
    for one, other in pairwise(masks):
        _same_names(one, other)
    count = {name: m.to(torch.uint8) for name, m in masks[0].items()}
    for other in masks[1:]:
        for name, m in other.items():
            count[name] += m
    return count


def keep_if_voted(masks: Sequence[Masks], quorum: int) -> Masks:
    """Keep weights that at least `quorum` of the masks keep; 1 is the union, all is the intersection."""
    return {name: count >= quorum for name, count in count_votes(masks).items()}


def union(masks: Sequence[Masks]) -> Masks:
    """Keep weights that any mask keeps: the superposition of weak masks in Jaiswal et al. 2023, sec. 3."""
    return keep_if_voted(masks, 1)


def intersection(masks: Sequence[Masks]) -> Masks:
    """Keep weights that all masks keep."""
    return keep_if_voted(masks, len(masks))


def hamming_distance(one: Masks, other: Masks) -> float:
    """Return the share of positions on which two masks differ (normalised Hamming distance), in [0, 1]."""
    _same_names(one, other)
    return sum(int(torch.count_nonzero(one[n] ^ other[n])) for n in one) / count_total(one)


def jaccard_distance(one: Masks, other: Masks) -> float:
    """Return 1 - intersection over union of the kept weights of two masks (Jaccard distance), in [0, 1].

    It stays informative at high sparsity: two random masks at 95 % differ by 0.97, where `hamming_distance` is 0.095.

    >>> jaccard_distance({"w": torch.tensor([True, True, False])}, {"w": torch.tensor([True, False, True])})
    0.6666666666666666
    """
    _same_names(one, other)
    either = sum(int(torch.count_nonzero(one[n] | other[n])) for n in one)
    return sum(int(torch.count_nonzero(one[n] ^ other[n])) for n in one) / either if either else 0.0


def vote_agreement(count: Mapping[str, Tensor], voters: int) -> dict[str, float]:
    """Return measures of agreement between masks, computed from their vote counts.

    Args:
        count: votes per weight, 0 to `voters`.
        voters: number of masks, at least 2.
    Returns: `same`, the share of positions on which two masks agree, averaged over pairs; `unanimous`, the share on
        which all agree; `overlap`, intersection over union of two kept sets (Jaccard), which stays informative at high
        sparsity, where two random masks at 95 % agree on 90 % of the positions.
    """
    if voters < 2:
        raise ValueError(f"agreement needs at least two masks, got {voters}")
    table = torch.zeros(voters + 1, dtype=torch.float64)
    for c in count.values():
        table += torch.bincount(c.flatten().cpu().int(), minlength=voters + 1)
    v = torch.arange(voters + 1, dtype=torch.float64)
    both, differ = (table * v * (v - 1)).sum(), (table * 2 * v * (voters - v)).sum()
    return {
        "same": float(1 - differ / (table.sum() * voters * (voters - 1))),
        "unanimous": float((table[0] + table[-1]) / table.sum()),
        "overlap": float(both / (both + differ)) if both + differ > 0 else 1.0,
    }


def apply_masks_(params: Mapping[str, Tensor], masks: Masks) -> None:
    """Set the pruned weights to zero, in place."""
    with torch.no_grad():
        for name, m in masks.items():
            params[name].masked_fill_(~m, 0.0)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a mask into uint8 [ceil(n / 8)], one bit per weight, the first weight in the highest bit."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1)))


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack the bits of `pack_bits` into a bool mask of the given shape.

    Raises: ValueError if the number of bits does not match the shape.
    """
    count = int(np.prod(shape))
    if bits.dtype != torch.uint8 or bits.numel() != -(-count // 8):
        raise ValueError(
            f"a mask of shape {tuple(shape)} needs {-(-count // 8)} bytes, got {bits.numel()} {bits.dtype}"
        )
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool)).reshape(tuple(shape))


def _same_names(one: Masks, other: Masks) -> None:
    if one.keys() != other.keys():
        raise ValueError(f"masks name different parameters: {', '.join(sorted(one.keys() ^ other.keys())[:5])}")
