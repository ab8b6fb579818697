"""Lottery Pools: interpolation of the tickets of all IMP rounds into the target one."""

from dataclasses import dataclass

from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Structure
from sparsesoup.core.groups import validate_groups
from sparsesoup.core.masking import Competition
from sparsesoup.core.schedules import geometric_sparsities
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods.imp import IterativeMagnitudePruning
from sparsesoup.methods.scores import magnitude
from sparsesoup.methods.select_masks import select_masks
from sparsesoup.training import weight_averaging as soups
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState, named_weights

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class LotteryPools:
    """Average tickets of neighbouring imp-rewind rounds and prune back; no retraining. Yin et al. 2022, alg. 1.

    The other tickets are tried from the nearest to the farthest, the denser before the sparser. Each is mixed in with
    its best share if that improves the pool on validation, so the pool is never worse there than its own ticket.

    Args:
        cut: share of the remaining weights removed per IMP round.
        rewind: rewinding point as a share of T.
        beyond: rounds past the target sparsity, whose sparser tickets are tried too; each costs T steps.
        neighbours: number of tickets to try; null is all of them.
        shares: shares of a ticket in the mixture to try.
        structure: structure to prune: weights, or whole rows, columns, heads, units, heads-and-units.
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
        if self.beyond < 0 or (self.neighbours is not None and self.neighbours < 0):
            raise UserError(
                f"lottery-pools needs beyond >= 0 and neighbours >= 0, got {self.beyond} and {self.neighbours}"
            )
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise UserError(f"lottery-pools needs shares in (0, 1), at least one, got {self.shares}")
        self._imp_method()

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """Return the pool at the target sparsity, after (rounds + beyond + 1) T steps and its validations."""
        goals = geometric_sparsities(self.cut, sparsity)
        target = len(goals)
        for _ in range(self.beyond):
            goals.append(1 - (1 - goals[-1]) * (1 - self.cut))

        def trained(state: TrainState, number: int) -> None:
            problem.journal.put_artifact(f"ticket-{number}", named_weights(state.model))

        state = self._imp_method().run_rounds(problem, goals, target, trained)
        problem.journal.run_stage("own", state, self._own_ticket, problem, state, target, sparsity)
        for other in nearest_first(target, len(goals) + 1)[: self.neighbours]:
            there = goals[other - 1] if other else 0.0
            problem.journal.run_stage(f"pool-{other}", state, self._try_ticket, problem, state, other, there, sparsity)
        return problem.finish_run(state, rounds=len(goals))

    def _imp_method(self) -> IterativeMagnitudePruning:
        return IterativeMagnitudePruning(cut=self.cut, rewind=self.rewind, structure=self.structure, scope=self.scope)

    def _own_ticket(self, problem: Problem, state: TrainState, target: int, sparsity: float) -> None:
        self._load_mixture_(state, problem.journal.get_artifact(f"ticket-{target}"), sparsity)
        own = soups.validation_score(problem, state)
        state.notes["pool"] = {"own": own, "score": own, "visited": []}

    def _try_ticket(self, problem: Problem, state: TrainState, other: int, there: float, sparsity: float) -> None:
        """Mix a ticket into the pool with its best share if that improves it; the state holds the pool."""
        pool, neighbour = soups.clone_weights(state.model), problem.journal.get_artifact(f"ticket-{other}")
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
        pattern = validate_groups(state.targets, self.structure, sparsity, scope=self.scope)
        state.set_masks_(
            select_masks(state, magnitude(state.prunable_parameters()), sparsity, pattern=pattern, scope=self.scope)
        )


def nearest_first(target: int, count: int) -> list[int]:
    """Return the other numbers below `count` from the nearest to the farthest, the lower before the higher.

    >>> nearest_first(2, 5)
    [1, 3, 0, 4]
    """
    return sorted((n for n in range(count) if n != target), key=lambda n: (abs(n - target), n))
