"""Instant Soup Pruning as in its paper: for reference, not recommended. Jaiswal et al. 2023."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from sparsesoup.core.errors import require
from sparsesoup.core.masks import union
from sparsesoup.core.schedules import ConstantRate, geometric_sparsities
from sparsesoup.methods.base import Method
from sparsesoup.methods.weak_masks import masks_with_quorum, prune_to_soup, weak_mask, weak_mask_phase
from sparsesoup.training.config import TrainingOverrides
from sparsesoup.training.forks import Tensors
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.size import RunSize

PAPER_PROTOCOLS = (
    TrainingOverrides(rate=1.0, weight_decay=0.0, share=0.5),
    TrainingOverrides(rate=2.0, weight_decay=0.0, share=0.5),
    TrainingOverrides(rate=0.5, weight_decay=0.0, share=0.5),
    TrainingOverrides(rate=1.0, weight_decay=0.1, share=0.5),
)


@dataclass(frozen=True, kw_only=True)
class InstantSoupPaper(Method):
    """ISP as published: stage i trains (i + 1) t steps, then N weak masks, their union, one-shot adjustment.

    Read literally, the soup has no effect: the union contains the main run's own one-shot mask, and adjusting it by
    |theta| to the stage's sparsity gives that mask. The report's `changed` shows it. Weak steps are on top of T.

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
        require(0 < self.stage < math.inf, "stage", "a number of epochs above 0", self.stage)
        require(0 < self.cut < 1, "cut", "in (0, 1)", self.cut)
        require(1 <= self.weak_masks <= 255, "weak_masks", "1 to 255", self.weak_masks)
        require(self.weak_steps >= 1, "weak_steps", "at least 1", self.weak_steps)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return growing stages of training, forks and pruning: T main steps, and the weak steps on top."""
        t = max(1, round(self.stage * size.steps_per_epoch))
        goals = geometric_sparsities(self.cut, sparsity)
        last = t * len(goals) * (len(goals) + 1) // 2
        size.require_steps(last + 1, f"isp-paper with {len(goals)} growing stages of {t} steps and more")
        phases = list[Phase]()
        for i, goal in enumerate(goals):
            name, at = f"stage-{i + 1}", t * (i + 1) * (i + 2) // 2
            phases += [
                Phase(name=f"{name}-train", steps=t * (i + 1)),
                *(self._weak_mask(size, name, goal, at, i, j) for j in range(self.weak_masks)),
                Phase(name=f"{name}-soup", end=partial(self._unite_and_prune, goal)),
            ]
        return [*phases, Phase(name="finish", steps=size.steps - last)]

    def notes(self, run: ActiveRun) -> dict[str, Any]:
        """Return the weak steps as a share of T."""
        return weak_share(run)

    def _weak_mask(self, size: RunSize, stage: str, goal: float, at: int, i: int, j: int) -> Phase:
        protocol = self.protocols[j % len(self.protocols)]
        rate = ConstantRate(protocol.rate_factor(size.seed, "weak", i, j) * size.rate_schedule()(at))
        return weak_mask_phase(stage, self.weak_steps, protocol, rate, (i, j), partial(_select_weak_mask, goal))

    def _unite_and_prune(self, goal: float, run: ActiveRun) -> None:
        state = run.state
        plain = self.select_masks(state, goal, within=state.masks)
        superposed = union([masks_with_quorum(state, 1), plain])
        prune_to_soup(state, self.weak_masks, self.select_masks(state, goal, within=superposed), plain=plain)


def _select_weak_mask(goal: float, run: ActiveRun) -> Tensors:
    return weak_mask(run.state, goal)


def weak_share(run: ActiveRun) -> dict[str, Any]:
    """Return the notes of a method whose weak steps are on top of T: their share of T."""
    weak = run.problem.meter.costs.get("weak")
    return {"budget": "extra", "weak_share": (weak.steps if weak else 0) / run.problem.steps}
