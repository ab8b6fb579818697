"""Instant Model Soup: the dense variant of Instant Soup Pruning."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from sparsesoup.core.errors import require
from sparsesoup.core.masks import sparsity as sparsity_of
from sparsesoup.core.schedules import ScaledRate
from sparsesoup.methods.base import Method, require_dense
from sparsesoup.methods.isp import PROTOCOLS
from sparsesoup.training import weight_averaging as soups
from sparsesoup.training.config import TrainingOverrides
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import named_weights


@dataclass(frozen=True, kw_only=True)
class InstantModelSoup(Method):
    """Interpolate short trainings of pruned copies of theta_0 into it, then fine-tune. Jaiswal et al. 2023.

    The model is dense. Every copy is mixed in with the share that is best on validation; a share of 0 leaves it out.

    Args:
        weak_models: number of copies.
        look_ahead: training steps of each, as a share of T.
        sparsities: one-shot magnitude sparsities of the copies; used in turn.
        shares: shares of a copy in the mixture to try, besides 0.
        budget: included (main and weak steps together are T) or extra (the main run has T, weak steps are additional).
        protocols: training settings of the copies; used in turn.
    """

    weak_models: int = 4
    look_ahead: float = 0.025
    sparsities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)
    shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    budget: Literal["included", "extra"] = "included"
    protocols: tuple[TrainingOverrides, ...] = PROTOCOLS

    def __post_init__(self) -> None:
        require(self.weak_models >= 1, "weak_models", "at least 1", self.weak_models)
        short = 0 < self.look_ahead * self.weak_models < 1
        require(short, "look_ahead", f"above 0 and below 1 / {self.weak_models} of T", self.look_ahead)
        require(bool(self.protocols), "protocols", "one or more", self.protocols)
        sparse = self.sparsities and all(0 <= s < 1 for s in self.sparsities)
        require(bool(sparse), "sparsities", "one or more in [0, 1)", self.sparsities)
        inside = self.shares and all(0 < share < 1 for share in self.shares)
        require(bool(inside), "shares", "one or more in (0, 1)", self.shares)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the copies, each mixed into the soup, and a training of the soup; the sparsity must be 0."""
        require_dense("instant-model-soup", sparsity)
        why = f"instant-model-soup with {self.weak_models} weak models"
        size.require_fit(lambda total: self._main_steps(total) >= 1, why)
        steps, main = self._weak_steps(size.steps), self._main_steps(size.steps)
        phases = [Phase(name="origin", end=self._store_origin, validations=1)]
        for number in range(self.weak_models):
            protocol = self.protocols[number % len(self.protocols)]
            rate = ScaledRate(size.rate_schedule(steps), protocol.rate_factor(size.seed, "weak", number))
            phases += [
                Phase(name=f"fork-{number}", end=partial(self._begin_copy, number), rewinds_to=0),
                Phase(
                    name=f"weak-{number}", steps=steps, label="weak", stream=("weak", number), rate=rate,
                    overrides=protocol, copies=1,
                ),
                Phase(
                    name=f"soup-{number}", end=partial(self._mix_copy, number), validations=len(self.shares), copies=2,
                ),
            ]  # fmt: skip
        begin = Phase(name="begin", end=self._begin_soup, rewinds_to=0)
        return [*phases, begin, Phase(name="finish", steps=main, rate=size.rate_schedule(main))]

    def notes(self, run: ActiveRun) -> dict[str, Any]:
        """Return the weak steps as a share of T."""
        weak = self.weak_models * self._weak_steps(run.problem.steps)
        return {"budget": self.budget, "weak_share": weak / run.problem.steps}

    def _weak_steps(self, total: int) -> int:
        return max(1, round(self.look_ahead * total))

    def _main_steps(self, total: int) -> int:
        return total - (self.weak_models * self._weak_steps(total) if self.budget == "included" else 0)

    def _store_origin(self, run: ActiveRun) -> None:
        run.state.notes["soup"] = {"score": soups.validation_score(run.problem, run.state), "forks": []}
        run.problem.checkpointer.put_artifact("soup-0", named_weights(run.state.model))

    def _begin_copy(self, number: int, run: ActiveRun) -> None:
        run.problem.reset_to_pretrained_(run.state)
        sparsity = self.sparsities[number % len(self.sparsities)]
        run.state.set_masks_(self.select_masks(run.state, sparsity))

    def _mix_copy(self, number: int, run: ActiveRun) -> None:
        """Mix a copy into the soup with its best share."""
        problem, state = run.problem, run.state
        fork, soup = soups.clone_weights(state.model), problem.checkpointer.get_artifact(f"soup-{number}")
        found, sparsity = {0.0: float(state.notes["soup"]["score"])}, sparsity_of(state.masks)
        for share in self.shares:
            soups.load_weights_(state.model, soups.interpolate_weights(soup, fork, share))
            found[share] = soups.validation_score(problem, state)
        best = max(found, key=lambda share: found[share])  # the first of equals
        problem.checkpointer.put_artifact(f"soup-{number + 1}", soups.interpolate_weights(soup, fork, best))
        state.notes["soup"]["score"] = found[best]
        state.notes["soup"]["forks"].append({"sparsity": sparsity, "share": best, "score": found[best]})

    def _begin_soup(self, run: ActiveRun) -> None:
        """Load the soup at step 0, with a fresh optimizer."""
        run.problem.reset_to_pretrained_(run.state)
        soups.load_weights_(run.state.model, run.problem.checkpointer.get_artifact(f"soup-{self.weak_models}"))
