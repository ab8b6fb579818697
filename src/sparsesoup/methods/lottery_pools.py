"""Lottery Pools: interpolation of the tickets of all IMP rounds into the target one."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from sparsesoup.core.errors import require
from sparsesoup.core.granularity import Structure
from sparsesoup.core.masking import Competition
from sparsesoup.core.schedules import geometric_sparsities
from sparsesoup.methods.base import Method
from sparsesoup.methods.imp import IterativeMagnitudePruning
from sparsesoup.training import weight_averaging as soups
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import TrainState

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class LotteryPools(Method):
    """Average tickets of neighbouring imp-rewind rounds and prune back; no retraining. Yin et al. 2022, alg. 1.

    The other tickets are tried from the nearest to the farthest, the denser before the sparser. Each is mixed in with
    its best share if that improves the pool on validation, so the pool is never worse there than its own ticket.

    Args:
        cut: share of the remaining weights removed per IMP round.
        rewind: rewinding point as a share of T.
        beyond: rounds past the target sparsity, whose sparser tickets are tried too; each costs T steps.
        neighbours: number of tickets to try; null is all of them.
        shares: shares of a ticket in the mixture to try.
        structure: structure to prune: weights, rows, columns, heads, units, heads-and-units or features-and-units.
        scope: ranking scope.
    """

    cut: float = 0.2
    rewind: float = 0.05
    beyond: int = 1
    neighbours: int | None = None
    shares: tuple[float, ...] = SHARES
    structure: Structure = "weights"
    scope: Competition = "global"

    def __post_init__(self) -> None:
        require(self.beyond >= 0, "beyond", "0 or more", self.beyond)
        require(self.neighbours is None or self.neighbours >= 0, "neighbours", "0 or more", self.neighbours)
        inside = self.shares and all(0 < share < 1 for share in self.shares)
        require(bool(inside), "shares", "one or more in (0, 1)", self.shares)
        self._imp_method()

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the rounds of imp-rewind, and the tickets to try: (rounds + beyond + 1) T steps and validations."""
        goals = self._goals(sparsity)
        target = len(goals) - self.beyond
        phases = self._imp_method().plan_rounds(size, goals, target, store="ticket")
        phases.append(Phase(name="own", end=partial(self._own_ticket, target, sparsity), validations=1))
        for other in nearest_first(target, len(goals) + 1)[: self.neighbours]:
            end = partial(self._try_ticket, other, goals[other - 1] if other else 0.0, sparsity)
            phases.append(Phase(name=f"pool-{other}", end=end, validations=len(self.shares), copies=2))
        return phases

    def check(self, problem: Problem, sparsity: float) -> None:
        """Raise a UserError also if the groups cannot reach the sparsity of the last round."""
        for goal in (max(self._goals(sparsity)), sparsity):
            self.groups_of(problem.targets, goal)

    def start_run(self, problem: Problem, sparsity: float) -> ActiveRun:
        """Start a run with a rewinding point."""
        return self._imp_method().start_run(problem, sparsity)

    def notes(self, run: ActiveRun) -> dict[str, Any]:
        """Return the number of rounds."""
        return {"rounds": len(self._goals(run.sparsity))}

    def _goals(self, sparsity: float) -> list[float]:
        """Return the sparsity of each round: up to the target, and of those beyond it."""
        goals = geometric_sparsities(self.cut, sparsity)
        for _ in range(self.beyond):
            goals.append(1 - (1 - goals[-1]) * (1 - self.cut))
        return goals

    def _imp_method(self) -> IterativeMagnitudePruning:
        return IterativeMagnitudePruning(cut=self.cut, rewind=self.rewind, structure=self.structure, scope=self.scope)

    def _own_ticket(self, target: int, sparsity: float, run: ActiveRun) -> None:
        self._load_mixture_(run.state, run.problem.checkpointer.get_artifact(f"ticket-{target}"), sparsity)
        own = soups.validation_score(run.problem, run.state)
        run.state.notes["pool"] = {"own": own, "score": own, "visited": []}

    def _try_ticket(self, other: int, there: float, sparsity: float, run: ActiveRun) -> None:
        """Mix a ticket into the pool with its best share if that improves it; the state holds the pool."""
        problem, state = run.problem, run.state
        pool, neighbour = soups.clone_weights(state.model), problem.checkpointer.get_artifact(f"ticket-{other}")
        found: dict[float, float] = {}
        for share in self.shares:
            self._load_mixture_(state, soups.interpolate_weights(pool, neighbour, share), sparsity)
            found[share] = soups.validation_score(problem, state)
        best = max(found, key=lambda share: found[share])  # the first of equals
        notes = state.notes["pool"]
        accepted = found[best] > notes["score"]
        self._load_mixture_(state, soups.interpolate_weights(pool, neighbour, best) if accepted else pool, sparsity)
        notes["score"] = max(found[best], notes["score"])
        notes["visited"].append({"sparsity": there, "share": best, "score": found[best], "accepted": accepted})

    def _load_mixture_(self, state: TrainState, mixture: soups.Weights, sparsity: float) -> None:
        soups.load_weights_(state.model, mixture)
        state.set_masks_(self.select_masks(state, sparsity))


def nearest_first(target: int, count: int) -> list[int]:
    """Return the other numbers below `count` from the nearest to the farthest, the lower before the higher.

    >>> nearest_first(2, 5)
    [1, 3, 0, 4]
    """
    return sorted((n for n in range(count) if n != target), key=lambda n: (abs(n - target), n))
