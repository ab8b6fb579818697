"""Early-bird tickets: stop the search as soon as the mask to be drawn no longer changes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Block, Element, Structure
from sparsesoup.core.groups import grouping, need_groups
from sparsesoup.core.masking import Scope
from sparsesoup.core.masks import Masks, distance, kept_distance, pack, unpack
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods.scores import magnitude
from sparsesoup.methods.select_masks import choose
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem, need_fit
from sparsesoup.training.state import TrainState

MEASURES: dict[str, Callable[[Masks, Masks], float]] = {"hamming": distance, "kept-sets": kept_distance}


@dataclass(frozen=True, kw_only=True)
class EarlyBird:
    """Train, draw a mask now and then, stop when it no longer changes, go back and train it. You et al. 2019, alg. 1.

    Args:
        every: share of an epoch between two masks, at least one step.
        masks: how many are compared: the newest with each of those before it, once all are there.
        measure: hamming (share of all weights on which two masks differ, as published) or kept-sets (share of the
            weights that either keeps which only one keeps; stays telling at high sparsity).
        threshold: largest distance at which two masks count as the same.
        search: share of T after which the last mask is taken though the rule never held.
        structure: what of the model falls together: weights, or whole rows, columns, heads, units, heads-and-units.
        pattern: the tile in which weights fall together; 1 x 1 is single weights.
        scope: who competes with whom.
    """

    every: float = 0.1
    masks: int = 5
    measure: Literal["hamming", "kept-sets"] = "hamming"
    threshold: float = 0.1
    search: float = 0.5
    structure: Structure = "weights"
    pattern: Block = Element
    scope: Scope = "global"

    def __post_init__(self) -> None:
        if not 0 < self.every < math.inf or self.masks < 2 or not 0 <= self.threshold < 1 or not 0 < self.search <= 1:
            raise UserError(
                f"early-bird needs every > 0, masks >= 2, threshold in [0, 1) and search in (0, 1], got "
                f"{self.every:g}, {self.masks}, {self.threshold:g} and {self.search:g}"
            )

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """The ticket after the search and T steps."""
        every = max(1, round(self.every * problem.steps_per_epoch))

        def fits(total: int) -> bool:
            return round(self.search * total) >= every * self.masks

        need_fit(problem, fits, f"early-bird with {self.masks} masks {every} steps apart in {self.search:g} T")
        need_groups(problem.targets, self.structure, sparsity, self.pattern, self.scope)
        state = problem.start()
        self._draw(state, sparsity)  # what cannot be drawn is refused before the first step
        problem.journal.piece("search", state, self._search, problem, state, every, sparsity)
        problem.journal.piece("train", state, train, state, problem, problem.steps)
        return problem.ticket(state)

    def _search(self, problem: Problem, state: TrainState, every: int, sparsity: float) -> None:
        def look(state: TrainState) -> None:
            if state.step % every == 0:
                state.halt = self._settled(state, self._draw(state, sparsity))

        train(state, problem, round(self.search * problem.steps), hooks=[look], label="search")
        device = problem.accelerator.device
        newest = {n: m.to(device) for n, m in drawn(state, -1).items()}
        state.memory.clear()
        problem.begin_again_(state)
        state.prune_(newest)

    def _draw(self, state: TrainState, sparsity: float) -> Masks:
        pattern = grouping(state.targets, self.structure, self.pattern)
        return choose(state, magnitude(state.params()), sparsity, pattern=pattern, scope=self.scope)

    def _settled(self, state: TrainState, masks: Masks) -> bool:
        """Remember a mask; whether it differs little enough from each of those before it, all of which are there."""
        remember(state, masks, self.masks)
        found: dict[str, Any] = state.notes.setdefault("early_bird", {"fired": None, "checks": []})
        held = len(next(iter(state.memory.values())))
        *others, newest = [drawn(state, i) for i in range(held)]
        apart = {name: [of(newest, other) for other in others] for name, of in MEASURES.items()}
        found["checks"].append({"step": state.step, **apart})
        if held == self.masks and max(apart[self.measure]) <= self.threshold:
            found["fired"] = state.step
            return True
        return False


def remember(state: TrainState, masks: Masks, most: int) -> None:
    """Put a mask at the end of the state's memory, one bit a weight; of more than `most` the oldest goes."""
    for name, mask in masks.items():
        before, new = state.memory.get(f"drawn/{name}"), pack(mask)[None]
        state.memory[f"drawn/{name}"] = new if before is None else torch.cat([before.cpu(), new])[-most:]


def drawn(state: TrainState, index: int) -> Masks:
    """A mask in the state's memory, 0 the oldest, -1 the newest."""
    return {n: unpack(state.memory[f"drawn/{n}"][index].cpu(), t.shape) for n, t in state.targets.items()}
