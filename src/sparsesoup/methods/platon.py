"""PLATON: prune by an upper confidence bound on the moving average of importance."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from sparsesoup.core.errors import require
from sparsesoup.core.granularity import Element, Pattern, Structure
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import apply_masks_
from sparsesoup.core.schedules import CubicSchedule, require_ramp
from sparsesoup.methods.base import Method
from sparsesoup.methods.scores.averages import ImportanceAverages, first_order_sensitivity
from sparsesoup.training.hooks import Hook
from sparsesoup.training.plan import ActiveRun, LoopHooks, Phase
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import TrainState

AVERAGES = 3  # copies of the weights: importance, uncertainty, and the sum of a window


@dataclass(frozen=True, kw_only=True)
class Platon(Method):
    """Global pruning by importance times uncertainty, both moving averages of |g w|. Zhang et al. 2022.

    A weight zeroed by a pruning is still trained, with its moments, and may be kept by the next one. The last pruning
    makes the masks final; the rest of T is a cool-down with them.

    Args:
        fast: decay of the moving average of the importance.
        slow: decay of the moving average of the uncertainty.
        every_steps: steps between prunings.
        window: steps whose mean sensitivity is one observation; every_steps must be a multiple of it.
        start: share of T before the cubic ramp of the sparsity.
        stop: share of T at the last pruning, which may come up to every_steps - 1 steps earlier.
        structure: structure to prune: weights, rows, columns, heads, units, heads-and-units or features-and-units.
    """

    fast: float = 0.85
    slow: float = 0.95
    every_steps: int = 10
    window: int = 10
    start: float = 0.1
    stop: float = 0.7
    structure: Structure = "weights"

    def __post_init__(self) -> None:
        check_ramp(self)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the ramp of the sparsity, and a training with the final masks."""
        ramp = pruning_ramp(size, self.start, self.stop, self.every_steps)
        averages = ImportanceAverages(
            sensitivity=first_order_sensitivity, fast=self.fast, slow=self.slow, window=self.window, origin=ramp.start
        )
        loop = partial(ramp_hooks, self, ramp, sparsity, averages)
        return [
            Phase(name="ramp", steps=ramp.stop, loop=loop, copies=AVERAGES),
            Phase(name="finish", steps=size.steps - ramp.stop),
        ]


def check_ramp(method: Any) -> None:
    """Raise a UserError if the settings of a method's ramp are invalid."""
    window, every_steps = method.window, method.every_steps
    require_ramp(method.start, method.stop)
    require(0.0 <= method.fast < 1.0, "fast", "in [0, 1)", method.fast)
    require(0.0 <= method.slow < 1.0, "slow", "in [0, 1)", method.slow)
    require(window >= 1, "window", "at least 1", window)
    require(
        every_steps >= 1 and every_steps % window == 0, "every_steps", f"a multiple of window ({window})", every_steps
    )


def pruning_ramp(size: RunSize, start: float, stop: float, every_steps: int) -> CubicSchedule:
    """Return the schedule between two shares of T: a whole number of intervals, at least one.

    Raises: UserError if T is too small for that.
    """

    def gaps(total: int) -> int:
        return int((stop - start) * total / every_steps + 1e-9)  # rounded down: the last one must fit

    size.require_fit(gaps, f"a ramp of 2 prunings, {every_steps} steps apart, over {stop - start:.0%} of T")
    begin = round(start * size.steps)
    return CubicSchedule(begin, begin + every_steps * gaps(size.steps), every_steps)


def ramp_hooks(
    method: Method, ramp: CubicSchedule, sparsity: float, averages: ImportanceAverages, run: ActiveRun
) -> LoopHooks:
    """Return what happens inside the loop: averages of the importance are kept, and prune on the schedule."""
    hook = reversible_pruning_hook(ramp, sparsity, averages, method.groups_of(run.state.targets))
    return LoopHooks([hook], observe=averages.observe_gradients)


def reversible_pruning_hook(
    ramp: CubicSchedule, sparsity: float, averages: ImportanceAverages, pattern: Pattern = Element
) -> Hook:
    """Return a hook that zeroes the weights below the threshold, ranking all of them again; the last time for good.

    Until then their gradients and moments are kept, so that weights can return.
    """

    def prune(state: TrainState) -> None:
        if not ramp.is_pruning_step(state.step):
            return
        goal = ramp.sparsity_at(state.step, sparsity)
        masks = topk_masks(averages.current_scores(state), goal, pattern=pattern)
        if state.step < ramp.stop:
            apply_masks_(state.prunable_parameters(), masks)
            state.masked = goal
        else:
            averages.clear_averages_(state)
            state.set_masks_(masks)
            state.masked = 0.0

    return prune
