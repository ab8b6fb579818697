"""Rounds of short training and pruning by gradient flow, then training at constant sparsity."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from sparsesoup.core.errors import require
from sparsesoup.core.granularity import Structure
from sparsesoup.core.masking import Scope
from sparsesoup.core.schedules import CubicSchedule
from sparsesoup.core.targets import target_parameters
from sparsesoup.methods.base import Method
from sparsesoup.methods.scores.calibration import calibration_batches
from sparsesoup.methods.scores.gradient import (
    gradient_flow_score,
    hessian_product,
    movement_sensitivity,
    snip_sensitivity,
    task_gradient,
)
from sparsesoup.training.plan import ActiveRun, Pass, Phase
from sparsesoup.training.size import RunSize


@dataclass(frozen=True, kw_only=True)
class GradientFlow(Method):
    """Rounds of training and pruning by the effect of a weight on loss or gradient norm. Lubana & Dick 2021.

    Args:
        measure: loss (|w g|, preserves the loss), change (|w - w_0| |w g|, for weights that have moved) or norm
            (|w (H g)|, preserves the gradient norm; four times the cost).
        rounds: number of prunings; the targets rise on a cubic curve.
        finish: share of T after the last pruning.
        batches: batches for gradient and Hessian, sampled again for each round.
        structure: structure to prune: weights, rows, columns, heads, units, heads-and-units or features-and-units.
        scope: ranking scope.
    """

    measure: Literal["loss", "change", "norm"] = "loss"
    rounds: int = 5
    finish: float = 0.5
    batches: int = 16
    structure: Structure = "weights"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        require(self.batches >= 1, "batches", "at least 1", self.batches)
        require(self.rounds >= 1, "rounds", "at least 1", self.rounds)
        require(0.0 < self.finish < 1.0, "finish", "a share of T in (0, 1)", self.finish)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return rounds of training that end in a pruning, and a training with the final masks."""
        size.require_fit(self._pruning_steps, f"gradient-flow with {self.rounds} rounds")
        done, phases, schedule = 0, list[Phase](), CubicSchedule(0, self.rounds)
        passes: tuple[Pass, ...] = ("gradient", "hessian") if self.measure == "norm" else ("gradient",)
        for number, at in enumerate(self._pruning_steps(size.steps), start=1):
            end = partial(self._prune_once, schedule.sparsity_at(number, sparsity), number)
            scores = tuple((what, self.batches) for what in passes)
            phases += [
                Phase(name=f"round-{number}-train", steps=at - done),
                Phase(name=f"round-{number}-prune", scores=scores, score_path=(number,), end=end),
            ]
            done = at
        return [*phases, Phase(name="finish", steps=size.steps - done)]

    def notes(self, run: ActiveRun) -> dict[str, Any]:
        """Return the measure."""
        return {"measure": self.measure}

    def _pruning_steps(self, total: int) -> list[int]:
        """Return the pruning steps at T = `total`; none if a round or the finish would have no step."""
        steps = [round((1 - self.finish) * total * i / self.rounds) for i in range(1, self.rounds + 1)]
        return steps if steps[0] >= 1 and steps[-1] < total and len(set(steps)) == self.rounds else []

    def _prune_once(self, goal: float, number: int, run: ActiveRun) -> None:
        problem, state = run.problem, run.state
        rows, params = calibration_batches(problem, self.batches, number), state.prunable_parameters()
        slopes = task_gradient(problem, state.model, rows)
        if self.measure == "loss":
            scores = snip_sensitivity(params, slopes)
        elif self.measure == "change":
            scores = movement_sensitivity(params, target_parameters(problem.pretrained, problem.targets), slopes)
        else:
            # Pruned weights do not count in the gradient norm.
            alive = {name: g * state.masks[name] for name, g in slopes.items()}
            products = hessian_product(problem, state.model, rows, alive)
            scores = {name: s.abs() for name, s in gradient_flow_score(params, products).items()}
        state.set_masks_(self.select_masks(state, goal, scores, within=state.masks))
