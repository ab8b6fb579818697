"""Sparse progressive distillation: a pruned student learns among blocks of its dense teacher."""

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.granularity import Structure
from sparsesoup.core.masking import Scope
from sparsesoup.core.rng import cpu_generator
from sparsesoup.core.schedules import CubicSchedule, CyclicLinearDecay, require_ramp
from sparsesoup.core.targets import block_of
from sparsesoup.methods.base import Method
from sparsesoup.methods.gradual import pruning_hook
from sparsesoup.training.attention_maps import attention_layers
from sparsesoup.training.config import DistillConfig
from sparsesoup.training.distillation import block_names, distillation_objective
from sparsesoup.training.model_copy import copy_model
from sparsesoup.training.plan import ActiveRun, LoopHooks, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import TrainState, named_weights

TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True)
class SparseProgressiveDistillation(Method):
    """Magnitude pruning of a copy of a fine-tuned teacher, which computes some of its blocks. Huang et al. 2022.

    The teacher is `train.distill.teacher`, of the same shape; without one the model is fine-tuned first, for T steps.
    The student starts as its copy; only its repeated blocks are trained, by the teacher's outputs, block outputs and
    attention maps, not by labels. In each step every block is, with a probability, the teacher's frozen one. Three
    stages: pruning at a constant probability, a decline of it to 0, and a training of the student alone.

    Args:
        start: share of T before the first pruning.
        stop: share of T at the last pruning.
        every: share of T between prunings.
        graft: probability of a teacher's block at the start.
        constant: share of T during which that probability is constant.
        alone: share of T from which the student is alone; 1 with constant 1: it never is, as in the released command.
        attention: weight of the squared error of the attention maps, summed over the blocks.
        hidden: weight of the squared error of the block outputs, summed over the blocks.
        temperature: softmax temperature for the outputs of teacher and student.
        restart: let the learning rate decay to 0 at the last pruning, and start again from its peak.
        structure: structure to prune: weights, rows, columns, heads, units, heads-and-units or features-and-units.
        scope: ranking scope.
    """

    start: float = 0.0
    stop: float = 0.5
    every: float = 0.05
    graft: float = 0.2
    constant: float = 0.5
    alone: float = 2 / 3
    attention: float = 1.0
    hidden: float = 1.0
    temperature: float = 1.0
    restart: bool = False
    structure: Structure = "weights"
    scope: Scope = "tensor"

    def __post_init__(self) -> None:
        require_ramp(self.start, self.stop, whole=True)
        require(0.0 < self.every < math.inf, "every", "above 0", self.every)
        require(0.0 <= self.graft <= 1.0, "graft", "a probability in [0, 1]", self.graft)
        require(0.0 <= self.constant <= 1.0, "constant", "a share of T in [0, 1]", self.constant)
        allowed = f"a share of T from constant ({self.constant:g}) to 1"
        require(self.constant <= self.alone <= 1.0, "alone", allowed, self.alone)
        for name in ("attention", "hidden"):
            require(0.0 <= getattr(self, name) < math.inf, name, "0 or more", getattr(self, name))
        require(0.0 < self.temperature < math.inf, "temperature", "above 0", self.temperature)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the training of the teacher, unless one is given, and that of the student."""
        size.require_steps(4, "a gradual schedule")
        own, total = not size.training.distill.teacher, size.steps
        steps = round(self.start * total), round(self.stop * total), max(1, round(self.every * total))
        schedule = CubicSchedule(*steps)
        peak = size.training.learning_rate
        rate = CyclicLinearDecay(peak, 0.0, steps[1], steps[1], 1, total) if self.restart else None
        teach = Phase(
            name=TEACHER, steps=total if own else 0, label=TEACHER, shared=own, keeps_moments=False,
            store=TEACHER if own else "", models=1,
            end=partial(_become_teacher, own), rewinds_to=0 if own else None, always=partial(_load_teacher, own),
        )  # fmt: skip
        loop = partial(_student_hooks, self, schedule, sparsity)
        train = Phase(
            name="train", steps=total, kind="blocks", rate=rate, loop=loop, own_loss=True, models=1,
            priced_problem=self._priced_problem, masks_final=schedule.stop,
        )  # fmt: skip
        return [teach, train]

    def check(self, problem: Problem, sparsity: float) -> None:
        """Raise a UserError if the model has no blocks, or the teacher is of another shape."""
        super().check(problem, sparsity)
        if not any(map(block_of, problem.targets)):
            raise UserError("sparse-progressive-distillation exchanges repeated blocks, and this model has none")
        distill = problem.training.distill
        if distill.teacher and distill != DistillConfig(teacher=distill.teacher):
            raise UserError(
                "sparse-progressive-distillation has its own weights and temperature (--method.hidden, ...); give no "
                "other setting of train.distill than the teacher",
                "train.distill",
            )
        if problem.teacher is not None:
            shapes = [{n: t.shape for n, t in named_weights(m).items()} for m in (problem.teacher, problem.pretrained)]
            if shapes[0] != shapes[1]:
                raise UserError(
                    "the student of sparse-progressive-distillation is a copy of its teacher, and this one is of "
                    "another shape than the model; give a fine-tuned copy of the model, or none",
                    "train.distill.teacher",
                )

    def doubts(self, problem: Problem, sparsity: float) -> list[str]:
        """Return a note if the model has no attention maps to compare."""
        if not self.attention or attention_layers(problem.targets):
            return []
        return ["this model has no separate query and key matrices, so attention maps are not compared"]

    def start_run(self, problem: Problem, sparsity: float) -> ActiveRun:
        """Start a run with a loss that the teacher is part of."""
        run = super().start_run(problem, sparsity)
        run.own = copy_model(problem.pretrained if problem.teacher is None else problem.teacher)
        run.with_teacher = self._problem_with_teacher(problem, run.own, partial(self._draw_grafts, problem, run.state))
        return run

    def teacher_share(self, step: int, total: int) -> float:
        """Return the probability of a teacher's block at a step.

        >>> method = SparseProgressiveDistillation(graft=0.4)
        >>> " ".join(f"{method.teacher_share(step, 12):.1f}" for step in (0, 6, 7, 8, 11))
        '0.4 0.4 0.2 0.0 0.0'
        """
        if step < self.constant * total:
            return self.graft
        left = self.alone * total - step
        return max(0.0, self.graft * left / ((self.alone - self.constant) * total)) if left > 1e-9 else 0.0

    def _draw_grafts(self, problem: Problem, state: TrainState) -> list[str]:
        """Return the blocks that the teacher computes in this step; the same after a restart."""
        names, share = block_names(problem.targets), self.teacher_share(state.step, problem.steps)
        draws = torch.rand(len(names), generator=cpu_generator(problem.seed, "graft", state.step))
        return [name for name, draw in zip(names, draws.tolist(), strict=True) if draw < share]

    def _problem_with_teacher(self, problem: Problem, teacher: Any, graft: Any = None) -> Problem:
        blocks, layers = len(block_names(problem.targets)), len(attention_layers(problem.targets))
        settings = DistillConfig(
            teacher=TEACHER, alpha=1.0, temperature=self.temperature, hidden=self.hidden * blocks,
            attention=self.attention * layers,
        )  # fmt: skip
        return replace(problem, objective=distillation_objective(problem, teacher, settings, graft))

    def _priced_problem(self, problem: Problem) -> Problem:
        return self._problem_with_teacher(problem, copy.deepcopy(problem.pretrained))


def _student_hooks(
    method: SparseProgressiveDistillation, schedule: CubicSchedule, sparsity: float, run: ActiveRun
) -> LoopHooks:
    return LoopHooks([pruning_hook(method, schedule, sparsity)], at_start=True)


@torch.no_grad()
def _become_teacher(own: bool, run: ActiveRun) -> None:
    """Start the student as a copy of its teacher: the model as trained so far, or the given one."""
    if not own:
        found = named_weights(run.own)
        for name, t in named_weights(run.state.model).items():
            t.copy_(found[name])
    run.state.step = 0


@torch.no_grad()
def _load_teacher(own: bool, run: ActiveRun) -> None:
    """Load the weights of the teacher that the run has trained itself, also after a restart."""
    found = run.problem.checkpointer.get_artifact(TEACHER) if own else {}
    for name, t in named_weights(run.own).items() if found else ():
        t.copy_(found[name])
