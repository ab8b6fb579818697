"""Gradual pruning of weights reparametrized by a power, which separates large from small ones."""

import math
from dataclasses import dataclass, replace

from torch import nn

from sparsesoup.core.errors import require
from sparsesoup.core.granularity import Structure
from sparsesoup.core.masking import Scope
from sparsesoup.core.schedules import CubicSchedule, require_ramp
from sparsesoup.methods.base import Method
from sparsesoup.methods.gates import powerpropagation as power
from sparsesoup.methods.gradual import train_on_schedule
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.problem import GateParameters, Problem
from sparsesoup.training.size import RunSize


@dataclass(frozen=True, kw_only=True)
class PowerPropagation(Method):
    """Train v with w = sign(v) |v|^alpha and prune the smallest |v| on a cubic schedule. Schwarz et al. 2021.

    The gradient of v is alpha |v|^(alpha - 1) times that of w: large weights learn faster, small ones hardly change.

    Args:
        alpha: exponent, at least 1; 1 is plain gradual pruning.
        start: share of T before the first pruning.
        stop: share of T at the last pruning; the rest is the cool-down.
        every: share of T between prunings.
        structure: structure to prune: weights, rows, columns, heads, units, heads-and-units or features-and-units.
        scope: ranking scope.
    """

    alpha: float = 2.0
    start: float = 0.1
    stop: float = 0.7
    every: float = 0.01
    structure: Structure = "weights"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        require_ramp(self.start, self.stop, whole=True)
        require(0.0 < self.every < math.inf, "every", "above 0", self.every)
        require(1.0 <= self.alpha <= 16.0, "alpha", "in [1, 16]", self.alpha)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return a single training that prunes."""
        size.require_steps(4, "a gradual schedule")
        total = size.steps
        schedule = CubicSchedule(round(self.start * total), round(self.stop * total), max(1, round(self.every * total)))
        # Folded at every restart too, since that loads the saved v into a model with its parametrization.
        return [replace(train_on_schedule(self, schedule, total, sparsity), always=self._fold)]

    def start_run(self, problem: Problem, sparsity: float) -> ActiveRun:
        """Start a run with the weights reparametrized."""

        def attach(model: nn.Module) -> GateParameters:
            power.attach_power(model, list(problem.targets), self.alpha)
            return [], 1.0

        return ActiveRun(problem, problem.start_run(attach))

    def _fold(self, run: ActiveRun) -> None:
        power.fold_power_(run.state.model, list(run.problem.targets))
