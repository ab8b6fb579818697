"""GRAIN: features of attention heads and feed-forward units in one ranking. Yang et al. 2023."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from sparsesoup.core.errors import require
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import Masks
from sparsesoup.core.masks import sparsity as sparsity_of
from sparsesoup.core.schedules import CubicSchedule, require_ramp
from sparsesoup.methods.base import Method
from sparsesoup.methods.live_features import close_empty_heads, sparsity_with_biases
from sparsesoup.methods.scores.group_importance import GroupImportance
from sparsesoup.training.plan import ActiveRun, LoopHooks, Phase
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import TrainState

Groups = Literal["rows", "columns", "heads", "units", "heads-and-units", "features-and-units"]


@dataclass(frozen=True, kw_only=True)
class Grain(Method):
    """Gradual pruning of attention features and feed-forward units in one ranking. Yang et al. 2023 ("GRAIN").

    A group is a feature between query and key, one between value and output, or a feed-forward unit, so that heads get
    widths of their own. Its importance is a moving average of |sum g w| over one side of it: the query with its bias,
    or the columns out. The gradient is that of the answers' loss alone, without the distance of hidden states from a
    teacher's. The best groups that fit are kept; a group that is gone stays gone. Where no value-output feature of a
    head is left, its query-key features go too.

    Published with a dense teacher and no labels: train.distill with alpha 1, temperature 8 and, for L blocks, hidden
    64 (L / 2 + 1): 448 for 12, 256 for 6.

    Args:
        decay: decay of the moving average in a step.
        start: share of T before the cubic ramp of the sparsity.
        stop: share of T at the last pruning; in between, each step prunes.
        regularization: share of a head's value-output features at which what is left of them counts by tanh(1), so
            that sparse heads are emptied; 0: all count alike.
        structure: groups to prune.
    """

    decay: float = 0.998
    start: float = 0.2
    stop: float = 0.4
    regularization: float = 0.3
    structure: Groups = "features-and-units"

    def __post_init__(self) -> None:
        require_ramp(self.start, self.stop)
        require(0.0 <= self.decay < 1.0, "decay", "in [0, 1)", self.decay)
        require(0.0 <= self.regularization < math.inf, "regularization", "0 or more", self.regularization)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the ramp of the sparsity, and a training with the final masks."""
        size.require_fit(lambda total: self._ramp(total).stop > self._ramp(total).start, "the ramp of grain")
        ramp = self._ramp(size.steps)
        loop = partial(self._hooks, ramp, sparsity)
        return [
            Phase(name="ramp", steps=ramp.stop, loop=loop, split_loss=True, copies=2),  # scores in float64
            Phase(name="finish", steps=size.steps - ramp.stop),
        ]

    def notes(self, run: ActiveRun) -> dict[str, Any]:
        """Return the sparsity as the paper counts it, with the biases of the groups."""
        biases = dict(run.state.model.named_parameters())
        return {"sparsity_with_biases": sparsity_with_biases(run.state.masks, run.state.targets, biases)}

    def _ramp(self, total: int) -> CubicSchedule:
        return CubicSchedule(max(1, round(self.start * total)), round(self.stop * total))

    def _hooks(self, ramp: CubicSchedule, sparsity: float, run: ActiveRun) -> LoopHooks:
        groups = self.groups_of(run.state.targets)
        assert isinstance(groups, tuple)
        average = GroupImportance(groups=groups, decay=self.decay, regularization=self.regularization)

        def prune(state: TrainState) -> None:
            if ramp.is_pruning_step(state.step):
                state.set_masks_(best_masks(state, average, ramp.sparsity_at(state.step, sparsity)))
            if state.step == ramp.stop:
                average.clear_(state)

        return LoopHooks([prune], observe=average.observe_gradients)


def best_masks(state: TrainState, average: GroupImportance, sparsity: float) -> Masks:
    """Return the masks of the best groups that fit; the budget that skipped heads leave goes to the next best."""
    scores, within = average.scores(state), state.masks
    while True:
        masks = topk_masks(scores, max(sparsity, sparsity_of(within)), pattern=average.groups, within=within)
        left = close_empty_heads(within, masks, state.targets)
        if not any((masks[name] & ~left[name]).any() for name in masks):
            return masks
        within = left
