"""Instant Soup Pruning as in its paper, and as in its released code: for reference, not recommended."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal

from sparsesoup.core.errors import UserError
from sparsesoup.core.masking import check_sparsity, topk_masks
from sparsesoup.core.masks import sparsity as sparsity_of
from sparsesoup.core.masks import union
from sparsesoup.core.schedules import LinearWarmupDecay, geometric_sparsities
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods.scores import magnitude
from sparsesoup.methods.weak_masks import (
    Sets,
    draw_weak_mask,
    draw_weak_masks,
    masks_with_quorum,
    prune_to_soup,
    superpose_masks,
)
from sparsesoup.training.forks import Tensors
from sparsesoup.training.loop import TrainingOverrides, train, train_to
from sparsesoup.training.problem import Problem, require_steps
from sparsesoup.training.state import TrainState

PAPER_PROTOCOLS = (
    TrainingOverrides(rate=1.0, weight_decay=0.0, share=0.5),
    TrainingOverrides(rate=2.0, weight_decay=0.0, share=0.5),
    TrainingOverrides(rate=0.5, weight_decay=0.0, share=0.5),
    TrainingOverrides(rate=1.0, weight_decay=0.1, share=0.5),
)


@dataclass(frozen=True, kw_only=True)
class InstantSoupPaper:
    """ISP as published: stage i trains (i + 1) t steps, then N weak masks, their union, one-shot adjustment.

    Read literally, the soup has no effect: the union contains the main run's own one-shot mask, and adjusting it by
    |theta| to the stage's sparsity gives that mask. The report's `decided` shows it. Weak steps are on top of T.

    Args:
        stage: t, as a share of an epoch.
        cut: share of the remaining weights removed per stage.
        weak_masks: N, weak masks per stage.
        weak_steps: C, steps of each.
        protocols: training settings of the weak runs (the paper names learning rate and weight decay, without values).
    """

    stage: float = 0.1
    cut: float = 0.1
    weak_masks: int = 4
    weak_steps: int = 30
    protocols: tuple[TrainingOverrides, ...] = PAPER_PROTOCOLS

    def __post_init__(self) -> None:
        if not (0 < self.stage < math.inf and 0 < self.cut < 1 and 1 <= self.weak_masks <= 255) or self.weak_steps < 1:
            raise UserError(
                f"isp-paper needs stage > 0, cut in (0, 1), weak_masks in 1..255, weak_steps >= 1, got {self}"
            )

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """Return the ticket after T main steps and the weak steps on top."""
        t = max(1, round(self.stage * problem.steps_per_epoch))
        goals = geometric_sparsities(self.cut, sparsity)
        last = t * len(goals) * (len(goals) + 1) // 2
        require_steps(problem, last + 1, f"isp-paper with {len(goals)} growing stages of {t} steps and more")
        state, rate = problem.start_run(), problem.rate_schedule()
        for i, goal in enumerate(goals):
            problem.journal.run_stage(f"stage-{i + 1}-train", state, train, state, problem, t * (i + 1))
            tasks = [(goal, self.protocols[j % len(self.protocols)], rate, (i, j)) for j in range(self.weak_masks)]
            draw_weak_masks(problem, state, f"stage-{i + 1}", self._look_ahead, tasks)
            problem.journal.run_stage(f"stage-{i + 1}-soup", state, self._unite_and_prune, state, goal)
        problem.journal.run_stage("finish", state, train, state, problem, problem.steps - last)
        return problem.finish_run(state, budget="extra", weak_share=self._weak_steps(len(goals)) / problem.steps)

    def _weak_steps(self, stages: int) -> int:
        return stages * self.weak_masks * self.weak_steps

    def _look_ahead(
        self,
        problem: Problem,
        state: TrainState,
        goal: float,
        protocol: TrainingOverrides,
        rate: LinearWarmupDecay,
        path: tuple[int, int],
    ) -> Tensors:
        now = protocol.rate_factor(problem.seed, "weak", *path) * rate(state.step)
        return draw_weak_mask(problem, state, self.weak_steps, goal, protocol, lambda step: now, path)

    def _unite_and_prune(self, state: TrainState, goal: float) -> None:
        scores = magnitude(state.prunable_parameters())
        superposed = union([masks_with_quorum(state, 1), topk_masks(scores, goal, within=state.masks)])
        prune_to_soup(state, self.weak_masks, topk_masks(scores, goal, within=superposed))


@dataclass(frozen=True, kw_only=True)
class InstantSoupCode:
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
        protocols: training settings of the weak runs; used in turn. A rate of two numbers is a range to draw from.
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
        shares = 0 < self.stage < math.inf and 0 < self.weak < math.inf and 0 < self.cut < 1 and 0 <= self.near < 1
        if not (shares and 1 <= self.weak_masks <= 255 and 0 <= self.warmup < self.schedule and self.protocols):
            names = ("stage", "weak", "cut", "near", "weak_masks", "warmup", "schedule")
            given = ", ".join(f"{name} {getattr(self, name):g}" for name in names)
            raise UserError(
                f"isp-code needs stage > 0, weak > 0, cut in (0, 1), near in [0, 1), weak_masks in 1..255, "
                f"warmup >= 0, schedule > warmup and one protocol or more, got {given}, protocols {len(self.protocols)}"
            )

    def doubts(self, problem: Problem, sparsity: float) -> list[str]:
        """Return notes for the user before the first step."""
        steps = self._weak_steps(problem)
        if steps > self.schedule:
            why = f"stand still after {self.schedule}, where their rate is 0; raise --method.schedule"
            return [f"the weak runs of isp-code have {steps} steps and {why}"]
        if steps == 1 and self.warmup:
            return ["the weak runs of isp-code have one step, at a rate of 0, and move nothing; raise --method.weak"]
        return []

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """Return the ticket after T main steps and the weak steps on top."""
        check_sparsity(sparsity)
        least = 1 + math.ceil(math.log(1 - max(sparsity - self.near, 0.0)) / math.log(1 - self.cut))
        lengths = [self._stage_steps(problem, i) for i in range(least)]
        kind = "growing stages from" if self.growing else "or more stages of"
        require_steps(problem, sum(lengths) + 1, f"isp-code with {least} {kind} {lengths[0]} steps")
        state = problem.start_run()
        for i in self._count_stages(problem):
            problem.journal.run_stage(f"stage-{i + 1}-train", state, self._main_stage, problem, state, i, sparsity)
            tasks = [(sparsity, i, j) for j in range(self.weak_masks)]
            draw_weak_masks(problem, state, f"stage-{i + 1}", self._look_ahead, tasks)
            problem.journal.run_stage(f"stage-{i + 1}-soup", state, self._superpose_and_prune, state, sparsity)
        problem.journal.run_stage("last-stage-train", state, self._last_stage, problem, state)
        problem.journal.run_stage("adjust", state, self._adjust_masks, state, sparsity)
        problem.journal.run_stage("finish", state, train_to, state, problem, problem.steps)
        weak_total = sum(int(c["steps"]) for label, c in problem.meter.to_json().items() if label == "weak")
        return problem.finish_run(state, budget="extra", weak_share=weak_total / problem.steps)

    def _stage_steps(self, problem: Problem, stage: int) -> int:
        epochs = min(self.stage * (stage + 1), max(self.stage, 1.0)) if self.growing else self.stage
        return max(1, round(epochs * problem.steps_per_epoch))

    def _weak_steps(self, problem: Problem) -> int:
        return max(1, round(self.weak * problem.steps_per_epoch))

    def _count_stages(self, problem: Problem) -> Iterator[int]:
        """Yield the stages with weak masks: T has room for each, and for another stage of the main run after it."""
        end = self._stage_steps(problem, 0)
        for i in count():
            end += self._stage_steps(problem, i + 1)
            if end >= problem.steps:
                return
            yield i

    def _is_near_target(self, state: TrainState, sparsity: float) -> bool:
        return sparsity - sparsity_of(state.masks) < self.near

    def _main_stage(self, problem: Problem, state: TrainState, stage: int, sparsity: float) -> None:
        if not self._is_near_target(state, sparsity):
            train(state, problem, self._stage_steps(problem, stage))

    def _last_stage(self, problem: Problem, state: TrainState) -> None:
        train(state, problem, self._stage_steps(problem, len(state.notes.get("stages", ()))))

    def _look_ahead(self, problem: Problem, state: TrainState, sparsity: float, i: int, j: int) -> Tensors:
        if self._is_near_target(state, sparsity):
            return {}
        steps, now = self._weak_steps(problem), sparsity_of(state.masks)
        protocol, goal, start = self.protocols[j % len(self.protocols)], now + self.cut * (1 - now), state.step
        main = problem.rate_schedule()(start) if self.rate_of == "now" else problem.training.learning_rate
        peak = protocol.rate_factor(problem.seed, "weak", i, j) * main

        def rate(step: int) -> float:
            return peak * self._warmup_factor(step - start)

        return draw_weak_mask(problem, state, steps, goal, protocol, rate, (i, j), moments="fresh")

    def _warmup_factor(self, step: int) -> float:
        """Return the factor on a weak run's rate: linear from 0 up to 1, then linear down to 0."""
        if step < self.warmup:
            return step / self.warmup
        return max(self.schedule - step, 0) / (self.schedule - self.warmup)

    def _superpose_and_prune(self, state: TrainState, sparsity: float) -> None:
        if not self._is_near_target(state, sparsity):
            prune_to_soup(state, self.weak_masks, superpose_masks(state, self.merge, self.weak_masks, sparsity))

    def _adjust_masks(self, state: TrainState, sparsity: float) -> None:
        if sparsity_of(state.masks) < sparsity:
            state.set_masks_(topk_masks(magnitude(state.prunable_parameters()), sparsity, within=state.masks))
