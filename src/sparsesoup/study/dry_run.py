"""The output of `--dry-run`: what a run does and costs; of a study every trial, totals, and savings from sharing."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch

from sparsesoup.core.errors import UserError
from sparsesoup.report.format import format_count, format_duration
from sparsesoup.runs.config import RunConfig
from sparsesoup.runs.memory import free_disk, free_memory, fresh_memory, too_little
from sparsesoup.runs.options import CACHE_SIZE, unused_settings
from sparsesoup.study.compare import folder_of
from sparsesoup.study.cost.estimate import CostEstimate, CostEstimator
from sparsesoup.study.execute.jobs import TrialJob
from sparsesoup.study.recipe.plan import StudyPlan
from sparsesoup.study.recipe.trial import Trial
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.cost import Cost, label_name
from sparsesoup.training.device import current_device
from sparsesoup.training.evaluation import EarlyStopping
from sparsesoup.training.plan import Phase, count_evaluations, early_stopping_of, first_steps

HEADS = ("run", "T", "steps", "FLOPs", "time", "memory", "folder")
NOTE = (
    "Steps and FLOPs follow from the plan of each method and the order of the rows; what the data may end early is "
    "taken at its longest. Time and memory are estimates from a few steps of the real model, on this machine as it is "
    "now; selecting masks and scoring the test split come on top."
)


@dataclass(frozen=True)
class TrialForecast:
    """A trial and its estimated cost."""

    trial: Trial
    estimate: CostEstimate | None = None  # None if the trial would be refused
    refusal: str = ""  # the reason
    done: bool = False  # True if its ticket exists already


def forecast_trials(plan: StudyPlan, out: Path, snapshots: str = "device") -> Iterator[TrialForecast]:
    """Yield the forecast of each trial, in order of execution."""
    estimator, folder = CostEstimator(snapshots=snapshots), folder_of(out, plan.name)
    for trial in plan.trials:
        done = TrialJob(trial, out, folder).record_path.exists()
        try:
            yield TrialForecast(trial, estimator.estimate_run(trial.settings), done=done)
        except UserError as error:
            yield TrialForecast(trial, refusal=str(error), done=done)


def format_forecast(
    found: Iterable[TrialForecast], out: Path = Path("runs"), workers: int = 1, cache_size: float = CACHE_SIZE
) -> Iterator[str]:
    """Format the forecast as a table with totals.

    Args:
        out: folder of all runs.
        workers: parallel runs.
        cache_size: maximum GiB of trainings that runs share.
    """
    free, all_of = fresh_memory(torch.device("cpu")), list(found)
    yield from _align([HEADS, *(_forecast_row(forecast) for forecast in all_of)])
    yield from _total_lines(all_of)
    if left := {f.trial.path: f.estimate for f in all_of if f.estimate is not None and not f.done}:
        yield from _study_room_lines(list(left.values()), out, free, workers, round(cache_size * 2**30))
    yield NOTE


def describe_plan(settings: RunConfig, out: Path = Path("runs"), snapshots: str = "device") -> Iterator[str]:
    """Format what a run would do, phase by phase, with its cost, memory and disk.

    Args:
        out: folder of all runs.
        snapshots: where forks and rewinding points are kept.
    """
    free = fresh_memory(torch.device("cpu"))
    estimator = CostEstimator(snapshots=snapshots)
    found, problem = estimator.estimate_run(settings), estimator.real_problem(settings)
    phases = settings.method.plan(problem.size, float(settings.budget.sparsity or 0.0))
    rows, stopping = list[tuple[str, ...]](), early_stopping_of(phases, settings.train)
    for is_fork, group in groupby(first_steps(phases), lambda pair: pair[0].kind == "fork"):
        pairs = list(group)
        if is_fork:
            rows.append(_phase_row([phase for phase, _ in pairs]))
            continue
        for phase, begin in pairs:
            own = stopping if phase is phases[-1] else None
            rows.append(_phase_row([phase], *_evaluation_words(phase, begin, settings.train, own)))
    yield from _align([("phase", "steps", "cost", "also"), *rows])
    total = found.total_cost
    yield ""
    yield (
        f"T = {found.steps}: {total.steps} steps, {format_count(total.flops)}, about {format_duration(found.seconds)} "
        f"and {format_count(found.memory, 'B')} here"
    )
    device = problem.accelerator.device
    free = free if device.type == "cpu" else free_memory(device)
    yield from _room_lines(found, *found.disk, out, free)
    yield from (f"note: {note}" for note in unused_settings(settings, problem.size, snapshots))
    yield NOTE


def _room_lines(
    found: CostEstimate, most: int, stays: int, out: Path, free: int, what: str = "run", shared: str = ""
) -> Iterator[str]:
    """Yield the peaks of memory and disk, what is free, and a warning if that is less."""
    disk = free_disk(out)
    yield (
        f"memory: {format_count(found.memory, 'B')} at the peak, {format_count(free, 'B')} are free; disk: "
        f"{format_count(most, 'B')} at the peak{shared}, {format_count(stays, 'B')} stay, {format_count(disk, 'B')} "
        f"are free"
    )
    if warning := too_little(found.memory, free, found.remedies, what=what):
        yield f"note: {warning}"
    if most > disk:
        yield (
            f"note: this {what} needs {format_count(most, 'B')} of disk, and {format_count(disk, 'B')} are free in "
            f"{out}"
        )


def _study_room_lines(left: Sequence[CostEstimate], out: Path, free: int, workers: int, cache: int) -> Iterator[str]:
    """Yield the peaks of a study's remaining runs: files kept of all, temporary ones of those that run at once.

    Args:
        cache: most bytes of trainings that runs share.
    """
    device = current_device()
    free = free if device.type == "cpu" else free_memory(device)
    largest = max(left, key=lambda e: e.memory)
    together = replace(largest, memory=sum(sorted((e.memory for e in left), reverse=True)[:workers]))
    temporary = sorted((most - stays for most, stays in (e.disk for e in left)), reverse=True)[:workers]
    stays, shared = sum(e.disk[1] for e in left), min(cache, sum(e.cached for e in left))
    note = f" (at most {format_count(shared, 'B')} of them trainings that runs share)" if shared else ""
    yield from _room_lines(together, stays + sum(temporary) + shared, stays, out, free, "study", note)


def _evaluation_words(
    phase: Phase, begin: int, training: TrainingConfig, stopping: EarlyStopping | None
) -> Iterator[str]:
    """Yield what a phase is validated for while it trains."""
    if count := count_evaluations(phase, begin, training, stopping is not None):
        yield f"validated {count} times"
    if stopping is not None:
        yield f"may stop early from step {max(begin, stopping.start)} on"


def _phase_row(group: Sequence[Phase], *more: str) -> tuple[str, ...]:
    first, last = group[0], group[-1]
    name = first.name if first is last else f"{first.name} to {last.name.rsplit('-', 1)[1]}"
    steps = f"{len(group)} x {first.steps}" if len(group) > 1 else str(first.steps or "")
    each = " a block" if first.per_block else ""
    also = [f"{count} batches{each} scored ({what})" for what, count in first.scores]
    also += [f"{first.validations} validations"] if first.validations else []
    also += [f"back to step {first.rewinds_to}"] if first.rewinds_to is not None else []
    also += more
    also += sorted(first.needs - {"extra batches", "rewinding"})
    label = label_name(first.label) if first.steps else ""
    return name, ("at most " if first.at_most else "") + steps, label, ", ".join(also)


def _align(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a line per row: the first column to the left, numbers to the right, the last as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for name, *numbers, last in rows:
        aligned = [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=False)]
        yield "  ".join([name.ljust(widths[0]), *aligned, last]).rstrip()


def _forecast_row(forecast: TrialForecast) -> tuple[str, ...]:
    name, path = forecast.trial.describe_trial + (" (done)" if forecast.done else ""), str(forecast.trial.path)
    if forecast.estimate is None:
        return name, "", "", "", "refused", "", f"{path}: {forecast.refusal}"
    e, total = forecast.estimate, forecast.estimate.total_cost
    numbers = str(e.steps), str(total.steps), format_count(total.flops)
    return (name, *numbers, format_duration(e.seconds), format_count(e.memory, "B"), path)


def _total_lines(all_of: list[TrialForecast]) -> Iterator[str]:
    whole = [f.estimate for f in all_of if f.estimate is not None]
    left = [f.estimate for f in all_of if f.estimate is not None and not f.done]
    total = sum((e.total_cost for e in whole), Cost())
    costs = [cost for e in whole for cost in e.costs.values() if cost.steps]
    shared = sum(cost.flops * cost.shared / cost.steps for cost in costs)
    yield ""
    yield (
        f"{len(all_of)} runs: {total.steps} steps, {format_count(total.flops)}, "
        f"{format_duration(sum(e.seconds for e in whole))}, if each were trained alone"
    )
    yield (
        f"sharing saves {sum(cost.shared for cost in costs)} steps, {format_count(shared)}, "
        f"{format_duration(sum(e.saved for e in whole))} (the dense run, teachers, IMP's rounds)"
    )
    if len(left) < len(whole):
        yield f"{len(whole) - len(left)} are done"
    peak = format_count(max((e.memory for e in left), default=0.0), "B")
    yield f"left to do: {format_duration(sum(e.seconds - e.saved for e in left))} of one process, {peak} at the peak"
    if refused := len(all_of) - len(whole):
        yield f"{refused} would be refused"
