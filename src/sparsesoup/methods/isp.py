"""Instant Soup Pruning: a few short, noisy trainings in place of each full IMP round."""

from dataclasses import dataclass
from typing import Literal

from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Pattern, Structure
from sparsesoup.core.groups import resolve_groups, validate_groups
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import Masks
from sparsesoup.core.masks import sparsity as sparsity_of
from sparsesoup.core.schedules import CubicSchedule, LinearWarmupDecay
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods.scores import magnitude
from sparsesoup.methods.weak_masks import (
    Moments,
    consensus_masks,
    draw_weak_mask,
    draw_weak_masks,
    prune_to_soup,
    superpose_masks,
)
from sparsesoup.training.forks import Tensors
from sparsesoup.training.loop import TrainingOverrides, train_to
from sparsesoup.training.problem import Problem, require_schedule_fits
from sparsesoup.training.state import TrainState

PROTOCOLS = (
    TrainingOverrides(rate=1.0, weight_decay=0.0, share=0.5),
    TrainingOverrides(rate=2.0, weight_decay=0.1, dropout=0.0, share=0.5),
    TrainingOverrides(rate=0.5, weight_decay=0.0, dropout=0.2, share=0.5),
    TrainingOverrides(rate=1.5, weight_decay=0.01, dropout=0.1, share=0.25),
)


@dataclass(frozen=True, kw_only=True)
class InstantSoup:
    """Stages of training and consensus of weak masks, then training at constant sparsity. Jaiswal et al. 2023.

    By default every stage ends exactly at its target: it keeps the weights with most votes, then with the largest mean
    look-ahead magnitude. The look-ahead weights are discarded; the main run continues and is never rewound.

    Args:
        stages: number of prunings; the targets rise on a cubic curve.
        weak_masks: trainings per stage whose masks vote; 0 is the same schedule without a soup.
        look_ahead: steps of each, as a share of T.
        finish: share of the main steps after the last pruning.
        budget: charged (main and weak steps together are T) or extra (the main run has T, weak steps are additional).
        protocols: training settings of the weak runs; used in turn. A rate of two numbers is a range to draw from.
        moments: optimizer moments of the weak runs, inherited from the main run or fresh.
        merge: merge of the weak masks; votes (exactly at the target), union (kept by any, so a stage removes less) or
            intersection (kept by all, so it removes more); the last stage uses votes, exactly at the target sparsity.
        structure: structure to prune: weights, or whole rows, columns, heads, units, heads-and-units.
    """

    stages: int = 5
    weak_masks: int = 4
    look_ahead: float = 0.005
    finish: float = 0.5
    budget: Literal["charged", "extra"] = "charged"
    protocols: tuple[TrainingOverrides, ...] = PROTOCOLS
    moments: Moments = "inherited"
    merge: Literal["votes", "union", "intersection"] = "votes"
    structure: Structure = "weights"

    def __post_init__(self) -> None:
        if self.stages < 1 or not 0 <= self.weak_masks <= 255:
            raise UserError(f"isp needs stages >= 1 and weak_masks in 0..255, got {self.stages} and {self.weak_masks}")
        if not 0 < self.look_ahead < 1 or not 0 < self.finish < 1 or not self.protocols:
            raise UserError("isp needs look_ahead and finish in (0, 1) and at least one protocol")

    def weak_steps(self, total: int) -> int:
        """Return the weak steps of the whole run at T = `total`."""
        return self.stages * self.weak_masks * max(1, round(self.look_ahead * total))

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """Return the ticket after T steps, plus the weak steps if these are extra."""
        validate_groups(problem.targets, self.structure, sparsity)
        weak, main, prunings = (
            self.weak_steps(problem.steps),
            self._main_steps(problem.steps),
            self._pruning_steps(problem.steps),
        )
        masks = f" of {self.weak_masks} weak masks" if self.weak_masks else ", without a soup,"
        require_schedule_fits(problem, self._pruning_steps, f"isp with {self.stages} stages{masks}")
        state, plan, rate = problem.start_run(), CubicSchedule(0, self.stages), problem.rate_schedule(main)
        for i, at in enumerate(prunings):
            target, piece = plan.sparsity_at(i + 1, sparsity), f"stage-{i + 1}"
            problem.journal.run_stage(f"{piece}-train", state, train_to, state, problem, at, rate)
            draw_weak_masks(
                problem, state, piece, self._look_ahead, [(target, rate, i, j) for j in range(self.weak_masks)]
            )
            problem.journal.run_stage(f"{piece}-soup", state, self._superpose_and_prune, state, target, sparsity)
        problem.journal.run_stage("finish", state, train_to, state, problem, main, rate)
        return problem.finish_run(state, budget=self.budget, weak_share=weak / problem.steps)

    def _main_steps(self, total: int) -> int:
        return total - (self.weak_steps(total) if self.budget == "charged" else 0)

    def _pruning_steps(self, total: int) -> list[int]:
        """Return the pruning steps at T = `total`; none if a stage or the finish would have no step of its own."""
        main = self._main_steps(total)
        steps = [round((1 - self.finish) * main * (i + 1) / self.stages) for i in range(self.stages)]
        return steps if steps[0] >= 1 and steps[-1] < main and len(set(steps)) == self.stages else []

    def _look_ahead(
        self, problem: Problem, state: TrainState, target: float, rate: LinearWarmupDecay, i: int, j: int
    ) -> Tensors:
        steps, protocol = max(1, round(self.look_ahead * problem.steps)), self.protocols[j % len(self.protocols)]
        now, pattern = protocol.rate_factor(problem.seed, "weak", i, j) * rate(state.step), self._groups_of(state)
        goal = max(target, sparsity_of(state.masks))  # an intersection may have exceeded it
        return draw_weak_mask(problem, state, steps, goal, protocol, lambda step: now, (i, j), pattern, self.moments)

    def _superpose_and_prune(self, state: TrainState, target: float, final: float) -> None:
        prune_to_soup(state, self.weak_masks, self._merged_masks(state, target, final), self._groups_of(state))

    def _merged_masks(self, state: TrainState, target: float, final: float) -> Masks:
        pattern = self._groups_of(state)
        if not self.weak_masks:
            return topk_masks(magnitude(state.prunable_parameters()), target, pattern=pattern, within=state.masks)
        if self.merge == "votes" or target == final:
            return consensus_masks(state, target, pattern)
        return superpose_masks(state, self.merge, self.weak_masks, final, pattern)

    def _groups_of(self, state: TrainState) -> Pattern:
        return resolve_groups(state.targets, self.structure)
