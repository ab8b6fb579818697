"""Slow twins of the selection, written from its promises in plain Python."""

from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

Place = tuple[str, int]


def table(scores: Mapping[str, Tensor]) -> dict[Place, float]:
    """Every score as a plain number, in the order of names and indices."""
    return {(n, i): v for n, s in scores.items() for i, v in enumerate(s.double().reshape(-1).tolist())}


def keep(
    scores: Mapping[str, Tensor],
    count: int,
    then: Mapping[str, Tensor] | None = None,
    within: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The `count` best weights of all: sorted by (-score, -then), and Python's sort leaves equals in their order."""
    first, second = table(scores), table(then) if then else {}
    alive = {p for p, v in table(within).items() if v} if within else set(first)
    order = sorted((p for p in first if p in alive), key=lambda p: (-first[p], -second.get(p, 0.0)))
    chosen = set(order[:count])
    return {
        n: torch.tensor([(n, i) in chosen for i in range(s.numel())], dtype=torch.bool).reshape(s.shape)
        for n, s in scores.items()
    }


def shares(sizes: Mapping[str, int], goal: int) -> dict[str, int]:
    """Largest remainder: whole parts of goal * size / total, then one more for the largest fractions."""
    exact = {n: Fraction(goal * size, sum(sizes.values())) for n, size in sizes.items()}
    parts = {n: int(share) for n, share in exact.items()}
    for n in sorted(exact, key=lambda n: -(exact[n] - parts[n]))[: goal - sum(parts.values())]:
        parts[n] += 1
    return parts


def blocks(
    scores: Mapping[str, Tensor], budget: int, rows: int, cols: int, within: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The blocks of largest mean, best first, up to the first one that does not fit the budget."""
    found: list[tuple[float, str, int, int, list[tuple[int, int]]]] = []
    for n, s in scores.items():
        high, wide = rows or s.shape[0], cols or s.shape[1]
        for top in range(0, s.shape[0], high):
            for left in range(0, s.shape[1], wide):
                cells = [(r, c) for r in range(top, top + high) for c in range(left, left + wide)]
                alive = [(r, c) for r, c in cells if within is None or bool(within[n][r, c])]
                if alive:
                    mean = sum(float(s[r, c]) for r, c in alive) / len(alive)
                    found.append((mean, n, top, left, alive))
    masks = {n: torch.zeros(s.shape, dtype=torch.bool) for n, s in scores.items()}
    for _, n, _, _, alive in sorted(found, key=lambda entry: -entry[0]):
        budget -= len(alive)
        if budget < 0:
            break
        for r, c in alive:
            masks[n][r, c] = True
    return masks


def agreement(masks: list[dict[str, Tensor]]) -> dict[str, float]:
    """Pair by pair, position by position."""
    flat = [[bool(v) for m in one.values() for v in m.reshape(-1).tolist()] for one in masks]
    pairs = [(a, b) for i, a in enumerate(flat) for b in flat[i + 1 :]]
    equal = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=True))
    both = sum(x and y for a, b in pairs for x, y in zip(a, b, strict=True))
    either = sum(x or y for a, b in pairs for x, y in zip(a, b, strict=True))
    return {
        "same": equal / (len(pairs) * len(flat[0])),
        "unanimous": sum(len(set(column)) == 1 for column in zip(*flat, strict=True)) / len(flat[0]),
        "overlap": both / either if either else 1.0,
    }
