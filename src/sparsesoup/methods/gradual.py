"""Gradual magnitude pruning during training."""

import math
from dataclasses import dataclass

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.granularity import Block, Element, Structure
from sparsesoup.core.masking import Scope
from sparsesoup.core.schedules import CubicSchedule, CyclicLinearDecay, require_ramp
from sparsesoup.methods.base import Method
from sparsesoup.training.hooks import Hook, ScheduledHook
from sparsesoup.training.loop import Rate
from sparsesoup.training.plan import ActiveRun, LoopHooks, Phase
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class GradualPruning(Method):
    """Magnitude pruning on a cubic schedule, then a cool-down at constant sparsity. Zhu & Gupta 2017.

    Args:
        start: share of T before the first pruning.
        stop: share of T at the last pruning; the rest is the cool-down.
        every: share of T between prunings.
        structure: structure to prune: weights, rows, columns, heads, units, heads-and-units or features-and-units.
        pattern: tile of weights pruned as one group; 1 x 1 is single weights.
        scope: ranking scope.
    """

    start: float = 0.1
    stop: float = 0.7
    every: float = 0.01
    structure: Structure = "weights"
    pattern: Block = Element
    scope: Scope = "global"

    def __post_init__(self) -> None:
        require_ramp(self.start, self.stop, whole=True)
        require(0.0 < self.every < math.inf, "every", "above 0", self.every)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return a single training that prunes."""
        size.require_steps(4, "a gradual schedule")
        return [train_on_schedule(self, self.pruning_schedule(size.steps), size.steps, sparsity)]

    def pruning_schedule(self, total: int, initial: float = 0.0) -> CubicSchedule:
        """Return the schedule at T = `total`, from a sparsity on."""
        steps = round(self.start * total), round(self.stop * total), max(1, round(self.every * total))
        return CubicSchedule(*steps, initial=initial)


@dataclass(frozen=True, kw_only=True)
class GradualStar(Method):
    """GMP*: a large first step, then cubic, with the learning rate reset at each pruning. Kurtic & Alistarh 2022.

    No warm-up: the rate decays from its peak to `low` of it before the first pruning, between prunings and after the
    last one. Published with distillation: train.distill with a dense teacher, alpha 1 and temperature 2.

    Args:
        first: sparsity of the first pruning, below the target; default: 0.7, but at most three quarters of the target.
        start: share of T before the first pruning.
        stop: share of T at the last pruning.
        prunings: number of prunings, including the first and the last.
        low: share of the peak learning rate at the end of each cycle.
        structure: structure to prune: weights, rows, columns, heads, units, heads-and-units or features-and-units.
    """

    first: float | None = None
    start: float = 0.1
    stop: float = 0.7
    prunings: int = 8
    low: float = 0.1
    structure: Structure = "weights"

    def __post_init__(self) -> None:
        require(0.0 <= self.low <= 1.0, "low", "a share of the peak learning rate in [0, 1]", self.low)
        require_ramp(self.start, self.stop)
        require(self.prunings >= 2, "prunings", "at least 2", self.prunings)
        require(self.first is None or 0.0 <= self.first < 1.0, "first", "a sparsity in [0, 1)", self.first)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return a single training that prunes, with its own learning rate."""
        total, gaps = size.steps, self.prunings - 1
        size.require_steps(round(gaps / (self.stop - self.start)) + 2, f"gmp-star with {self.prunings} prunings")
        begin = round(self.start * total)
        every = max(1, int((self.stop - self.start) * total / gaps + 1e-9))  # rounded down: the last one must fit
        schedule = CubicSchedule(begin, begin + every * gaps, every, initial=self._first_sparsity(sparsity))
        peak = size.training.learning_rate
        rate = CyclicLinearDecay(peak, self.low * peak, begin, schedule.stop, every, total)
        return [train_on_schedule(self, schedule, total, sparsity, rate)]

    def _first_sparsity(self, sparsity: float) -> float:
        """Return the sparsity of the first pruning."""
        if self.first is None:
            return min(0.7, 0.75 * sparsity)
        if self.first >= sparsity > 0:
            raise UserError(
                f"the first pruning of gmp-star would take all: first is {self.first:g}, the sparsity {sparsity:g}; "
                f"give a smaller --method.first, or leave it out"
            )
        return self.first


def train_on_schedule(
    method: Method, schedule: CubicSchedule, steps: int, sparsity: float, rate: Rate | None = None
) -> Phase:
    """Return a training of T steps that prunes by magnitude on a schedule; a pruning due at step 0 is done first."""

    def loop(run: ActiveRun) -> LoopHooks:
        return LoopHooks([pruning_hook(method, schedule, sparsity)], at_start=True)

    return Phase(name="train", steps=steps, rate=rate, loop=loop, masks_final=schedule.stop)


def pruning_hook(method: Method, schedule: CubicSchedule, sparsity: float) -> Hook:
    """Return a hook that prunes by magnitude on the schedule."""

    def prune(state: TrainState) -> None:
        goal = schedule.sparsity_at(state.step, sparsity)
        state.set_masks_(method.select_masks(state, goal, within=state.masks))

    return ScheduledHook(schedule.is_pruning_step, prune)
