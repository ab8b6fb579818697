"""Instant Soup Pruning as in its released code: for reference, not recommended. Jaiswal et al. 2023."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Literal

from sparsesoup.core.errors import require
from sparsesoup.core.masking import check_sparsity
from sparsesoup.core.masks import sparsity as sparsity_of
from sparsesoup.methods.base import Method
from sparsesoup.methods.isp_paper import weak_share
from sparsesoup.methods.weak_masks import Sets, prune_to_soup, superpose_masks, weak_mask, weak_mask_phase
from sparsesoup.training.config import TrainingOverrides
from sparsesoup.training.forks import Tensors
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class InstantSoupCode(Method):
    """ISP as in the released scripts: weak runs with a fresh optimizer that stay in warm-up; their union unchanged.

    The defaults are those of the script whose weak runs differ only in their rows; the settings give the other ones.
    The merged masks are used without adjustment. The stages end within five points of the target; after one more
    training of the main run a one-shot pruning reaches it. Weak steps are on top of T.

    Args:
        stage: epochs of the main run per stage.
        growing: stage i trains (i + 1) times as long, at most an epoch.
        weak: epochs of each weak run.
        cut: share of the remaining weights removed by a weak mask.
        weak_masks: weak masks per stage.
        near: distance below the target sparsity at which the stages end.
        warmup: warm-up steps from 0 in each weak run.
        schedule: steps after which the rate of a weak run is back at 0; it stays 0 afterwards.
        protocols: training settings of the weak runs; used in turn. A rate of two numbers is a range to sample from.
        rate_of: base of a protocol's rate factor: the main run's current learning rate, or its peak.
        merge: union (kept by any weak mask) or intersection (kept by all).
    """

    stage: float = 0.5
    growing: bool = False
    weak: float = 0.1
    cut: float = 0.1
    weak_masks: int = 5
    near: float = 0.05
    warmup: int = 500
    schedule: int = 1000
    protocols: tuple[TrainingOverrides, ...] = (TrainingOverrides(),)
    rate_of: Literal["now", "peak"] = "now"
    merge: Sets = "union"

    def __post_init__(self) -> None:
        require(0 < self.stage < math.inf, "stage", "above 0", self.stage)
        require(0 < self.weak < math.inf, "weak", "above 0", self.weak)
        require(0 < self.cut < 1, "cut", "in (0, 1)", self.cut)
        require(0 <= self.near < 1, "near", "in [0, 1)", self.near)
        require(1 <= self.weak_masks <= 255, "weak_masks", "1 to 255", self.weak_masks)
        require(self.warmup >= 0, "warmup", "0 or more", self.warmup)
        require(self.warmup < self.schedule, "schedule", f"above warmup ({self.warmup})", self.schedule)
        require(bool(self.protocols), "protocols", "one or more", self.protocols)

    def doubts(self, problem: Problem, sparsity: float) -> list[str]:
        """Return notes for the user before the first step."""
        steps = self._weak_steps(problem.size)
        if steps > self.schedule:
            why = f"stand still after {self.schedule}, where their rate is 0; raise --method.schedule"
            return [f"the weak runs of isp-code have {steps} steps and {why}"]
        if steps == 1 and self.warmup:
            return ["the weak runs of isp-code have one step, at a rate of 0, and move nothing; raise --method.weak"]
        return []

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return as many stages as fit into T, skipped near the target: T main steps, weak ones on top."""
        check_sparsity(sparsity)
        least = 1 + math.ceil(math.log(1 - max(sparsity - self.near, 0.0)) / math.log(1 - self.cut))
        lengths = [self._stage_steps(size, i) for i in range(least)]
        kind = "growing stages from" if self.growing else "or more stages of"
        size.require_steps(sum(lengths) + 1, f"isp-code with {least} {kind} {lengths[0]} steps")
        near, at, phases = partial(self._is_near_target, sparsity), 0, list[Phase]()
        for i in self._count_stages(size):
            name, steps = f"stage-{i + 1}", self._stage_steps(size, i)
            at += steps
            phases += [
                Phase(name=f"{name}-train", steps=steps, at_most=True, skip=near),
                *(self._weak_mask(size, name, at, i, j, near) for j in range(self.weak_masks)),
                Phase(name=f"{name}-soup", end=partial(self._superpose_and_prune, sparsity), skip=near),
            ]
        stages = sum(phase.label == "main" and phase.steps > 0 for phase in phases)
        last = self._stage_steps(size, stages)
        return [
            *phases,
            Phase(name="last-stage-train", steps=last, at_most=True, lasts=self._last_stage),
            Phase(name="adjust", end=partial(self._adjust_masks, sparsity)),
            Phase(name="finish", steps=size.steps - at - last, until=size.steps),
        ]

    def notes(self, run: ActiveRun) -> dict[str, Any]:
        """Return the weak steps as a share of T."""
        return weak_share(run)

    def _stage_steps(self, size: RunSize, stage: int) -> int:
        epochs = min(self.stage * (stage + 1), max(self.stage, 1.0)) if self.growing else self.stage
        return max(1, round(epochs * size.steps_per_epoch))

    def _weak_steps(self, size: RunSize) -> int:
        return max(1, round(self.weak * size.steps_per_epoch))

    def _count_stages(self, size: RunSize) -> Iterator[int]:
        """Yield the stages with weak masks: T has steps for each, and for another stage of the main run after it."""
        end = self._stage_steps(size, 0)
        for i in count():
            end += self._stage_steps(size, i + 1)
            if end >= size.steps:
                return
            yield i

    def _is_near_target(self, sparsity: float, state: TrainState) -> bool:
        return sparsity - sparsity_of(state.masks) < self.near

    def _last_stage(self, run: ActiveRun) -> int:
        """Return the length of the stage after those that were done."""
        return self._stage_steps(run.problem.size, len(run.state.notes.get("stages", ())))

    def _weak_mask(
        self, size: RunSize, stage: str, at: int, i: int, j: int, near: Callable[[TrainState], bool]
    ) -> Phase:
        protocol = self.protocols[j % len(self.protocols)]
        main = size.rate_schedule()(at) if self.rate_of == "now" else size.training.learning_rate
        rate = _WeakRate(protocol.rate_factor(size.seed, "weak", i, j) * main, at, self.warmup, self.schedule)
        end, steps = self._select_weak_mask, self._weak_steps(size)
        return weak_mask_phase(stage, steps, protocol, rate, (i, j), end, "fresh", near)

    def _select_weak_mask(self, run: ActiveRun) -> Tensors:
        now = sparsity_of(run.state.masks)
        return weak_mask(run.state, now + self.cut * (1 - now))

    def _superpose_and_prune(self, sparsity: float, run: ActiveRun) -> None:
        prune_to_soup(run.state, self.weak_masks, superpose_masks(run.state, self.merge, self.weak_masks, sparsity))

    def _adjust_masks(self, sparsity: float, run: ActiveRun) -> None:
        if sparsity_of(run.state.masks) < sparsity:
            run.state.set_masks_(self.select_masks(run.state, sparsity, within=run.state.masks))


@dataclass(frozen=True)
class _WeakRate:
    """Learning rate of a weak run: linear from 0 up to `peak`, then linear down to 0."""

    peak: float
    start: int
    warmup: int
    schedule: int

    def __call__(self, step: int) -> float:
        step -= self.start
        if step < self.warmup:
            return self.peak * (step / self.warmup)
        return self.peak * (max(self.schedule - step, 0) / (self.schedule - self.warmup))
