"""Estimate the cost of runs: steps and FLOPs from their plans, seconds and memory by a short probe."""

import copy
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsesoup.core.granularity import Element
from sparsesoup.hub.build import EPOCHS, OpenedTask, build_problem, open_task
from sparsesoup.methods import Method
from sparsesoup.runs.config import RunConfig
from sparsesoup.runs.memory import disk_of, extra_memory, memory_remedies, state_sizes
from sparsesoup.runs.teacher import DENSE, TEACHER, attach_teacher, dense_config
from sparsesoup.study.cost.flops_model import FINAL, Costs, FlopsModel, phase_costs, plan_costs
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.cost import Cost, CostTracker
from sparsesoup.training.distillation import distillation_objective
from sparsesoup.training.driver import dry_run
from sparsesoup.training.evaluation import EVALUATION
from sparsesoup.training.loop import train
from sparsesoup.training.observer import Observer
from sparsesoup.training.plan import Phase
from sparsesoup.training.problem import Problem, evaluate_model, record_time

PARTS = {"structure": "weights", "pattern": Element, "tile": Element}  # method settings for groups
TIMED = 4  # training steps, and validation batches, timed by a probe
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class CostEstimate:
    """The estimated cost of a run."""

    steps: int  # T
    costs: Costs  # by label, as recorded in a run; `shared` is the part done by another run of the study
    seconds: float = 0.0  # of one process without sharing; 0 if nothing was timed
    saved: float = 0.0  # seconds saved by sharing
    memory: float = 0.0  # peak bytes of a process; if nothing was timed, those beside plain training
    disk: tuple[int, int] = (0, 0)  # bytes of the run's directory: the most, and those that stay
    cached: int = 0  # bytes of trainings that the run adds to the cache of a study, at most
    remedies: tuple[str, ...] = ()  # what makes it need less memory

    @property
    def total_cost(self) -> Cost:
        """Return the sum of all costs."""
        return sum(self.costs.values(), Cost())


@dataclass(frozen=True)
class SpeedProbe:
    """A short measurement of a real problem: seconds per FLOP, and peak memory in bytes."""

    train: float
    forward: float
    memory: float


class CostEstimator:
    """Estimate the runs of a study one after the other; later ones reuse trainings of earlier ones.

    If `timed`, also seconds and memory, for which the real model is trained for a few steps; memory depends on where
    `snapshots` are.
    """

    def __init__(self, timed: bool = True, snapshots: str = "device") -> None:
        self.timed, self.snapshots = timed, snapshots
        self._where: object = None
        self._opened: OpenedTask | None = None
        self._problems: dict[int, Problem] = {}
        self._prices: dict[object, FlopsModel] = {}
        self._probes: dict[object, SpeedProbe] = {}
        self._trained: set[object] = set()
        self._known: dict[str, CostEstimate] = {}
        self._simulated: set[str] = set()

    def estimate_run(self, settings: RunConfig) -> CostEstimate:
        """Return the estimate of a run."""
        found, key = self.estimate_uncached(settings), _run_key_of(settings)
        if key in self._simulated:  # the same run under another name, or the teacher of an earlier one
            shared = {k: replace(c, shared=c.steps) for k, c in found.costs.items()}
            found = replace(found, costs=shared, cached=0)
        self._simulated.add(key)
        return self._price_run(settings, found) if self.timed else found

    def estimate_uncached(self, settings: RunConfig) -> CostEstimate:
        """Return steps and FLOPs of a run; sharing is that of its first estimate."""
        problem = self.real_problem(settings)
        if (key := _run_key_of(settings)) not in self._known:
            self._known[key] = self._cost_of(settings, problem)
        return self._known[key]

    def real_problem(self, settings: RunConfig) -> Problem:
        """Return the real problem of a run."""
        where, seed = replace(settings.model_data, seed=0), settings.model_data.seed
        if where != self._where:
            for table in (self._problems, self._prices, self._probes, self._trained):
                table.clear()
            self._where, self._opened = where, open_task(settings.model_data)
        if seed not in self._problems:
            assert self._opened is not None
            built = build_problem(settings.model_data, self._opened, steps=1)
            first = next(iter(self._problems.values()), built)  # its model is used for other seeds too
            self._problems[seed] = replace(built, pretrained=first.pretrained)
        real = self._problems[seed]
        steps = steps_of(settings, replace(real, training=settings.train).steps_per_epoch)
        return replace(real, training=settings.train, steps=steps, checkpointer=Checkpointer(real.meter))

    def _cost_of(self, settings: RunConfig, problem: Problem) -> CostEstimate:
        sparsity, same = float(settings.budget.sparsity or 0.0), (settings.train, problem.steps, problem.seed)
        if needs_structure(settings.method):
            dry_run(settings.method, problem, sparsity)
        phases = settings.method.plan(problem.size, sparsity)

        sizes, cached = state_sizes(problem.pretrained, problem.targets, settings.train), list[int]()

        def is_known(phase: Phase, key: object) -> bool:
            known = (*same, key) in self._trained
            self._trained.add((*same, key))
            cached.append(0 if known else sizes.weights + sizes.moments * phase.keeps_moments)
            return known

        costs = plan_costs(phases, problem, self._prices_of(settings, problem), is_known)
        if settings.train.distill.teacher == DENSE:
            costs = self._add_teacher_cost(settings, costs)
        how = phases, sizes, settings.train, problem.accelerator.device, self.snapshots
        return CostEstimate(
            problem.steps, costs, memory=extra_memory(*how), disk=disk_of(phases, sizes, self.snapshots),
            cached=sum(cached), remedies=tuple(memory_remedies(*how, problem.pretrained)),
        )  # fmt: skip

    def _add_teacher_cost(self, settings: RunConfig, costs: Costs) -> Costs:
        """Return the costs with the teacher's own run, as `sparsesoup.runs.teacher` counts it."""
        plain = dense_config(settings)
        own = self.estimate_uncached(plain).costs
        cost = sum((c for label, c in own.items() if label != "validation"), Cost())
        if (key := _run_key_of(plain)) in self._simulated:
            cost = replace(cost, shared=cost.steps)
        self._simulated.add(key)
        return {**costs, TEACHER: cost}

    def _prices_of(self, settings: RunConfig, problem: Problem) -> FlopsModel:
        key = settings.train.distill
        if key not in self._prices:
            self._prices[key] = FlopsModel(self._problem_on_device(settings, problem))
        return self._prices[key]

    def _problem_on_device(self, settings: RunConfig, problem: Problem) -> Problem:
        """Return the problem on its device, with its teacher; an untrained one is replaced by the model itself."""
        teacher, device = settings.train.distill.teacher, problem.accelerator.device
        if teacher == DENSE:
            same = copy.deepcopy(problem.pretrained)
            problem = replace(problem, objective=distillation_objective(problem, same, settings.train.distill))
        elif teacher:
            assert self._opened is not None
            problem = attach_teacher(problem, settings, self._opened, teacher)
        if device.type != "cpu":
            problem = replace(problem, pretrained=copy.deepcopy(problem.pretrained).to(device))
        return problem

    def _price_run(self, settings: RunConfig, found: CostEstimate) -> CostEstimate:
        problem = self.real_problem(settings)
        if settings.train not in self._probes:
            self._probes[settings.train] = probe_speed(
                self._problem_on_device(settings, problem), self._prices_of(settings, problem)
            )
        rates = self._probes[settings.train]
        times = {
            k: c.flops * (rates.forward if k in ("validation", EVALUATION) else rates.train)
            for k, c in found.costs.items()
        }
        saved = sum(times[k] * c.shared / c.steps for k, c in found.costs.items() if c.steps)
        return replace(found, seconds=sum(times.values()), saved=saved, memory=rates.memory + found.memory)


class _UncountedTracker(CostTracker):
    """A cost tracker that measures time alone: counting FLOPs takes time itself."""

    def run_and_count_flops(self, shape: tuple[object, ...], work: Any) -> tuple[Any, int]:
        return work(), 0


def probe_speed(problem: Problem, prices: FlopsModel) -> SpeedProbe:
    """Train for a few steps, the first of them on the longest rows, and evaluate a few validation batches."""
    meter, device = _UncountedTracker(), problem.accelerator.device
    training = replace(problem.training, eval_steps=None, early_stopping_patience=None)
    problem = replace(problem, meter=meter, checkpointer=Checkpointer(meter), observer=Observer(), training=training)
    _forget_peak(device)
    state = problem.start_run()
    longest = problem.train.select_rows(problem.train.eval_batches(problem.training.batch_size)[-1])
    train(state, replace(problem, train=longest), 1, label="first")  # warm-up of the libraries
    train(state, problem, TIMED)
    batches = problem.validation.eval_batches(2 * problem.training.batch_size)
    some = [row for batch in batches[:: -(-len(batches) // TIMED)] for row in batch]
    problem = replace(problem, validation=problem.validation.select_rows(some))
    with record_time(meter, "validation") as cost:
        evaluate_model(problem, state.model, problem.validation, cost)
    ((_, trained),) = phase_costs(Phase(name="train", steps=TIMED), 1, problem, prices)
    ((_, validated),) = phase_costs(FINAL, 1, problem, prices)
    seconds = {label: cost.seconds for label, cost in meter.costs.items()}
    return SpeedProbe(
        seconds["main"] / max(trained.flops, 1), seconds["validation"] / max(validated.flops, 1), _peak_bytes(device)
    )


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access(FORGET, os.W_OK):
        FORGET.write_text("5", encoding="ascii")  # reset the peak to the current resident memory


def _peak_bytes(device: torch.device) -> float:
    """Return peak memory in bytes: of the accelerator if there is one, else of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if STATUS.is_file():
        line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return 1024.0 * int(line.split()[1])
    import resource  # Unix alone has it

    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def steps_of(settings: RunConfig, steps_per_epoch: int) -> int:
    """Return T of a run."""
    if settings.budget.steps is not None:
        return settings.budget.steps
    return max(1, round((settings.budget.epochs or EPOCHS) * steps_per_epoch))


def needs_structure(method: Method) -> bool:
    """Return True if a method prunes structures that not every model has."""
    return any(getattr(method, name, plain) != plain for name, plain in PARTS.items())


def _run_key_of(settings: RunConfig) -> str:
    """Return the key of a run's directory."""
    model_data = settings.model_data
    return f"{settings.name} {settings.run_key()} {model_data.dataset} {model_data.dataset_config} {model_data.seed}"
