"""Iterative magnitude pruning: rounds of training, pruning and rewinding."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from sparsesoup.core.errors import require
from sparsesoup.core.granularity import Structure
from sparsesoup.core.masking import Scope
from sparsesoup.core.schedules import geometric_sparsities
from sparsesoup.methods.base import Method
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.size import RunSize


@dataclass(frozen=True, kw_only=True)
class IterativeMagnitudePruning(Method):
    """Rounds of T training steps and pruning by |w|, each rewound to its start.

    Frankle & Carbin 2019; on BERT, Chen et al. 2020; rewinding, Frankle et al. 2020; learning-rate rewinding, Renda
    et al. 2020. All parameters are rewound, the head included, with optimizer, schedule and order of rows.

    Args:
        cut: share of the remaining weights removed per round; the last round prunes to the target sparsity.
        rewind: rewinding point as a share of T after the pre-trained checkpoint; 0 is the checkpoint itself.
        back: what to rewind: the weights, or only the learning rate (the weights stay as trained).
        structure: structure to prune: weights, rows, columns, heads, units, heads-and-units or features-and-units.
        scope: ranking scope.
    """

    cut: float = 0.2
    rewind: float = 0.0
    back: Literal["weights", "rate"] = "weights"
    structure: Structure = "weights"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        require(0.0 < self.cut < 1.0, "cut", "in (0, 1)", self.cut)
        require(0.0 <= self.rewind < 1.0, "rewind", "a share of T in [0, 1)", self.rewind)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return a round for each sparsity, and the training of the last mask: (rounds + 1) T steps in total."""
        return self.plan_rounds(size, geometric_sparsities(self.cut, sparsity))

    def plan_rounds(self, size: RunSize, goals: Sequence[float], product: int = -1, store: str = "") -> list[Phase]:
        """Return the phases of rounds that prune to these sparsities.

        Args:
            goals: training 0 is dense, training i has the sparsity goals[i - 1].
            product: index of the training that leads to the final model; the others count as search.
            store: keep the weights after each training as artifacts of this name and the index.
        """
        first, own = round(self.rewind * size.steps), product % (len(goals) + 1)
        size.require_fit(lambda total: round(self.rewind * total) < total, "imp with this rewinding point")
        origin = Phase(name="origin", steps=first, shared=True, hold=True, always=self._keep_origin)
        phases = [origin] if first else []
        for number in range(len(goals) + 1):
            last = number == len(goals)
            phases.append(
                Phase(
                    name="train" if last else f"round-{number}",
                    steps=size.steps - first,
                    label="main" if number == own else "search",
                    # Kept weights must not see the same rows in the same order in every round.
                    stream=("round", number) if self.back == "rate" and number else (),
                    shared=True,
                    keeps_moments=False,
                    store=f"{store}-{number}" if store else "",
                    end=None if last else partial(self._prune_and_rewind, goals[number]),
                    rewinds_to=None if last else first,
                )
            )
        return phases

    def notes(self, run: ActiveRun) -> dict[str, Any]:
        """Return the number of rounds."""
        return {"rounds": sum(phase.rewinds_to is not None for phase in run.phases)}

    def _keep_origin(self, run: ActiveRun) -> None:
        run.own = run.problem.snapshots.take(run.state)

    def _prune_and_rewind(self, goal: float, run: ActiveRun) -> None:
        state, origin = run.state, run.own  # none: the rewinding point is the pre-trained checkpoint itself
        masks = self.select_masks(state, goal, within=state.masks)
        if self.back == "rate":
            state.reset_optimizer_()
            state.step = int(origin.facts["step"]) if origin else 0
        elif origin:
            notes = state.notes  # of the trainings so far, such as their validations
            state.restore_snapshot_(origin)
            state.notes = notes
        else:
            run.problem.reset_to_pretrained_(state)
        state.set_masks_(masks)
