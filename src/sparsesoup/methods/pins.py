"""PINS: prune by the importance after the next step, with the best model so far as a teacher."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsesoup.core.errors import require
from sparsesoup.core.granularity import Structure
from sparsesoup.core.schedules import CubicSchedule
from sparsesoup.methods.base import Method
from sparsesoup.methods.platon import AVERAGES, check_ramp, pruning_ramp, ramp_hooks
from sparsesoup.methods.scores.averages import ImportanceAverages, after_step
from sparsesoup.training.batching import Batch
from sparsesoup.training.distillation import distillation_divergence
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import TrainState, named_weights


@dataclass(frozen=True, kw_only=True)
class Pins(Method):
    """PLATON's averages of |g (w - rate g)|, with the run's own best model as a teacher. Ren & Zhu 2023.

    At `checks` prunings, the first of them before anything is pruned, the model is scored on the validation rows. The
    latest model that was at least as good as all before it is the teacher from then on: the loss of each row gains
    (1 - entropy of the model's output / the largest possible) * divergence from the teacher's output.

    Args:
        fast: decay of the moving average of the importance.
        slow: decay of the moving average of the uncertainty.
        every_steps: steps between prunings.
        window: steps whose mean sensitivity is one observation; every_steps must be a multiple of it.
        start: share of T before the cubic ramp of the sparsity.
        stop: share of T at the last pruning, which may come up to every_steps - 1 steps earlier.
        checks: number of possible teacher changes, evenly over the ramp; at most one per pruning.
        temperature: softmax temperature for the outputs of teacher and student.
        structure: structure to prune: weights, rows, columns, heads, units, heads-and-units or features-and-units.
    """

    fast: float = 0.85
    slow: float = 0.99
    every_steps: int = 10
    window: int = 10
    start: float = 0.1
    stop: float = 0.7
    checks: int = 4
    temperature: float = 2.0
    structure: Structure = "weights"

    def __post_init__(self) -> None:
        check_ramp(self)
        require(self.checks >= 1, "checks", "at least 1", self.checks)
        require(0.0 < self.temperature < math.inf, "temperature", "above 0", self.temperature)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the ramp of the sparsity, cut at the checks, and a training with the final masks."""
        ramp, done, phases = pruning_ramp(size, self.start, self.stop, self.every_steps), 0, list[Phase]()
        averages = ImportanceAverages(
            sensitivity=after_step, fast=self.fast, slow=self.slow, window=self.window, origin=ramp.start
        )
        loop, copies = partial(ramp_hooks, self, ramp, sparsity, averages), AVERAGES + 1.0  # and the teacher
        for number, at in enumerate(check_steps(ramp, self.checks)):
            phases.append(
                Phase(
                    name=f"ramp-{number + 1}",
                    steps=at - done,
                    loop=loop,
                    copies=copies,
                    validations=1,
                    own_loss=number > 0,  # before the first check there is no teacher and no cost of one
                    end=partial(_choose_teacher, ramp, sparsity),
                )
            )
            done = at
        return [
            *phases,
            Phase(name="ramp-end", steps=ramp.stop - done, loop=loop, own_loss=True, copies=copies),
            Phase(name="finish", steps=size.steps - ramp.stop, own_loss=True, copies=1),
        ]

    def start_run(self, problem: Problem, sparsity: float) -> ActiveRun:
        """Start a run with a loss that the teacher is part of."""
        run = super().start_run(problem, sparsity)
        run.with_teacher = replace(problem, objective=self_distillation_loss(problem, run.state, self.temperature))
        return run


def check_steps(plan: CubicSchedule, checks: int) -> list[int]:
    """Return the prunings after which the model is scored: the first, and others evenly, none of them the last.

    >>> check_steps(CubicSchedule(20, 140, 10), 4)
    [20, 50, 80, 110]
    """
    gaps = (plan.stop - plan.start) // plan.every
    return sorted({plan.start + plan.every * (gaps * i // checks) for i in range(checks)})


def _choose_teacher(ramp: CubicSchedule, sparsity: float, run: ActiveRun) -> None:
    """Score the model on the validation rows; it teaches from now on if it is at least as good as all before it."""
    state = run.state
    metric, value = next(iter(run.problem.validate(state.model).items()))
    done: list[dict[str, Any]] = state.notes.setdefault("teachers", [])
    best = max((check[metric] for check in done), default=-math.inf)
    better = not done or value >= best
    done.append(
        {"step": state.step, "sparsity": ramp.sparsity_at(state.step, sparsity), metric: value, "teaches": better}
    )
    if better:
        state.memory |= {f"teacher/{name}": t.detach().clone() for name, t in named_weights(state.model).items()}


def self_distillation_loss(
    problem: Problem, state: TrainState, temperature: float
) -> Callable[[nn.Module, Batch], Tensor]:
    """Return the objective problem.loss + (1 - normalised entropy) * divergence from the teacher in the state's memory.

    The student runs only once, whatever the base loss: its outputs are reused.
    """
    model = problem.accelerator.prepare_model(copy.deepcopy(problem.pretrained), evaluation_mode=True)
    model.eval().requires_grad_(False)

    def objective(student: nn.Module, batch: Batch) -> Tensor:
        for name, t in named_weights(model).items():  # no copy; a restart replaces the memory's tensors
            t.data = state.memory[f"teacher/{name}"]
        with torch.no_grad():
            wanted = problem.outputs_alone(model, batch)
        given_outputs: list[Any] = []
        handle = student.register_forward_hook(lambda module, inputs, output: given_outputs.append(output))
        try:
            loss = problem.training_loss(student, batch)
        finally:
            handle.remove()
        given = problem.outputs_alone(_CachedAnswers(student, given_outputs[0]), batch)
        mask = batch.get("attention_mask") if given.dim() == 3 else None
        divergence = distillation_divergence(given, wanted, temperature, mask)
        return loss + (answer_certainty(given.detach(), mask) * divergence).mean()

    return objective


def answer_certainty(outputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return 1 - entropy / log(answers) of each row, in [0, 1]: [rows]; 1 for a number, which has no entropy.

    Args:
        outputs: [rows, ..., answers]; averaged over several outputs per row. Answers with a logit so low that their
            probability is 0 (a position outside of the context) are not counted.
        mask: [rows, tokens] of outputs [rows, tokens, answers]: tokens that count; default all.

    >>> answer_certainty(torch.tensor([[0.0, 0.0], [0.0, -1e9]])).tolist()
    [0.0, 1.0]
    """
    if outputs.shape[-1] == 1:
        return torch.ones(len(outputs), device=outputs.device)
    odds = outputs.float().softmax(-1)
    entropy = torch.special.entr(odds).sum(-1) / (odds > 0).sum(-1).clamp_min(2).log()
    if mask is not None and mask.shape == entropy.shape:
        return 1.0 - entropy.masked_fill(mask == 0, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
    return 1.0 - entropy.flatten(1).mean(1) if entropy.dim() > 1 else 1.0 - entropy


class _CachedAnswers(nn.Module):
    """A model that returns cached outputs; it keeps the parameters of a frozen head."""

    def __init__(self, model: nn.Module, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        for name, t in model.named_buffers(recurse=False):
            self.register_buffer(name, t)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.answer
