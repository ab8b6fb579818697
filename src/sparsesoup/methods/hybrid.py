"""Hybrid movement pruning: blocks or heads of attention, units of feed-forward layers. Lagunas et al. 2021."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.granularity import Block, CoupledGroups
from sparsesoup.core.groups import block_groups
from sparsesoup.core.schedules import ScaledRate
from sparsesoup.core.targets import attention_head_groups, feed_forward_groups
from sparsesoup.methods.gates.density import group_sizes
from sparsesoup.methods.gates.penalty_controller import SparsityController
from sparsesoup.methods.learned_masks import (
    GateSetup,
    LearnedMasks,
    PhaseShares,
    initial_scores,
    rate_of_scores,
    straight_through_gates,
)
from sparsesoup.methods.refill import refill_
from sparsesoup.methods.soft_movement_and_l0 import check_floor, check_penalty
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize


@dataclass(frozen=True, kw_only=True)
class HybridMovement(LearnedMasks):
    """Soft movement pruning with masks that can be cut out of the model. Lagunas et al. 2021, sec. 3.

    One score per feed-forward unit, shared by its row in and its column out. In attention one score per tile of each
    matrix; or one score per head in each of query, key, value and output, where any of the four keeps the head. Other
    matrices are masked in tiles. The bias of a fully masked row is masked too.

    Args:
        attention: tiles, or heads.
        tile: tile masked as one group in attention matrices, if tiles.
        attention_weight: weight of attention in the penalty.
        feed_forward_weight: weight of the units in the penalty.
        score_rate: peak learning rate of the scores.
        threshold: final threshold of sigmoid(score).
        penalty: final weight of the mean sigmoid(score) in the loss; default: controlled to reach the sparsity.
        floor: share of every matrix, and of the units of a block, kept whatever the threshold (published: 0.005).
        phases: sparsity schedule.
        refill: share of T for training after all weights of the kept heads and units are restored; 0: they are not. The
            sparsity is then that of whole heads and units, below the target.
        noise: standard deviation of the restored weights, as a share of the root mean square of the kept ones.
    """

    attention: Literal["tiles", "heads"] = "tiles"
    tile: Block = field(default_factory=lambda: Block(32, 32))
    attention_weight: float = 1.0
    feed_forward_weight: float = 1.0
    score_rate: float = 5e-2
    threshold: float = 0.1
    penalty: float | None = None
    floor: float = 0.0
    phases: PhaseShares = field(default_factory=PhaseShares)
    refill: float = 0.0
    noise: float = 0.1

    def __post_init__(self) -> None:
        check_penalty(self.score_rate, self.penalty, self.threshold)
        check_floor(self.floor)
        weights = {"attention_weight": self.attention_weight, "feed_forward_weight": self.feed_forward_weight}
        for name, weight in weights.items():
            require(0 <= weight < math.inf and any(weights.values()), name, "0 or more, and not 0 for both", weight)
        require(0 <= self.refill <= 1, "refill", "a share of T in [0, 1]", self.refill)
        require(0 <= self.noise < math.inf, "noise", "0 or more", self.noise)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the phases of learned masks, and those of the refilled model: T + `refill` T steps.

        The masks end at the nearest group boundary at or above the sparsity.
        """
        phases = super().plan(size, sparsity)
        if not self.refill:
            return phases
        steps = max(1, round(self.refill * size.steps))
        first = size.steps - steps
        # Another warm-up and decay, on rows in another order.
        rate = ScaledRate(size.rate_schedule(steps), start=first)
        return [
            *phases,
            Phase(name="refill", end=partial(self._refill, steps), rewinds_to=first),
            Phase(name="train-on", steps=steps, stream=("refill",), rate=rate),
        ]

    def _refill(self, steps: int, run: ActiveRun) -> None:
        refill_(run.state, run.problem, steps, self.noise)

    def peak_score_rate(self, size: RunSize) -> float:
        """Return the peak learning rate of the scores."""
        return self.score_rate

    def fall_to_close(self) -> float:
        """Return the distance that a score has to fall before its gate closes."""
        return -math.log(self.threshold / (1 - self.threshold))

    def make_gates(self, problem: Problem, sparsity: float) -> GateSetup:
        """Return the gates, with their controller."""
        banded, pooled = self._coupled_groups(problem)
        groups = (*banded, *pooled)
        weights = [self.attention_weight] * len(banded) + [self.feed_forward_weight] * len(pooled)
        lead = SparsityController(
            plan=self.phases.pruning_schedule(problem.steps), end=self.phases.pruning_end(problem.steps),
            sparsity=sparsity,
            rate=rate_of_scores(problem.size, self.score_rate),
            areas=group_sizes(groups, problem.targets), weights=weights, families=_group_families(banded, pooled),
            penalty=self.penalty, threshold=self.threshold, floor=self.floor,
        )  # fmt: skip
        learned = [
            *initial_scores(problem, tuple(banded), own=self.attention == "heads"),
            *initial_scores(problem, tuple(pooled)),
        ]
        make = straight_through_gates(learned, shift=0.0)
        return GateSetup(groups, make, lead, "global", lead.penalty_term, True, self.floor)

    def _coupled_groups(self, problem: Problem) -> tuple[list[CoupledGroups], list[CoupledGroups]]:
        """Return (coupled groups of attention and of other matrices, coupled groups of the units)."""
        targets = problem.targets
        pooled, banded = (
            feed_forward_groups(targets),
            attention_head_groups(targets) if self.attention == "heads" else [],
        )
        if self.attention == "heads" and not banded:
            raise UserError(
                "this model's attention has no heads to prune (it lacks separate query, key, value and output matrices "
                "of a known head width, or its heads share keys); set --method.attention tiles"
            )
        covered = {name for coupled in (*pooled, *banded) for name, _ in coupled.members}
        banded += block_groups({name: target for name, target in targets.items() if name not in covered}, self.tile)
        for coupled in (*pooled, *banded):
            coupled.num_groups({name: target.shape for name, target in targets.items()})
        return banded, pooled


def _group_families(banded: list[CoupledGroups], pooled: list[CoupledGroups]) -> tuple[str, ...]:
    """Return the family of each, as in nn_pruning: attention and feed-forward, of an encoder and of a decoder."""
    kinds = [("attention", coupled) for coupled in banded] + [("feed-forward", coupled) for coupled in pooled]
    return tuple(f"decoder {kind}" if "decoder" in coupled.members[0][0] else kind for kind, coupled in kinds)
