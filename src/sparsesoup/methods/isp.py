"""Instant Soup Pruning: a few short, noisy trainings in place of each full IMP round."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.granularity import Pattern, Structure
from sparsesoup.core.masks import Masks
from sparsesoup.core.masks import sparsity as sparsity_of
from sparsesoup.core.schedules import ConstantRate, CubicSchedule
from sparsesoup.methods.base import Method
from sparsesoup.methods.weak_masks import (
    Moments,
    consensus_masks,
    prune_to_soup,
    superpose_masks,
    weak_mask,
    weak_mask_phase,
)
from sparsesoup.training.config import TrainingOverrides
from sparsesoup.training.forks import Tensors
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import TrainState

PROTOCOLS = (
    TrainingOverrides(rate=1.0, weight_decay=0.0, share=0.5),
    TrainingOverrides(rate=2.0, weight_decay=0.1, dropout=0.0, share=0.5),
    TrainingOverrides(rate=0.5, weight_decay=0.0, dropout=0.2, share=0.5),
    TrainingOverrides(rate=1.5, weight_decay=0.01, dropout=0.1, share=0.25),
)


@dataclass(frozen=True, kw_only=True)
class InstantSoup(Method):
    """Stages of training and consensus of weak masks, then training at constant sparsity. Jaiswal et al. 2023.

    By default every stage ends exactly at its target: it keeps the weights with most votes, then with the largest mean
    look-ahead magnitude. The look-ahead weights are discarded; the main run continues and is never rewound.

    Args:
        stages: number of prunings; the targets rise on a cubic curve.
        weak_masks: trainings per stage whose masks vote; 0 is the same schedule without a soup.
        look_ahead: steps of each, as a share of T.
        finish: share of the main steps after the last pruning.
        budget: included (main and weak steps together are T) or extra (the main run has T, weak steps are additional).
        protocols: training settings of the weak runs; used in turn. A rate of two numbers is a range to sample from.
        moments: optimizer moments of the weak runs, inherited from the main run or fresh.
        merge: merge of the weak masks; votes (exactly at the target), union (kept by any, so a stage removes less) or
            intersection (kept by all, so it removes more); the last stage uses votes, exactly at the target sparsity.
        structure: structure to prune: weights, rows, columns, heads, units, heads-and-units or features-and-units.
    """

    stages: int = 5
    weak_masks: int = 4
    look_ahead: float = 0.005
    finish: float = 0.5
    budget: Literal["included", "extra"] = "included"
    protocols: tuple[TrainingOverrides, ...] = PROTOCOLS
    moments: Moments = "inherited"
    merge: Literal["votes", "union", "intersection"] = "votes"
    structure: Structure = "weights"

    def __post_init__(self) -> None:
        require(self.stages >= 1, "stages", "at least 1", self.stages)
        require(0 <= self.weak_masks <= 255, "weak_masks", "0 to 255", self.weak_masks)
        require(0 < self.look_ahead < 1, "look_ahead", "a share of T in (0, 1)", self.look_ahead)
        require(0 < self.finish < 1, "finish", "a share of T in (0, 1)", self.finish)
        require(bool(self.protocols), "protocols", "one or more", self.protocols)
        for name in ("look_ahead", "budget", "protocols", "moments", "merge"):
            if not self.weak_masks and getattr(self, name) != getattr(InstantSoup, name):
                raise UserError("has no effect with weak_masks 0; leave it out, or set weak_masks", name)

    def weak_steps(self, total: int) -> int:
        """Return the weak steps of the whole run at T = `total`."""
        return self.stages * self.weak_masks * max(1, round(self.look_ahead * total))

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return stages of training, forks and pruning: T steps, plus the weak steps if these are extra."""
        masks = f" of {self.weak_masks} weak masks" if self.weak_masks else ", without a soup,"
        size.require_fit(self._pruning_steps, f"isp with {self.stages} stages{masks}")
        main, done, phases = self._main_steps(size.steps), 0, list[Phase]()
        rate = size.rate_schedule(main)
        for i, at in enumerate(self._pruning_steps(size.steps)):
            name, target = f"stage-{i + 1}", CubicSchedule(0, self.stages).sparsity_at(i + 1, sparsity)
            phases += [
                Phase(name=f"{name}-train", steps=at - done, rate=rate),
                *(self._weak_mask(size, name, target, rate(at), i, j) for j in range(self.weak_masks)),
                Phase(name=f"{name}-soup", end=partial(self._superpose_and_prune, target, sparsity)),
            ]
            done = at
        return [*phases, Phase(name="finish", steps=main - done, rate=rate)]

    def notes(self, run: ActiveRun) -> dict[str, Any]:
        """Return the weak steps as a share of T."""
        return {"budget": self.budget, "weak_share": self.weak_steps(run.problem.steps) / run.problem.steps}

    def _main_steps(self, total: int) -> int:
        return total - (self.weak_steps(total) if self.budget == "included" else 0)

    def _pruning_steps(self, total: int) -> list[int]:
        """Return the pruning steps at T = `total`; none if a stage or the finish would have no step."""
        main = self._main_steps(total)
        steps = [round((1 - self.finish) * main * (i + 1) / self.stages) for i in range(self.stages)]
        return steps if steps[0] >= 1 and steps[-1] < main and len(set(steps)) == self.stages else []

    def _weak_mask(self, size: RunSize, stage: str, target: float, rate: float, i: int, j: int) -> Phase:
        protocol = self.protocols[j % len(self.protocols)]
        factor, steps = protocol.rate_factor(size.seed, "weak", i, j), max(1, round(self.look_ahead * size.steps))
        end = partial(self._select_weak_mask, target)
        return weak_mask_phase(stage, steps, protocol, ConstantRate(factor * rate), (i, j), end, self.moments)

    def _select_weak_mask(self, target: float, run: ActiveRun) -> Tensors:
        goal = max(target, sparsity_of(run.state.masks))  # an intersection may have exceeded it
        return weak_mask(run.state, goal, self.groups_of(run.state.targets))

    def _superpose_and_prune(self, target: float, final: float, run: ActiveRun) -> None:
        state, groups = run.state, self.groups_of(run.state.targets)
        masks = self._merged_masks(state, target, final, groups)
        prune_to_soup(state, self.weak_masks, masks, groups, plain=None if self.weak_masks else masks)

    def _merged_masks(self, state: TrainState, target: float, final: float, groups: Pattern) -> Masks:
        if not self.weak_masks:
            return self.select_masks(state, target, within=state.masks)
        if self.merge == "votes" or target == final:
            return consensus_masks(state, target, groups)
        return superpose_masks(state, self.merge, self.weak_masks, final, groups)
