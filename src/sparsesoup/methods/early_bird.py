"""Early-bird tickets: stop the search as soon as the pruning mask no longer changes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from sparsesoup.core.errors import require
from sparsesoup.core.granularity import Block, Element, Structure
from sparsesoup.core.masking import Scope
from sparsesoup.core.masks import Masks, hamming_distance, jaccard_distance, pack_bits, unpack_bits
from sparsesoup.methods.base import Method
from sparsesoup.training.hooks import ScheduledHook
from sparsesoup.training.plan import ActiveRun, LoopHooks, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import TrainState

MEASURES: dict[str, Callable[[Masks, Masks], float]] = {"hamming": hamming_distance, "kept-sets": jaccard_distance}


@dataclass(frozen=True, kw_only=True)
class EarlyBird(Method):
    """Train, compute a mask at intervals, stop when it no longer changes, rewind and train it. You et al. 2019, alg. 1.

    Args:
        every_epochs: epochs between two masks, at least one step.
        masks: number of masks compared: the newest with each of those before it, once all have been computed.
        measure: hamming (share of all weights on which two masks differ, as published) or kept-sets (one minus
            intersection over union of the kept weights; stays informative at high sparsity).
        threshold: largest distance at which two masks count as equal.
        search: share of T after which the last mask is taken even if the masks still change.
        structure: structure to prune: weights, rows, columns, heads, units, heads-and-units or features-and-units.
        pattern: tile of weights pruned as one group; 1 x 1 is single weights.
        scope: ranking scope.
    """

    every_epochs: float = 0.1
    masks: int = 5
    measure: Literal["hamming", "kept-sets"] = "hamming"
    threshold: float = 0.1
    search: float = 0.5
    structure: Structure = "weights"
    pattern: Block = Element
    scope: Scope = "global"

    def __post_init__(self) -> None:
        require(0 < self.every_epochs < math.inf, "every_epochs", "above 0", self.every_epochs)
        require(self.masks >= 2, "masks", "at least 2", self.masks)
        require(0 <= self.threshold < 1, "threshold", "in [0, 1)", self.threshold)
        require(0 < self.search <= 1, "search", "a share of T in (0, 1]", self.search)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the search, at its longest, and T steps with the mask."""
        every = max(1, round(self.every_epochs * size.steps_per_epoch))
        size.require_fit(
            lambda total: round(self.search * total) >= every * self.masks,
            f"early-bird with {self.masks} masks {every} steps apart in {self.search:g} T",
        )
        search = Phase(
            name="search", steps=round(self.search * size.steps), at_most=True, label="search",
            loop=partial(self._watch_masks, every, sparsity), end=self._rewind_with_mask, rewinds_to=0,
            copies=self.masks / 32,
        )  # fmt: skip
        return [search, Phase(name="train", steps=size.steps)]

    def start_run(self, problem: Problem, sparsity: float) -> ActiveRun:
        """Start a run, after a selection that raises a UserError if the masks are impossible."""
        run = super().start_run(problem, sparsity)
        self.select_masks(run.state, sparsity)
        return run

    def _watch_masks(self, every: int, sparsity: float, run: ActiveRun) -> LoopHooks:
        def look(state: TrainState) -> None:
            state.halt = self._mask_has_settled(state, self.select_masks(state, sparsity))

        return LoopHooks([ScheduledHook(lambda step: step % every == 0, look)])

    def _rewind_with_mask(self, run: ActiveRun) -> None:
        device = run.problem.accelerator.device
        newest = {n: m.to(device) for n, m in load_past_mask(run.state, -1).items()}
        run.state.memory.clear()
        run.problem.reset_to_pretrained_(run.state)
        run.state.set_masks_(newest)

    def _mask_has_settled(self, state: TrainState, masks: Masks) -> bool:
        """Store a mask; return True once enough masks are stored and it is close to each of the earlier ones."""
        store_past_mask(state, masks, self.masks)
        found: dict[str, Any] = state.notes.setdefault("early_bird", {"fired": None, "checks": []})
        held = len(next(iter(state.memory.values())))
        *others, newest = [load_past_mask(state, i) for i in range(held)]
        distances = {name: [of(newest, other) for other in others] for name, of in MEASURES.items()}
        found["checks"].append({"step": state.step, **distances})
        if held == self.masks and max(distances[self.measure]) <= self.threshold:
            found["fired"] = state.step
            return True
        return False


def store_past_mask(state: TrainState, masks: Masks, most: int) -> None:
    """Append a mask to the state's memory, one bit per weight; drop the oldest if there are more than `most`."""
    for name, mask in masks.items():
        before, new = state.memory.get(f"recent_masks/{name}"), pack_bits(mask)[None]
        state.memory[f"recent_masks/{name}"] = new if before is None else torch.cat([before.cpu(), new])[-most:]


def load_past_mask(state: TrainState, index: int) -> Masks:
    """Return a mask from the state's memory; 0 is the oldest, -1 the newest."""
    return {n: unpack_bits(state.memory[f"recent_masks/{n}"][index].cpu(), t.shape) for n, t in state.targets.items()}
