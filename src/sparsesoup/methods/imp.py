"""Iterative magnitude pruning: rounds of training, pruning and rewinding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Structure
from sparsesoup.core.groups import resolve_groups, validate_groups
from sparsesoup.core.masking import Scope
from sparsesoup.core.schedules import geometric_sparsities
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods.scores import magnitude
from sparsesoup.methods.select_masks import select_masks
from sparsesoup.training.cached_train import train_cached
from sparsesoup.training.problem import Problem, require_schedule_fits
from sparsesoup.training.state import Snapshot, TrainState

Trained = Callable[[TrainState, int], None]


@dataclass(frozen=True, kw_only=True)
class IterativeMagnitudePruning:
    """Rounds of T training steps and pruning by |w|, each rewound to its start.

    Frankle & Carbin 2019; on BERT, Chen et al. 2020; rewinding, Frankle et al. 2020; learning-rate rewinding, Renda
    et al. 2020. All parameters are rewound, the head included, with optimizer, schedule and order of rows.

    Args:
        cut: share of the remaining weights removed per round; the last round prunes to the target sparsity.
        rewind: rewinding point as a share of T after the pre-trained checkpoint; 0 is the checkpoint itself.
        back: what to rewind: the weights, or only the learning rate (the weights stay as trained).
        structure: structure to prune: weights, or whole rows, columns, heads, units, heads-and-units.
        scope: ranking scope.
    """

    cut: float = 0.2
    rewind: float = 0.0
    back: Literal["weights", "rate"] = "weights"
    structure: Structure = "weights"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        if not 0.0 < self.cut < 1.0 or not 0.0 <= self.rewind < 1.0:
            raise UserError(f"imp needs cut in (0, 1) and rewind in [0, 1), got {self.cut} and {self.rewind}")

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """Return the trained ticket of the last round: (rounds + 1) T steps in total."""
        goals = geometric_sparsities(self.cut, sparsity)
        return problem.finish_run(self.run_rounds(problem, goals), rounds=len(goals))

    def run_rounds(
        self, problem: Problem, goals: Sequence[float], product: int = -1, trained: Trained | None = None
    ) -> TrainState:
        """Run a round for each sparsity, and the training of the last mask.

        Args:
            goals: sparsities to prune to; training 0 is dense, training i has the sparsity goals[i - 1].
            product: index of the training that leads to the final model; the others are charged as search.
            trained: called with the state and the index of each training at its end, inside the checkpointed stage.
        Returns: the state at the end of the last training.
        """
        first = round(self.rewind * problem.steps)
        validate_groups(problem.targets, self.structure, max(goals, default=0.0), scope=self.scope)
        require_schedule_fits(
            problem, lambda total: round(self.rewind * total) < total, "imp with this rewinding point"
        )
        state, rest = problem.start_run(), problem.steps - first
        if first:
            problem.journal.run_stage("origin", state, train_cached, state, problem, first, hold=True)
        origin, own = state.take_snapshot(), product % (len(goals) + 1)

        def fit(number: int) -> None:
            # Kept weights must not see the same rows in the same order in every round.
            stream = ("round", number) if self.back == "rate" and number else ()
            train_cached(state, problem, rest, stream, "strong" if number == own else "search")
            if trained is not None:
                trained(state, number)

        for number, goal in enumerate(goals):
            problem.journal.run_stage(f"round-{number}", state, self._run_round, state, origin, fit, number, goal)
        problem.journal.run_stage("train", state, fit, len(goals))
        return state

    def _run_round(
        self, state: TrainState, origin: Snapshot, fit: Callable[[int], None], number: int, goal: float
    ) -> None:
        fit(number)
        pattern = resolve_groups(state.targets, self.structure)
        masks = select_masks(
            state, magnitude(state.prunable_parameters()), goal, pattern=pattern, scope=self.scope, within=state.masks
        )
        if self.back == "weights":
            state.restore_snapshot_(origin)
        else:
            state.reset_optimizer_()
            state.step = int(origin.facts["step"])
        state.set_masks_(masks)
