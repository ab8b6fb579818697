"""Estimate the cost of trials: steps and FLOPs by simulation, seconds and memory by a short probe."""

import copy
import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Block, Element
from sparsesoup.hub.build import EPOCHS, OpenedTask, build_problem, open_task
from sparsesoup.methods import Method
from sparsesoup.methods.from_ticket import FromTicket
from sparsesoup.methods.one_shot import OneShot
from sparsesoup.runs.config import RunConfig
from sparsesoup.runs.teacher import DENSE, TEACHER, attach_teacher, dense_config, dry_run_checks
from sparsesoup.study.cost.flops_model import FlopsModel, SimulatedCostTracker
from sparsesoup.study.cost.simulator import WIDTH, empty_rows, even_subset, twin_of
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.cost import Cost
from sparsesoup.training.distillation import distillation_objective
from sparsesoup.training.loop import train
from sparsesoup.training.problem import NullObserver, Problem, charge_time, evaluate_model
from sparsesoup.training.train_cache import CachedTraining

PARTS = {"structure": "weights", "pattern": Element, "tile": Element}  # method settings for groups
TIMED = 4  # training steps, and validation batches, timed by a probe
Costs = dict[str, Cost]
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class CostEstimate:
    """The estimated cost of a trial.

    Args:
        steps: T.
        costs: by label, as recorded in a run; `shared` is the part done by another trial of the study.
        seconds: of one process without sharing; 0 if nothing was timed.
        saved: seconds saved by sharing.
        memory: peak bytes of a process; 0 if nothing was timed.
    """

    steps: int
    costs: Costs
    seconds: float = 0.0
    saved: float = 0.0
    memory: float = 0.0

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
    """Estimate the trials of a study one after the other; later ones reuse trainings of earlier ones.

    Costs do not depend on values, so a search that may stop early is estimated at its longest.

    Args:
        timed: also estimate seconds, memory and sharing, which trains the real model for a few steps.
        exact: largest T simulated step by step; beyond it costs are extrapolated linearly from two shorter runs.
        alike: T from which one seed stands for all; seeds differ only in which rows are padded together.
    """

    def __init__(self, timed: bool = True, exact: int = 1024, alike: int = 1024) -> None:
        self.timed, self.exact, self.alike = timed, exact, alike
        self._where: object = None
        self._opened: OpenedTask | None = None
        self._problems: dict[int, Problem] = {}
        self._prices: dict[object, FlopsModel] = {}
        self._probes: dict[object, SpeedProbe] = {}
        self._products: dict[str, CachedTraining] = {}
        self._known: dict[str, CostEstimate] = {}
        self._drawn: set[str] = set()

    def estimate_run(self, settings: RunConfig) -> CostEstimate:
        """Return the estimate of a run.

        Raises: UserError if the run would be refused.
        """
        found, key = self.estimate_uncached(settings), _run_key_of(settings)
        if key in self._drawn:  # the same run under another name, or the teacher of an earlier one
            found = replace(found, costs={k: replace(c, shared=c.steps) for k, c in found.costs.items()})
        self._drawn.add(key)
        return self._price_run(settings, found) if self.timed else found

    def estimate_uncached(self, settings: RunConfig) -> CostEstimate:
        """Return steps and FLOPs of a run; sharing is that of its first estimate."""
        problem = self.real_problem(settings)
        if problem.steps > self.alike:
            settings = replace(settings, place=replace(settings.place, seed=min(self._problems)))
        if (key := _run_key_of(settings)) not in self._known:
            costs, held = self._simulate_run(settings, problem)
            self._known[key] = CostEstimate(problem.steps, costs, memory=held)
        return self._known[key]

    def real_problem(self, settings: RunConfig) -> Problem:
        """Return the real problem of a run."""
        where = replace(settings.place, seed=0)
        if where != self._where:
            for table in (self._problems, self._prices, self._probes, self._products):
                table.clear()
            self._where, self._opened = where, open_task(settings.place)
        seed = settings.place.seed
        if not self._problems or (seed not in self._problems and self._is_short(settings)):
            assert self._opened is not None
            built = build_problem(settings.place, self._opened, steps=1)
            first = next(iter(self._problems.values()), built)  # its model is used for other seeds too
            self._problems[seed] = replace(built, pretrained=first.pretrained)
        real = self._problems.get(seed) or next(iter(self._problems.values()))
        return replace(real, training=settings.train, steps=steps_of(settings, real), journal=Checkpointer(real.meter))

    def _is_short(self, settings: RunConfig) -> bool:
        return steps_of(settings, next(iter(self._problems.values()))) <= self.alike

    def _simulate_run(self, settings: RunConfig, problem: Problem) -> tuple[Costs, float]:
        if needs_structure(settings.method):
            dry_run_checks(problem, settings)
        total, prices = problem.steps, self._prices_of(settings, problem)

        def at(steps: int) -> tuple[Costs, float]:
            products = self._products if self.timed else {}
            twin = twin_of(problem, prices, steps, products, steps / total, settings.place.seed)
            cheap_equivalent(settings.method).run(twin, float(settings.amount.sparsity or 0.0))
            return twin.meter.costs, twin.watch.held

        def padding(steps: int) -> float:
            """Return the cost of a step on all rows relative to the simulated share of rows."""
            size, some = settings.train.batch_size, even_subset(empty_rows(problem.train), steps / total)
            return prices.mean_step_flops(problem.train, size) / prices.mean_step_flops(some, size)

        if total <= self.exact:
            costs, held = at(total)
        else:
            half, far = self.exact // 2, (total - self.exact) / (self.exact - self.exact // 2)
            try:
                (short, held), (longer, _) = at(half), at(self.exact)
                costs = _extrapolate_costs(short, longer, far, padding(self.exact))
            except UserError:  # the short T was refused; T itself may not be
                costs, held = at(total)
        return (self._add_teacher_cost(settings, costs) if settings.train.distill.teacher == DENSE else costs), held

    def _add_teacher_cost(self, settings: RunConfig, costs: Costs) -> Costs:
        """Return the costs with the teacher's own run, as `sparsesoup.runs.teacher` charges it."""
        plain = dense_config(settings)
        own = self.estimate_uncached(plain).costs
        cost = sum((c for label, c in own.items() if label != "validation"), Cost())
        if (key := _run_key_of(plain)) in self._drawn:
            cost = replace(cost, shared=cost.steps)
        self._drawn.add(key)
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
        times = {k: c.flops * (rates.forward if k == "validation" else rates.train) for k, c in found.costs.items()}
        saved = sum(times[k] * c.shared / c.steps for k, c in found.costs.items() if c.steps)
        weights = sum(math.prod(target.shape) for target in problem.targets.values())
        memory = rates.memory + 4 * weights * found.memory
        return replace(found, seconds=sum(times.values()), saved=saved, memory=memory)


def probe_speed(problem: Problem, prices: FlopsModel) -> SpeedProbe:
    """Train for a few steps, the first of them on the longest rows, and evaluate a few validation batches."""
    meter, device = SimulatedCostTracker(prices, problem.objective), problem.accelerator.device
    problem = replace(problem, meter=meter, journal=Checkpointer(meter), observer=NullObserver())
    _forget_peak(device)
    state = problem.start_run()
    longest = problem.train.select_rows(problem.train.eval_batches(problem.training.batch_size)[-1])
    train(state, replace(problem, train=longest), 1, label="first")  # warm-up of the libraries
    train(state, problem, TIMED)
    batches = problem.validation.eval_batches(2 * problem.training.batch_size)
    some = [row for batch in batches[:: -(-len(batches) // TIMED)] for row in batch]
    with charge_time(meter, "validation") as cost:
        evaluate_model(problem, state.model, problem.validation.select_rows(some), cost)
    strong, validation = meter.costs["strong"], meter.costs["validation"]
    return SpeedProbe(
        strong.seconds / max(strong.flops, 1), validation.seconds / max(validation.flops, 1), _peak_bytes(device)
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


def steps_of(settings: RunConfig, problem: Problem) -> int:
    """Return T of a run."""
    if settings.amount.steps is not None:
        return settings.amount.steps
    each = replace(problem, training=settings.train).steps_per_epoch
    return max(1, round((settings.amount.epochs or EPOCHS) * each))


def cheap_equivalent(method: Method) -> Method:
    """Return a method for simulation: any mask costs the same, so replace groups by those the simulated model has."""
    if isinstance(method, FromTicket):
        return OneShot()
    parts = {name: getattr(method, name) for name in PARTS if hasattr(method, name)}
    parts = {name: _fitting_tile(part) if isinstance(part, Block) else "weights" for name, part in parts.items()}
    return replace(method, **parts)  # type: ignore[type-var]  # always a dataclass, unlike the protocol


def _fitting_tile(tile: Block) -> Block:
    """Return the largest tile, or the whole side, that divides both the given tile and the simulated matrices."""
    return Block(*(math.gcd(side, WIDTH) if side else 0 for side in (tile.rows, tile.cols)))


def needs_structure(method: Method) -> bool:
    """Return True if a method prunes structures that not every model has."""
    return any(getattr(method, name, plain) != plain for name, plain in PARTS.items())


def _extrapolate_costs(short: Costs, longer: Costs, far: float, padding: float) -> Costs:
    """Extrapolate costs linearly from two lengths, to `far` times their distance beyond the longer one.

    A step costs as much as one of the longer run, times `padding`: short runs have fewer rows and other padding.
    """

    def on_line(label: str) -> Cost:
        before, after = asdict(short.get(label, Cost())), asdict(longer[label])
        values = {name: round(max(0.0, value + far * (value - before[name]))) for name, value in after.items()}
        if after["steps"]:
            values["flops"] = round(values["steps"] * after["flops"] / after["steps"] * padding)
        return Cost(**values)

    return {label: on_line(label) for label in longer}


def _run_key_of(settings: RunConfig) -> str:
    """Return the key of a run's directory."""
    place = settings.place
    return f"{settings.name} {settings.run_key()} {place.dataset} {place.dataset_config} {place.seed}"
