"""The driver of our own loop: carries out the plan of a method."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsesoup.core.targets import names_in_blocks
from sparsesoup.core.ticket import Ticket
from sparsesoup.training.cached_train import train_cached
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.forks import Tensors
from sparsesoup.training.loop import train, train_head
from sparsesoup.training.observer import Observer
from sparsesoup.training.overrides import only_trained
from sparsesoup.training.plan import ActiveRun, LoopHooks, Phase, early_stopping_of, planned_steps
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import TrainState, named_weights


class Planned(Protocol):
    """Interface of a method that the driver uses; see `sparsesoup.methods.base.Method`."""

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]: ...
    def check(self, problem: Problem, sparsity: float) -> None: ...
    def start_run(self, problem: Problem, sparsity: float) -> ActiveRun: ...
    def notes(self, run: ActiveRun) -> dict[str, Any]: ...


def run_plan(method: Planned, problem: Problem, sparsity: float) -> Ticket:
    """Carry out the plan of a method, and return its ticket.

    Raises: UserError, before the first step, if the method does not fit T, the model or the sparsity.
    """
    run = carry_out_plan(method, problem, sparsity)
    return problem.finish_run(run.state, **method.notes(run))


def carry_out_plan(method: Planned, problem: Problem, sparsity: float) -> ActiveRun:
    """Carry out the plan of a method; the run is not finished, so its model is not scored."""
    phases, run = _begin(method, problem, sparsity)
    for is_fork, group in groupby(phases, lambda phase: phase.kind == "fork"):
        (run_forks if is_fork else _run_phases)(run, list(group))
    return run


def dry_run(method: Planned, problem: Problem, sparsity: float) -> None:
    """Do what a method does before its first pass through the model, which is where it refuses what does not fit.

    Raises: UserError if the method refuses the problem.
    """
    meter = CostTracker()
    idle = replace(problem, meter=meter, checkpointer=Checkpointer(meter), observer=Observer())
    phases, run = _begin(method, idle, sparsity)
    for phase in phases:
        if phase.steps or phase.scores or phase.validations:
            if phase.loop is not None:
                phase.loop(run)
            break
        _run_phases(run, [phase])


def _begin(method: Planned, problem: Problem, sparsity: float) -> tuple[list[Phase], ActiveRun]:
    phases = method.plan(problem.size, sparsity)
    early_stopping_of(phases, problem.training)
    method.check(problem, sparsity)
    run = method.start_run(problem, sparsity)
    run.phases, run.sparsity = phases, sparsity
    return phases, run


def _report_left(run: ActiveRun) -> None:
    """Tell the observer how many steps are left of the whole run."""
    done = run.problem.checkpointer.finished
    run.problem.observer.steps_left(planned_steps([phase for phase in run.phases if phase.name not in done]))


def _run_phases(run: ActiveRun, phases: Sequence[Phase]) -> None:
    for phase in phases:
        _report_left(run)
        run.problem.checkpointer.run_stage(phase.name, run.state, run_phase, run, phase, hold=phase.hold)
        if phase.always is not None:
            phase.always(run)


def run_phase(run: ActiveRun, phase: Phase) -> Any:
    """Carry out a phase on a run; return what its end returns."""
    if phase.skip is not None and phase.skip(run.state):
        return None
    steps = phase.steps if phase.until is None else phase.until - run.state.step
    if steps := steps if phase.lasts is None else phase.lasts(run):
        _train_phase(run, phase, steps)
    if phase.store:
        run.problem.checkpointer.put_artifact(phase.store, named_weights(run.state.model))
    return phase.end(run) if phase.end is not None else None


def _train_phase(run: ActiveRun, phase: Phase, steps: int) -> None:
    problem, state = run.problem, run.state
    if phase.own_loss:
        assert run.with_teacher is not None
        problem = run.with_teacher
    if phase.fresh_optimizer:
        state.reset_optimizer_()
    stopping = early_stopping_of(run.phases, problem.training) if run.phases and phase is run.phases[-1] else None
    if phase.kind == "head":
        train_head(state, problem, steps)
    elif phase.shared:
        train_cached(state, problem, steps, phase.stream, phase.label, stopping, phase.keeps_moments)
    else:
        inside = LoopHooks() if phase.loop is None else phase.loop(run)
        hooks = tuple(inside.hooks)
        for hook in hooks if inside.at_start and state.step == 0 else ():
            hook(state)
        blocks, names = phase.kind == "blocks", [name for name, _ in state.model.named_parameters()]
        with only_trained(state.model, names_in_blocks(names, state.targets) if blocks else names):
            train(
                state, problem, steps, stream=phase.stream, rate=phase.rate, hooks=hooks, observe=inside.observe,
                penalty=inside.penalty, split=phase.split_loss, label=phase.label, protocol=phase.overrides,
                stopping=stopping,
            )  # fmt: skip
    if not phase.keeps_moments:
        state.reset_optimizer_()


def run_forks(run: ActiveRun, phases: Sequence[Phase]) -> None:
    """Run phases on copies of the state, maybe in other processes, and add their results to the state's memory."""
    results = run.problem.map(run.problem, run.state, run_fork, [(phase,) for phase in phases])
    for number, phase in enumerate(phases):
        _report_left(run)
        run.problem.checkpointer.run_stage(phase.name, run.state, _add_result, run.state, results, number)


def run_fork(problem: Problem, state: TrainState, phase: Phase) -> Tensors:
    """Carry out a phase on a copy of a state, and return its result."""
    found: Tensors | None = run_phase(ActiveRun(problem, state), phase)
    return found or {}


def _add_result(state: TrainState, results: Callable[[int], Tensors], number: int) -> None:
    """Add the tensors of a fork to the state's memory."""
    for name, t in results(number).items():
        before: Tensor | None = state.memory.get(name)
        device: torch.device = next(iter(state.masks.values())).device
        state.memory[name] = t.to(device) if before is None else before + t.to(before.device)
