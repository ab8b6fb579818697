"""Sparse model soups: average several retrainings of one mask, then prune to the next sparsity."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from sparsesoup.core.errors import require
from sparsesoup.core.granularity import Structure
from sparsesoup.core.masking import Scope, check_sparsity
from sparsesoup.core.schedules import ScaledRate
from sparsesoup.methods.base import Method
from sparsesoup.methods.model_soup import PROTOCOLS
from sparsesoup.training import weight_averaging as soups
from sparsesoup.training.config import TrainingOverrides
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import named_weights


@dataclass(frozen=True, kw_only=True)
class SparseModelSoup(Method):
    """IMP without rewinding; each phase averages several retrainings of its mask. Zimmer et al. 2024, fig. 2.

    Starts with a dense training of T steps. Each phase removes the same share of the remaining weights; its retrainings
    start from the same pruned weights with a fresh optimizer, warm-up and decay.

    Args:
        phases: number of prunings.
        members: retrainings per phase.
        retrain: steps of each, as a share of T.
        protocols: training settings of the retrainings in a phase; used in turn.
        structure: structure to prune: weights, rows, columns, heads, units, heads-and-units or features-and-units.
        scope: ranking scope.
    """

    phases: int = 3
    members: int = 3
    retrain: float = 0.2
    protocols: tuple[TrainingOverrides, ...] = PROTOCOLS
    structure: Structure = "weights"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        require(self.phases >= 1, "phases", "at least 1", self.phases)
        require(self.members >= 1, "members", "at least 1", self.members)
        require(0 < self.retrain <= 1, "retrain", "a share of T in (0, 1]", self.retrain)
        require(bool(self.protocols), "protocols", "one or more", self.protocols)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return a dense training, and phases of pruning, retrainings and averaging."""
        size.require_steps(1, "a run")
        check_sparsity(sparsity)
        steps, phases = max(1, round(self.retrain * size.steps)), [Phase(name="train", steps=size.steps)]
        for phase, goal in enumerate(self._goals(sparsity)):
            name, begin = f"phase-{phase}", partial(self._begin_retraining, size.steps - steps, phase)
            phases.append(Phase(name=f"{name}-prune", end=partial(self._prune_phase, goal, phase), copies=1))
            for number in range(self.members):
                protocol, stream = self.protocols[number % len(self.protocols)], ("phase", phase, "member", number)
                factor = protocol.rate_factor(size.seed, *stream)
                rate = ScaledRate(size.rate_schedule(steps), factor, size.steps - steps)
                phases += [
                    Phase(name=f"{name}-{number}-begin", end=begin, rewinds_to=size.steps - steps),
                    Phase(
                        name=f"{name}-{number}-train", steps=steps, stream=stream, rate=rate, overrides=protocol,
                        store=f"member-{phase}-{number}", copies=1,
                    ),
                ]  # fmt: skip
            phases.append(Phase(name=f"{name}-soup", end=partial(self._average_members, phase), copies=2))
        return phases

    def notes(self, run: ActiveRun) -> dict[str, Any]:
        """Return the sparsity of each phase."""
        return {"phases": self._goals(run.sparsity)}

    def _goals(self, sparsity: float) -> list[float]:
        return [1 - (1 - sparsity) ** (phase / self.phases) for phase in range(1, self.phases)] + [sparsity]

    def _prune_phase(self, goal: float, phase: int, run: ActiveRun) -> None:
        run.state.set_masks_(self.select_masks(run.state, goal, within=run.state.masks))
        run.problem.checkpointer.put_artifact(f"pruned-{phase}", named_weights(run.state.model))

    def _begin_retraining(self, step: int, phase: int, run: ActiveRun) -> None:
        """Load the pruned weights of this phase, with a fresh optimizer, at a step that leaves the retraining's."""
        soups.load_weights_(run.state.model, run.problem.checkpointer.get_artifact(f"pruned-{phase}"))
        run.state.reset_optimizer_()
        run.state.step = step

    def _average_members(self, phase: int, run: ActiveRun) -> None:
        members = (run.problem.checkpointer.get_artifact(f"member-{phase}-{number}") for number in range(self.members))
        soups.load_weights_(run.state.model, soups.average_weights(members))
