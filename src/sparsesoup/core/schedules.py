"""Schedules: step -> sparsity, and step -> learning rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from sparsesoup.core.errors import UserError, require

MOST_STEPS = 1 << 40
MOST_ROUNDS = 10_000  # limit for a geometric schedule: a longer list could exhaust memory


def require_ramp(start: float, stop: float, whole: bool = False) -> None:
    """Raise a UserError unless 0 <= start < stop < 1, as shares of T; `whole` allows stop 1."""
    require(start >= 0.0, "start", "a share of T, at least 0", start)
    require(start < stop, "start", "below stop", f"{start:g}, with stop at {stop:g}; lower start or raise stop")
    require(stop <= 1.0 if whole else stop < 1.0, "stop", f"a share of T, {'at most' if whole else 'below'} 1", stop)


@dataclass(frozen=True)
class CubicSchedule:
    """Cubic sparsity schedule, fast early and slow late: s_t = s_f + (s_i - s_f)(1 - t)^3. Zhu & Gupta 2017, eq. 1.

    Args:
        start, stop: steps between which the sparsity rises.
        every: steps from one pruning to the next; there is always one at `stop`.
        initial: sparsity at `start`.
    """

    start: int
    stop: int
    every: int = 1
    initial: float = 0.0

    def is_pruning_step(self, step: int) -> bool:
        """Return True if this step is followed by pruning."""
        return step == self.stop or (self.start <= step < self.stop and (step - self.start) % self.every == 0)

    def sparsity_at(self, step: int, final: float) -> float:
        """Return the target sparsity at this step.

        >>> CubicSchedule(0, 10).sparsity_at(10, 0.9)
        0.9
        """
        if step >= self.stop:
            return final
        t = max((step - self.start) / max(self.stop - self.start, 1), 0.0)
        return final + (min(self.initial, final) - final) * (1.0 - t) ** 3


def geometric_sparsities(cut: float, final: float) -> list[float]:
    """Return the sparsities of rounds that each remove a share `cut` of the remaining weights, ending at `final`.

    >>> [round(s, 3) for s in geometric_sparsities(0.2, 0.5)]
    [0.2, 0.36, 0.488, 0.5]
    """
    if not 0.0 <= final < 1.0:
        raise ValueError(f"sparsity must lie in [0, 1), got {final}")
    if final and math.log1p(-final) / math.log1p(-cut) > MOST_ROUNDS:
        raise UserError(
            f"a cut of {cut:g} a round takes more than {MOST_ROUNDS:,} rounds to sparsity {final:g}; choose a larger"
        )
    goals, remaining = [], 1.0 - cut
    while 1.0 - remaining < final - 1e-9:
        goals.append(1.0 - remaining)
        remaining *= 1.0 - cut
    return [*goals, final]


@dataclass(frozen=True)
class LinearWarmupDecay:
    """Learning rate with linear warm-up from 0 over `warmup` steps, then linear decay to 0 at `total`."""

    peak: float
    warmup: int
    total: int

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        return self.peak * max(self.total - step, 0) / max(self.total - self.warmup, 1)


@dataclass(frozen=True)
class CyclicLinearDecay:
    """Learning rate reset to `peak` at each pruning, with linear decay to `low` before the next.

    Args:
        peak, low: highest and lowest rate of a cycle.
        start: first pruning; the cycle before it begins at step 0.
        stop: last pruning; the cycle after it ends at `total`.
        every: steps of a cycle between prunings.
        total: steps of the whole run.
    """

    peak: float
    low: float
    start: int
    stop: int
    every: int
    total: int

    def __call__(self, step: int) -> float:
        if step < self.start:
            share = step / self.start
        elif step < self.stop:
            share = (step - self.start) % self.every / self.every
        else:
            share = min((step - self.stop) / max(self.total - self.stop, 1), 1.0)
        return self.peak - (self.peak - self.low) * share


@dataclass(frozen=True)
class ConstantRate:
    """The same learning rate at every step."""

    rate: float

    def __call__(self, step: int) -> float:
        return self.rate


@dataclass(frozen=True)
class ScaledRate:
    """Another learning rate schedule times a factor, begun at a later step.

    Args:
        schedule: step -> learning rate.
        factor: factor on it.
        start: step at which the schedule begins.
    """

    schedule: LinearWarmupDecay
    factor: float = 1.0
    start: int = 0

    def __call__(self, step: int) -> float:
        return self.factor * self.schedule(step - self.start)


def min_feasible_steps(fits: Callable[[int], object], total: int = 1) -> int | None:
    """Return a T above `total` at which a schedule fits although it does not at T - 1; None if there is none.

    >>> min_feasible_steps(lambda total: round(0.3 * total) >= 4)
    12
    """
    low, high = total, total + 1
    while not fits(high):  # in steps of 1 at first, since rounding may let a schedule fit T and not T + 1
        low, high = high, high + max(1, high // 64)
        if high > MOST_STEPS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
