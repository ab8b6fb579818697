"""Gradual pruning of weights reparametrized by a power, which separates large from small ones."""

import math
from dataclasses import dataclass

from torch import nn

from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Structure
from sparsesoup.core.groups import validate_groups
from sparsesoup.core.masking import Scope
from sparsesoup.core.schedules import CubicSchedule
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods.gates import powerpropagation as power
from sparsesoup.methods.gradual import pruning_hook, train_with
from sparsesoup.training.problem import GateParameters, Problem, require_steps


@dataclass(frozen=True, kw_only=True)
class PowerPropagation:
    """Train v with w = sign(v) |v|^alpha and prune the smallest |v| on a cubic schedule. Schwarz et al. 2021.

    The gradient of v is alpha |v|^(alpha - 1) times that of w: large weights learn faster, small ones hardly move.

    Args:
        alpha: exponent, at least 1; 1 is plain gradual pruning.
        start: share of T before the first pruning.
        stop: share of T at the last pruning; the rest is the cool-down.
        every: share of T between prunings.
        structure: structure to prune: weights, or whole rows, columns, heads, units, heads-and-units.
        scope: ranking scope.
    """

    alpha: float = 2.0
    start: float = 0.1
    stop: float = 0.7
    every: float = 0.01
    structure: Structure = "weights"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        if not 0.0 <= self.start < self.stop <= 1.0 or not 0.0 < self.every < math.inf or not 1.0 <= self.alpha <= 16.0:
            raise UserError(
                f"power-propagation needs 0 <= start < stop <= 1, every > 0 and alpha in [1, 16], got {self}"
            )

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """Return the ticket after T steps, its weights folded back to w."""
        require_steps(problem, 4, "a gradual schedule")
        pattern = validate_groups(problem.targets, self.structure, sparsity, scope=self.scope)
        total, names = problem.steps, list(problem.targets)
        plan = CubicSchedule(round(self.start * total), round(self.stop * total), max(1, round(self.every * total)))

        def attach(model: nn.Module) -> GateParameters:
            power.attach_power(model, names, self.alpha)
            return [], 1.0

        state = problem.start_run(attach)
        problem.journal.run_stage(
            "train", state, train_with, state, problem, pruning_hook(plan, sparsity, pattern, self.scope)
        )
        # Not a stage: a restart loads the saved v into a model that has its parametrization again, and folds it then.
        power.fold_power_(state.model, names)
        return problem.finish_run(state)
