"""Gradual pruning by second-order information: the loss chooses weights, least squares corrects those that stay."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.granularity import Structure
from sparsesoup.core.masking import Scope
from sparsesoup.core.masks import Masks, apply_masks_
from sparsesoup.core.schedules import CubicSchedule, require_ramp
from sparsesoup.methods.base import Method
from sparsesoup.methods.scores.activation import LayerInputs
from sparsesoup.methods.scores.calibration import calibration_batches
from sparsesoup.methods.scores.fisher import FisherAverage
from sparsesoup.methods.scores.least_squares import fit_flops, fit_kept_weights
from sparsesoup.training.config import TrainingOverrides
from sparsesoup.training.plan import ActiveRun, LoopHooks, Phase
from sparsesoup.training.problem import Problem, record_time
from sparsesoup.training.size import RunSize


@dataclass(frozen=True, kw_only=True)
class GradualOBS(Method):
    """Gradual pruning by w^2 F, with the kept weights corrected by least squares at each pruning.

    The diagonal Fisher information says what a weight is worth to the loss (optimal brain damage, LeCun et al. 1990);
    conjugate gradients on the inputs of each layer let the weights that stay make up for those that go (optimal brain
    surgeon, Hassibi & Stork 1993). A weight zeroed by a pruning is still trained, and may be kept by the next one
    (PLATON, Zhang et al. 2022). The last pruning makes the masks final. Dropout is off unless the training sets it: a
    sparse network in a short training underfits.

    Args:
        prunings: number of prunings, evenly spaced; the targets rise on a cubic curve.
        start: share of T before the ramp of the sparsity.
        stop: share of T at the last pruning.
        average: share of T over which squared gradients are averaged (exponentially).
        batches: batches whose inputs, without padding, the layers are fitted to at each pruning.
        iterations: steps of conjugate gradients of each fit; 0: kept weights are not updated.
        structure: structure to prune: weights, rows, columns, heads, units, heads-and-units or features-and-units.
        scope: ranking scope. With N:M a pruning before the last one only takes weights that N:M would take.
    """

    prunings: int = 8
    start: float = 0.1
    stop: float = 0.85
    average: float = 0.2
    batches: int = 2
    iterations: int = 4
    structure: Structure = "weights"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        require(self.prunings >= 1, "prunings", "at least 1", self.prunings)
        require_ramp(self.start, self.stop)
        require(0.0 < self.average <= 1.0, "average", "in (0, 1]", self.average)
        require(self.batches >= 1, "batches", "at least 1", self.batches)
        require(self.iterations >= 0, "iterations", "at least 0", self.iterations)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return a training up to each pruning, and one with the final masks."""
        size.require_fit(self._pruning_steps, f"gradual-obs with {self.prunings} prunings")
        decay = max(0.0, 1 - 1 / (self.average * size.steps))
        fisher, done, phases = FisherAverage(decay=decay), 0, list[Phase]()
        overrides = TrainingOverrides(dropout=0.0) if size.training.dropout is None else None
        for i, at in enumerate(self._pruning_steps(size.steps), start=1):
            phases.append(Phase(
                name=f"ramp-{i}", steps=at - done, overrides=overrides, loop=partial(_observe, fisher), copies=1,
                scores=(("inputs", self.batches),) if self.iterations else (), score_path=("prune", i),
                end_flops=partial(fit_flops, iterations=self.iterations) if self.iterations else None,
                end=partial(self._prune, i, sparsity, fisher),
            ))  # fmt: skip
            done = at
        return [*phases, Phase(name="finish", steps=size.steps - done, overrides=overrides)]

    def check(self, problem: Problem, sparsity: float) -> None:
        """Raise a UserError if the groups cannot reach the sparsity, or a target is a stack of matrices."""
        super().check(problem, sparsity)
        for name, target in problem.targets.items():
            if self.iterations and len(target.shape) != 2:
                raise UserError(
                    f"gradual-obs fits matrices, {name} is a stack of them {target.shape}; set iterations to 0",
                    "iterations",
                )

    def _pruning_steps(self, total: int) -> list[int]:
        """Return the pruning steps at T = `total`; none if two of them, or the end, would coincide."""
        share = (self.stop - self.start) / self.prunings
        steps = [round((self.start + share * (i + 1)) * total) for i in range(self.prunings)]
        return steps if steps[0] >= 1 and steps[-1] < total and len(set(steps)) == self.prunings else []

    def _prune(self, number: int, sparsity: float, fisher: FisherAverage, run: ActiveRun) -> None:
        state, goal = run.state, CubicSchedule(0, self.prunings).sparsity_at(number, sparsity)
        masks = self.select_masks(state, goal, fisher.scores(state))
        weights = self._fitted_weights(number, masks, run) if self.iterations else {}
        if number == self.prunings:
            fisher.clear_(state)
            state.masked = 0.0
            state.prune_and_update_(masks, weights)
            return
        with torch.no_grad():
            for name, new in weights.items():
                state.prunable_parameters()[name].copy_(new)
        apply_masks_(state.prunable_parameters(), masks)
        state.masked = goal

    def _fitted_weights(self, number: int, masks: Masks, run: ActiveRun) -> dict[str, Tensor]:
        """Return the weights that reproduce each layer's outputs with these masks, in the layout of the parameter."""
        problem, state = run.problem, run.state
        rows = calibration_batches(problem, self.batches, "prune", number)
        grams = LayerInputs(problem, state.model, rows, full=True).inputs_of(state.targets)
        weights = {}
        with record_time(problem.meter, "score") as cost:
            for name, parameter in state.prunable_parameters().items():
                turned = state.targets[name].transposed
                matrix, mask = (t.T if turned else t for t in (parameter.detach(), masks[name]))
                new = fit_kept_weights(matrix, grams.pop(name), mask, self.iterations)
                weights[name] = (new.T if turned else new).to(parameter.dtype)
            cost.flops += fit_flops(state.targets, self.iterations)
        return weights


def _observe(fisher: FisherAverage, run: ActiveRun) -> LoopHooks:
    return LoopHooks(observe=fisher.observe_gradients)
