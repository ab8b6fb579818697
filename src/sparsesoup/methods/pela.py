"""PELA: layers of low rank instead of masks, trained by the features of the model that they come from."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.low_rank import check_linear, low_rank_facts, product_of, rank_at, split_layers_
from sparsesoup.core.targets import Target, Targets, block_of
from sparsesoup.methods.base import Method
from sparsesoup.training.batching import Batch
from sparsesoup.training.config import DistillConfig
from sparsesoup.training.distillation import distillation_objective
from sparsesoup.training.model_copy import copy_model
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import named_weights


@dataclass(frozen=True, kw_only=True)
class Pela(Method):
    """Low rank in place of masks: each prunable matrix becomes two thin ones, then both are trained. Guo et al. 2024.

    The factors come from a singular value decomposition of the pre-trained weights. First they are trained by the task,
    by the block outputs of the dense pre-trained model, and by a penalty on the largest change of a weight; then by the
    task alone. The result has the stock shapes, every matrix of low rank and all masks full, so its sparsity is 0;
    `export --to low-rank` writes the two thin layers, which are faster on any machine.

    Args:
        compression: weights of a matrix, divided by those of its two factors, at least. The share of parameters removed
            is 1 - 1 / compression: what sparsity is to other methods.
        intermediate: share of T for the training with block outputs and penalty.
        hidden: weight of the mean squared error of the block outputs in it.
        perturbation: weight of the squared excess of the largest weight change over `bound`, averaged over matrices.
        bound: largest weight change without penalty.
    """

    compression: float = 2.0
    intermediate: float = 0.5
    hidden: float = 1.0
    perturbation: float = 1.0
    bound: float = 1e-3

    def __post_init__(self) -> None:
        require(1.0 < self.compression < math.inf, "compression", "above 1", self.compression)
        require(0.0 <= self.intermediate <= 1.0, "intermediate", "a share of T in [0, 1]", self.intermediate)
        for name in ("hidden", "perturbation", "bound"):
            require(0.0 <= getattr(self, name) < math.inf, name, "0 or more", getattr(self, name))

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the intermediate training and the fine-tuning; the sparsity must be 0."""
        self.refuse_sparsity(sparsity)
        size.require_steps(1, "a run")
        first = round(self.intermediate * size.steps)
        trained: dict[str, Any] = {"copies": 1.0, "priced_problem": self._priced_problem}
        phases = [
            Phase(
                name="intermediate", steps=first, own_loss=True, copies=2.0, priced_problem=self._priced_with_teacher
            ),
            Phase(name="fine-tuning", steps=size.steps - first, masks_final=0, **trained),
        ]
        last = [phase for phase in phases if phase.steps][-1]
        return [replace(phase, always=_merge) if phase is last else phase for phase in phases if phase.steps]

    def refuse_sparsity(self, sparsity: float) -> None:
        """Raise a UserError with the compression that removes this share, unless it is 0."""
        if sparsity:
            raise UserError(
                f"pela keeps every weight: sparsity must be 0, got {sparsity:g}; it removes parameters by rank, a "
                f"share of {sparsity:g} with --method.compression {1 / (1 - sparsity):.4g}"
            )

    def check(self, problem: Problem, sparsity: float) -> None:
        """Raise a UserError if a target is no matrix of a linear layer, or the model has no blocks to compare."""
        check_linear(problem.pretrained, problem.targets)
        if self.intermediate and self.hidden and not any(map(block_of, problem.targets)):
            raise UserError("pela compares block outputs, and this model has no blocks; set hidden to 0", "hidden")

    def doubts(self, problem: Problem, sparsity: float) -> list[str]:
        """Return a note on what is removed, which no mask shows."""
        facts = self._facts(problem)
        return [
            f"pela removes parameters by rank, not by masks, which all stay full: {facts['left']:,} of "
            f"{facts['weights']:,} weights are left ({facts['removed']:.1%} removed), after `export --to low-rank`"
        ]

    def start_run(self, problem: Problem, sparsity: float) -> ActiveRun:
        """Start a run on the model of low rank."""
        low = self._low_problem(problem)
        return ActiveRun(low, low.start_run(), with_teacher=self._problem_with_teacher(problem, low), own=problem)

    def notes(self, run: ActiveRun) -> dict[str, Any]:
        """Return the shares of parameters removed, in the paper's unit and as a share."""
        return {"low_rank": {"compression": self.compression, **self._facts(run.own)}}

    def ranks_of(self, targets: Targets) -> dict[str, int]:
        """Return the rank of each target."""
        return {name: rank_at(target.shape, self.compression) for name, target in targets.items()}

    def _facts(self, problem: Problem) -> dict[str, Any]:
        whole = sum(p.numel() for p in problem.pretrained.parameters())
        shapes = [target.shape for target in problem.targets.values()]
        return low_rank_facts(shapes, self.ranks_of(problem.targets).values(), whole)

    def _low_problem(self, problem: Problem, fill: bool = True) -> Problem:
        """Return the problem of the model of low rank, whose targets are the factors; random ones if not filled."""
        model, targets = copy_model(problem.pretrained), Targets()
        ranks = {name.removesuffix(".weight"): rank for name, rank in self.ranks_of(problem.targets).items()}
        split_layers_(model, ranks, fill)
        for name, rank in ranks.items():
            out, inside = problem.targets[f"{name}.weight"].shape
            targets[f"{name}.0.weight"] = Target("other", (rank, inside))
            targets[f"{name}.1.weight"] = Target("other", (out, rank))
        return replace(problem, pretrained=model, targets=targets)

    def _priced_problem(self, problem: Problem) -> Problem:
        return self._low_problem(problem, fill=False)  # FLOPs depend on shapes alone

    def _priced_with_teacher(self, problem: Problem) -> Problem:
        return self._problem_with_teacher(problem, self._priced_problem(problem))

    def _problem_with_teacher(self, problem: Problem, low: Problem) -> Problem:
        """Return the problem of low rank with the loss of the intermediate training."""
        weights = {name: problem.pretrained.get_parameter(name).detach() for name in problem.targets}
        settings = DistillConfig(teacher="pretrained", alpha=0.0, hidden=self.hidden)
        named = replace(low, targets=problem.targets)  # blocks have the names that they have in the teacher
        distilled = distillation_objective(named, copy_model(problem.pretrained), settings)

        def objective(model: nn.Module, batch: Batch) -> Tensor:
            loss = distilled(model, batch).total
            return loss + self.perturbation * self._penalty(model, weights) if self.perturbation else loss

        return replace(low, objective=objective)

    def _penalty(self, model: nn.Module, weights: dict[str, Tensor]) -> Tensor:
        """Return the mean over matrices of max(0, max |second first - W| - bound)^2."""
        changes = [
            (product_of(model.get_submodule(name.removesuffix(".weight"))) - weight.to(_device_of(model))).abs().max()
            for name, weight in weights.items()
        ]
        return (torch.stack(changes) - self.bound).clamp(min=0.0).square().mean()


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def _merge(run: ActiveRun) -> None:
    """Continue with a state of stock shapes, whose matrices are the products of the factors."""
    low, problem = run.state, run.own
    state = problem.start_run()
    found = named_weights(low.model)
    for name, t in named_weights(state.model).items():
        pair = name.removesuffix(".weight")
        if name in problem.targets:
            t.copy_(product_of(low.model.get_submodule(pair)))
        else:
            t.copy_(found[name if name in found else f"{name.rpartition('.')[0]}.1.{name.rpartition('.')[2]}"])
    state.step, state.notes = low.step, low.notes
    run.state = state
