"""Slow twin of the scores that remember, written from the recursions in plain Python, one weight at a time."""

from collections.abc import Sequence


def averages(sensitivities: Sequence[float], window: int, origin: int, fast: float, slow: float) -> tuple[float, float]:
    """(I, U) of one weight after all steps; windows end at `origin` and every `window` steps before and after it."""
    importance = uncertainty = 0.0
    inside: list[float] = []
    for step, s in enumerate(sensitivities, start=1):
        inside.append(s)
        if (step - origin) % window == 0:
            mean = sum(inside) / len(inside)
            importance = fast * importance + (1 - fast) * mean
            uncertainty = slow * uncertainty + (1 - slow) * abs(mean - importance)
            inside = []
    return importance, uncertainty
