"""Method: the base class of all pruning methods."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Block, Element, Pattern, Structure
from sparsesoup.core.groups import resolve_groups, validate_groups
from sparsesoup.core.masking import Scope
from sparsesoup.core.masks import Masks
from sparsesoup.core.settings import TypedSettings
from sparsesoup.core.targets import Targets
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods.scores import magnitude
from sparsesoup.methods.select_masks import select_masks
from sparsesoup.training.driver import run_plan
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import TrainState


@dataclass(frozen=True)
class Method(TypedSettings):
    """A pruning method: a frozen dataclass of settings, with a plan.

    A subclass has `plan`, and what the plan's phases call. Settings named `structure`, `pattern` and `scope` say which
    weights are pruned together, and among which they are ranked.
    """

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the phases of a run.

        Raises: UserError if the schedule does not fit T or the sparsity.
        """
        raise NotImplementedError

    def check(self, problem: Problem, sparsity: float) -> None:
        """Raise a UserError if the model does not have what is to be pruned, or too little of it."""
        self.groups_of(problem.targets, sparsity)

    def doubts(self, problem: Problem, sparsity: float) -> list[str]:
        """Return notes for the user before the first step."""
        return []

    def start_run(self, problem: Problem, sparsity: float) -> ActiveRun:
        """Start a run."""
        return ActiveRun(problem, problem.start_run())

    def notes(self, run: ActiveRun) -> dict[str, Any]:
        """Return notes on a finished run for its report."""
        return {}

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """Prune the model of the problem, which is not modified; the cost of every step is recorded.

        Raises: UserError, before the first step, if the method does not fit T, the model or the sparsity.
        """
        return run_plan(self, problem, sparsity)

    def groups_of(self, targets: Targets, sparsity: float | None = None) -> Pattern:
        """Return the groups to prune; with a sparsity, check that they can reach it."""
        structure: Structure = getattr(self, "structure", "weights")
        pattern: Block = getattr(self, "pattern", Element)
        if sparsity is None:
            return resolve_groups(targets, structure, pattern)
        return validate_groups(targets, structure, sparsity, pattern, getattr(self, "scope", "global"))

    def select_masks(
        self,
        state: TrainState,
        sparsity: float,
        scores: Mapping[str, Tensor] | None = None,
        within: Masks | None = None,
    ) -> Masks:
        """Return the masks of the highest scores, by default |w|, in this method's groups and scope."""
        scores = magnitude(state.prunable_parameters()) if scores is None else scores
        scope: Scope = getattr(self, "scope", "global")
        return select_masks(state, scores, sparsity, pattern=self.groups_of(state.targets), scope=scope, within=within)


def require_dense(name: str, sparsity: float) -> None:
    """Raise a UserError if a method with a dense result is to prune."""
    if sparsity:
        raise UserError(f"{name} keeps every weight: sparsity must be 0, got {sparsity}")
