"""Allocation: integer numbers of weights to keep per scope, adding up to the total."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from sparsesoup.core.errors import UserError


def budget_per_scope(
    scores: Mapping[str, Tensor], sparsity: float, scope: str, alive: Mapping[str, float]
) -> Iterable[tuple[list[str], int]]:
    """Return (names ranked together, number of weights they keep together); `alive`: those that each may keep."""
    sizes = {name: s.numel() for name, s in scores.items()}
    goal = round((1.0 - sparsity) * sum(sizes.values()))
    if scope == "global":
        return [(list(scores), goal)]
    if scope == "tensor":
        shares = {name: goal * size / sum(sizes.values()) for name, size in sizes.items()}
    else:
        shares = _erdos_renyi(scores, goal, alive)
    counts = clip_to_available(largest_remainder(list(shares.values()), goal), [alive[name] for name in shares])
    return [([name], count) for name, count in zip(shares, counts, strict=True)]


def largest_remainder(shares: Sequence[float], goal: int) -> list[int]:
    """Round the shares to integers that sum to `goal`; the largest fractions are rounded up, earlier ones first.

    >>> largest_remainder([1.5, 1.5, 2.0], 5)
    [2, 1, 2]
    """
    floor = [int(s + 1e-9) for s in shares]
    order = sorted(range(len(shares)), key=lambda i: floor[i] - shares[i])
    for i in order[: goal - sum(floor)]:
        floor[i] += 1
    return floor


def clip_to_available(counts: Sequence[int], alive: Sequence[float]) -> list[int]:
    """Move one weight from every count that exceeds its available weights by one to a count with weights left.

    A share that shrinks with the total may still be rounded up where it was rounded down before.
    """
    found = list(counts)
    for i, available in enumerate(alive):
        free = next((j for j, most in enumerate(alive) if found[j] < most), None)
        if found[i] == available + 1 and free is not None:
            found[i], found[free] = found[i] - 1, found[free] + 1
    return found


def _erdos_renyi(scores: Mapping[str, Tensor], goal: int, alive: Mapping[str, float]) -> dict[str, float]:
    """Return the kept weights per tensor: density proportional to (out + in) / (out * in), capped at `alive`."""
    full: dict[str, float] = {}
    while True:
        open_ = {n: float(sum(s.shape)) for n, s in scores.items() if n not in full}
        rest = goal - sum(full.values())
        shares = {n: rest * weight / sum(open_.values()) for n, weight in open_.items()}
        over = {n: float(alive[n]) for n, share in shares.items() if share > alive[n]}
        if not over:
            return {n: full[n] if n in full else shares[n] for n in scores}
        if len(over) == len(open_):
            raise UserError(f"`within` leaves fewer than the {goal} weights that are to be kept")
        full |= over
