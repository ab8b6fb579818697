"""Sparse model soups: average several retrainings of one mask, then prune to the next sparsity."""

from dataclasses import dataclass

from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Structure
from sparsesoup.core.groups import resolve_groups, validate_groups
from sparsesoup.core.masking import Scope
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods.model_soup import PROTOCOLS, scaled_rate
from sparsesoup.methods.scores import magnitude
from sparsesoup.methods.select_masks import select_masks
from sparsesoup.training import weight_averaging as soups
from sparsesoup.training.loop import Rate, TrainingOverrides, train
from sparsesoup.training.problem import Problem, require_steps
from sparsesoup.training.state import TrainState, named_weights


@dataclass(frozen=True, kw_only=True)
class SparseModelSoup:
    """IMP without rewinding; each phase averages several retrainings of its mask. Zimmer et al. 2024, fig. 2.

    Starts with a dense training of T steps. Each phase removes the same share of the remaining weights; its retrainings
    start from the same pruned weights with a fresh optimizer, warm-up and decay.

    Args:
        phases: number of prunings.
        members: retrainings per phase.
        retrain: steps of each, as a share of T.
        protocols: training settings of the retrainings in a phase; used in turn.
        structure: structure to prune: weights, or whole rows, columns, heads, units, heads-and-units.
        scope: ranking scope.
    """

    phases: int = 3
    members: int = 3
    retrain: float = 0.2
    protocols: tuple[TrainingOverrides, ...] = PROTOCOLS
    structure: Structure = "weights"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        if self.phases < 1 or self.members < 1 or not 0 < self.retrain <= 1 or not self.protocols:
            raise UserError(
                f"sparse-model-soup needs phases >= 1, members >= 1, retrain in (0, 1] and at least one protocol, got "
                f"{self.phases}, {self.members}, {self.retrain:g} and {len(self.protocols)}"
            )

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """Return the soup of the last phase, after (1 + phases * members * retrain) T steps."""
        require_steps(problem, 1, "a run")
        if not 0.0 <= sparsity < 1.0:
            raise UserError(f"sparsity must lie in [0, 1), got {sparsity}")
        validate_groups(problem.targets, self.structure, sparsity, scope=self.scope)
        state, steps = problem.start_run(), max(1, round(self.retrain * problem.steps))
        goals = [1 - (1 - sparsity) ** (phase / self.phases) for phase in range(1, self.phases)] + [sparsity]
        problem.journal.run_stage("train", state, train, state, problem, problem.steps)
        for phase, goal in enumerate(goals):
            problem.journal.run_stage(f"phase-{phase}-prune", state, self._prune_phase, problem, state, goal, phase)
            for number in range(self.members):
                piece = f"phase-{phase}-{number}"
                problem.journal.run_stage(f"{piece}-begin", state, self._begin_phase, problem, state, steps, phase)
                problem.journal.run_stage(
                    f"{piece}-train", state, self._retrain_member, problem, state, steps, phase, number
                )
            problem.journal.run_stage(f"phase-{phase}-soup", state, self._average_members, problem, state, phase)
        return problem.finish_run(state, phases=goals)

    def _prune_phase(self, problem: Problem, state: TrainState, goal: float, phase: int) -> None:
        pattern = resolve_groups(state.targets, self.structure)
        masks = select_masks(
            state, magnitude(state.prunable_parameters()), goal, pattern=pattern, scope=self.scope, within=state.masks
        )
        state.set_masks_(masks)
        problem.journal.put_artifact(f"pruned-{phase}", named_weights(state.model))

    def _begin_phase(self, problem: Problem, state: TrainState, steps: int, phase: int) -> None:
        """Load the pruned weights of this phase, with a fresh optimizer and the last `steps` steps ahead."""
        soups.load_weights_(state.model, problem.journal.get_artifact(f"pruned-{phase}"))
        state.reset_optimizer_()
        state.step = problem.steps - steps

    def _retrain_member(self, problem: Problem, state: TrainState, steps: int, phase: int, number: int) -> None:
        protocol, stream = self.protocols[number % len(self.protocols)], ("phase", phase, "member", number)
        rate = self._phase_rate(problem, steps, protocol.rate_factor(problem.seed, *stream))
        train(state, problem, steps, stream=stream, rate=rate, protocol=protocol)
        problem.journal.put_artifact(f"member-{phase}-{number}", named_weights(state.model))

    def _phase_rate(self, problem: Problem, steps: int, factor: float) -> Rate:
        begin, rate = problem.steps - steps, scaled_rate(problem.rate_schedule(steps), factor)
        return lambda step: rate(step - begin)

    def _average_members(self, problem: Problem, state: TrainState, phase: int) -> None:
        members = (problem.journal.get_artifact(f"member-{phase}-{number}") for number in range(self.members))
        soups.load_weights_(state.model, soups.average_weights(members))
