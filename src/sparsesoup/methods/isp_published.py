"""Instant Soup Pruning as its paper says it, and as its released code does it: for reference, not recommended."""

import math
from dataclasses import dataclass

from sparsesoup.errors import UserError
from sparsesoup.forks import Tensors
from sparsesoup.masks import Masks, union
from sparsesoup.masks import sparsity as sparsity_of
from sparsesoup.methods.weak import count_votes, look_ahead, serve, vote
from sparsesoup.problem import Problem, need_steps
from sparsesoup.schedules import Decay, geometric
from sparsesoup.scores import magnitude
from sparsesoup.select import keep
from sparsesoup.state import TrainState
from sparsesoup.ticket import Ticket
from sparsesoup.train import Protocol, train, train_to

PAPER_PROTOCOLS = (
    Protocol(rate=1.0, weight_decay=0.0, share=0.5),
    Protocol(rate=2.0, weight_decay=0.0, share=0.5),
    Protocol(rate=0.5, weight_decay=0.0, share=0.5),
    Protocol(rate=1.0, weight_decay=0.1, share=0.5),
)


@dataclass(frozen=True, kw_only=True)
class InstantSoupPaper:
    """ISP as published: stage i trains (i + 1) t steps, then N weak masks, their union, one-shot adjustment.

    Read literally the soup decides nothing: the union holds the main run's own one-shot mask, and adjusting it by
    |theta| to the stage's level gives that mask back. The report's `decided` shows it. Weak steps come on top of T.

    Args:
        stage: t, as a share of an epoch.
        cut: share of the remaining weights that a stage removes.
        weak_masks: N, weak masks a stage.
        weak_steps: C, steps of each.
        protocols: how the weak runs differ (the paper names learning rate and weight decay, no values).
    """

    stage: float = 0.1
    cut: float = 0.1
    weak_masks: int = 4
    weak_steps: int = 30
    protocols: tuple[Protocol, ...] = PAPER_PROTOCOLS

    def __post_init__(self) -> None:
        if not (0 < self.stage < math.inf and 0 < self.cut < 1 and 1 <= self.weak_masks <= 255) or self.weak_steps < 1:
            raise UserError(
                f"isp-paper needs stage > 0, cut in (0, 1), weak_masks in 1..255, weak_steps >= 1, got {self}"
            )

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """The ticket after T main steps and the weak ones on top."""
        t = max(1, round(self.stage * problem.steps_per_epoch))
        goals = geometric(self.cut, sparsity)
        last = t * len(goals) * (len(goals) + 1) // 2
        need_steps(problem, last + 1, f"isp-paper with {len(goals)} growing stages of {t} steps and more")
        state, rate = problem.start(), problem.rate()
        for i, goal in enumerate(goals):
            problem.journal.piece(f"stage-{i + 1}-train", state, train, state, problem, t * (i + 1))
            tasks = [(goal, self.protocols[j % len(self.protocols)], rate, (i, j)) for j in range(self.weak_masks)]
            vote(problem, state, f"stage-{i + 1}", self._look, tasks)
            problem.journal.piece(f"stage-{i + 1}-soup", state, self._soup, state, goal)
        problem.journal.piece("finish", state, train, state, problem, problem.steps - last)
        return problem.ticket(state, budget="extra", weak_share=self._weak(len(goals)) / problem.steps)

    def _weak(self, stages: int) -> int:
        return stages * self.weak_masks * self.weak_steps

    def _look(
        self, problem: Problem, state: TrainState, goal: float, protocol: Protocol, rate: Decay, path: tuple[int, int]
    ) -> Tensors:
        now = protocol.factor(problem.seed, "weak", *path) * rate(state.step)
        return look_ahead(problem, state, self.weak_steps, goal, protocol, lambda step: now, path)

    def _soup(self, state: TrainState, goal: float) -> None:
        scores = magnitude(state.params())
        superposed = union([count_votes(state, 1), keep(scores, goal, within=state.masks)])
        serve(state, self.weak_masks, keep(scores, goal, within=superposed))


@dataclass(frozen=True, kw_only=True)
class InstantSoupCode:
    """ISP as the released scripts do it: weak runs differ in their rows alone and sit in a warm-up; union as it is.

    The union stands without adjustment, so a stage removes less than its members; within five points of the target one
    one-shot pruning does the rest. Weak steps come on top of T.

    Args:
        stage: epochs of the main run a stage.
        weak: epochs of each weak run.
        cut: share of the remaining weights that a weak mask removes.
        weak_masks: weak masks a stage.
        near: sparsity below the target at which the stages end.
        warmup: steps of the warm-up that each weak run begins anew.
    """

    stage: float = 0.5
    weak: float = 0.1
    cut: float = 0.1
    weak_masks: int = 5
    near: float = 0.05
    warmup: int = 500

    def __post_init__(self) -> None:
        shares = 0 < self.stage < math.inf and 0 < self.weak < math.inf and 0 < self.cut < 1 and 0 <= self.near < 1
        if not (shares and 1 <= self.weak_masks <= 255 and self.warmup >= 0):
            raise UserError(
                f"isp-code needs stage > 0, weak > 0, cut in (0, 1), near in [0, 1), weak_masks in 1..255, "
                f"warmup >= 0, got {self}"
            )

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """The ticket after T main steps and the weak ones on top."""
        stage = max(1, round(self.stage * problem.steps_per_epoch))
        weak = max(1, round(self.weak * problem.steps_per_epoch))
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}")
        least = 1 + math.ceil(math.log(1 - max(sparsity - self.near, 0.0)) / math.log(1 - self.cut))
        need_steps(problem, least * stage + 1, f"isp-code with {least} or more stages of {stage} steps")
        state, most = problem.start(), (problem.steps - 1) // stage
        for i in range(most):
            problem.journal.piece(f"stage-{i + 1}-train", state, self._main, problem, state, stage, sparsity)
            tasks = [(weak, sparsity, (i, j)) for j in range(self.weak_masks)]
            vote(problem, state, f"stage-{i + 1}", self._look, tasks)
            problem.journal.piece(f"stage-{i + 1}-soup", state, self._soup, state, sparsity)
        problem.journal.piece("adjust", state, self._adjust, state, sparsity)
        problem.journal.piece("finish", state, train_to, state, problem, problem.steps)
        weak_total = sum(int(c["steps"]) for label, c in problem.meter.to_json().items() if label == "weak")
        return problem.ticket(state, budget="extra", weak_share=weak_total / problem.steps)

    def _near(self, state: TrainState, sparsity: float) -> bool:
        return sparsity - sparsity_of(state.masks) < self.near

    def _main(self, problem: Problem, state: TrainState, steps: int, sparsity: float) -> None:
        if not self._near(state, sparsity):
            train(state, problem, steps)

    def _look(self, problem: Problem, state: TrainState, steps: int, sparsity: float, path: tuple[int, int]) -> Tensors:
        if self._near(state, sparsity):
            return {}
        now, peak, start = sparsity_of(state.masks), problem.training.learning_rate, state.step
        return look_ahead(
            problem,
            state,
            steps,
            now + self.cut * (1 - now),
            Protocol(),
            lambda step: peak * min(1.0, (step - start + 1) / max(self.warmup, 1)),
            path,
        )

    def _soup(self, state: TrainState, sparsity: float) -> None:
        if self._near(state, sparsity):
            return
        merged: Masks = count_votes(state, 1)
        if sparsity_of(merged) > sparsity:  # a last union may overshoot: adjust instead
            merged = keep(magnitude(state.params()), sparsity, within=state.masks)
        serve(state, self.weak_masks, merged)

    def _adjust(self, state: TrainState, sparsity: float) -> None:
        if sparsity_of(state.masks) < sparsity:
            state.prune_(keep(magnitude(state.params()), sparsity, within=state.masks))
