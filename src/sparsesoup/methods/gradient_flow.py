"""Rounds of short training and pruning by gradient flow, then training at constant sparsity."""

from dataclasses import dataclass
from typing import Literal

from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Pattern, Structure
from sparsesoup.core.groups import validate_groups
from sparsesoup.core.masking import Scope
from sparsesoup.core.schedules import CubicSchedule
from sparsesoup.core.targets import target_parameters
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods.scores.calibration import calibration_batches, need_batches
from sparsesoup.methods.scores.gradient import (
    gradient_flow_score,
    hessian_product,
    movement_sensitivity,
    snip_sensitivity,
    task_gradient,
)
from sparsesoup.methods.select_masks import select_masks
from sparsesoup.training.loop import train_to
from sparsesoup.training.problem import Problem, require_schedule_fits
from sparsesoup.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class GradientFlow:
    """Rounds of training and pruning by the effect of a weight on loss or gradient norm. Lubana & Dick 2021.

    Args:
        measure: loss (|w g|, preserves the loss), change (|w - w_0| |w g|, for weights that have moved) or norm
            (|w (H g)|, preserves the gradient norm; four times the cost).
        rounds: number of prunings; the targets rise on a cubic curve.
        finish: share of T after the last pruning.
        batches: batches for gradient and Hessian, drawn anew for each round.
        structure: structure to prune: weights, or whole rows, columns, heads, units, heads-and-units.
        scope: ranking scope.
    """

    measure: Literal["loss", "change", "norm"] = "loss"
    rounds: int = 5
    finish: float = 0.5
    batches: int = 16
    structure: Structure = "weights"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        need_batches("gradient-flow", self.batches)
        if self.rounds < 1 or not 0.0 < self.finish < 1.0:
            raise UserError(
                f"gradient-flow needs rounds >= 1 and finish in (0, 1), got {self.rounds} and {self.finish:g}"
            )

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """Return the ticket after T steps."""
        require_schedule_fits(problem, self._pruning_steps, f"gradient-flow with {self.rounds} rounds")
        pattern = validate_groups(problem.targets, self.structure, sparsity, scope=self.scope)
        state, plan = problem.start_run(), CubicSchedule(0, self.rounds)
        for number, at in enumerate(self._pruning_steps(problem.steps), start=1):
            piece, goal = f"round-{number}", plan.sparsity_at(number, sparsity)
            problem.journal.run_stage(f"{piece}-train", state, train_to, state, problem, at)
            problem.journal.run_stage(f"{piece}-prune", state, self._prune_once, problem, state, goal, number, pattern)
        problem.journal.run_stage("finish", state, train_to, state, problem, problem.steps)
        return problem.finish_run(state, measure=self.measure)

    def _pruning_steps(self, total: int) -> list[int]:
        """Return the pruning steps at T = `total`; none if a round or the finish would have no step of its own."""
        steps = [round((1 - self.finish) * total * i / self.rounds) for i in range(1, self.rounds + 1)]
        return steps if steps[0] >= 1 and steps[-1] < total and len(set(steps)) == self.rounds else []

    def _prune_once(self, problem: Problem, state: TrainState, goal: float, number: int, pattern: Pattern) -> None:
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
        state.set_masks_(select_masks(state, scores, goal, pattern=pattern, scope=self.scope, within=state.masks))
