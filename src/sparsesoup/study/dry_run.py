"""The output of `--dry-run`: what a run does and costs; of a study every trial, totals, and savings from sharing."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from sparsesoup.core.errors import UserError
from sparsesoup.report.format import format_count, format_duration, label_name
from sparsesoup.runs.config import RunConfig
from sparsesoup.study.compare import folder_of
from sparsesoup.study.cost.estimate import CostEstimate, CostEstimator
from sparsesoup.study.execute.jobs import TrialJob
from sparsesoup.study.recipe.plan import StudyPlan
from sparsesoup.study.recipe.trial import Trial
from sparsesoup.training.plan import Phase

HEADS = ("run", "T", "steps", "FLOPs", "time", "memory", "folder")
NOTE = (
    "Steps and FLOPs follow from the plan of each method and the order of the rows; what the data may end early is "
    "taken at its longest. Time and memory are estimates from a few steps of the real model, on this machine as it is "
    "now; selecting masks and scoring the test split come on top."
)


@dataclass(frozen=True)
class TrialForecast:
    """A trial and its estimated cost.

    Args:
        estimate: None if the trial would be refused.
        refusal: the reason.
        done: True if its ticket exists already.
    """

    cell: Trial
    estimate: CostEstimate | None = None
    refusal: str = ""
    done: bool = False


def forecast_trials(plan: StudyPlan, out: Path) -> Iterator[TrialForecast]:
    """Yield the forecast of each trial, in order of execution."""
    estimator, folder = CostEstimator(), folder_of(out, plan.name)
    for cell in plan.trials:
        done = TrialJob("train", cell, out, folder).record_path.exists()
        try:
            yield TrialForecast(cell, estimator.estimate_run(cell.settings), done=done)
        except UserError as error:
            yield TrialForecast(cell, refusal=str(error), done=done)


def format_forecast(found: Iterable[TrialForecast]) -> Iterator[str]:
    """Format the forecast as a table with totals."""
    all_of = list(found)
    yield from _align([HEADS, *(_forecast_row(forecast) for forecast in all_of)])
    yield from _total_lines(all_of)


def describe_plan(settings: RunConfig) -> Iterator[str]:
    """Format what a run would do, phase by phase, with its cost.

    Raises: UserError if the run would be refused.
    """
    estimator = CostEstimator()
    found, problem = estimator.estimate_run(settings), estimator.real_problem(settings)
    phases = settings.method.plan(problem.size, float(settings.amount.sparsity or 0.0))
    rows = list[tuple[str, ...]]()
    for is_fork, group in groupby(phases, lambda phase: phase.kind == "fork"):
        forks = list(group)
        rows += [_phase_row(forks)] if is_fork else [_phase_row([phase]) for phase in forks]
    yield from _align([("phase", "steps", "cost", "also"), *rows])
    total = found.total_cost
    yield ""
    yield (
        f"T = {found.steps}: {total.steps} steps, {format_count(total.flops)}, about {format_duration(found.seconds)} "
        f"and {_format_bytes(found.memory)} here"
    )
    yield NOTE


def _phase_row(group: Sequence[Phase]) -> tuple[str, ...]:
    first, last = group[0], group[-1]
    name = first.name if first is last else f"{first.name} to {last.name.rsplit('-', 1)[1]}"
    steps = f"{len(group)} x {first.steps}" if len(group) > 1 else str(first.steps or "")
    also = [f"{count} batches scored ({what})" for what, count in first.scores]
    also += [f"{first.validations} validations"] if first.validations else []
    also += [f"back to step {first.rewinds_to}"] if first.rewinds_to is not None else []
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
    name, path = forecast.cell.describe_trial + (" (done)" if forecast.done else ""), str(forecast.cell.path)
    if forecast.estimate is None:
        return name, "", "", "", "refused", "", f"{path}: {forecast.refusal}"
    e = forecast.estimate
    return (
        name,
        str(e.steps),
        str(e.total_cost.steps),
        format_count(e.total_cost.flops),
        format_duration(e.seconds),
        _format_bytes(e.memory),
        path,
    )


def _total_lines(all_of: list[TrialForecast]) -> Iterator[str]:
    costed = [(f, f.estimate) for f in all_of if f.estimate is not None]
    whole = [e for _, e in costed]
    left = [e for f, e in costed if not f.done]
    yield ""
    yield f"{len(all_of)} runs: {_sum_line(whole)}, if each were trained alone"
    steps, flops, seconds = _shared_costs(whole)
    yield (
        f"sharing saves {steps} steps, {format_count(flops)}, {format_duration(seconds)} (the dense run, "
        f"teachers, IMP's rounds)"
    )
    if len(left) < len(whole):
        yield f"{len(whole) - len(left)} are done"
    hours, peak = sum(e.seconds - e.saved for e in left), max((e.memory for e in left), default=0.0)
    yield f"left to do: {format_duration(hours)} of one process, {_format_bytes(peak)} at the peak"
    if refused := len(all_of) - len(whole):
        yield f"{refused} would be refused"
    yield NOTE


def _sum_line(found: list[CostEstimate]) -> str:
    totals = [e.total_cost for e in found]
    seconds = sum(e.seconds for e in found)
    return (
        f"{sum(t.steps for t in totals)} steps, {format_count(sum(t.flops for t in totals))}, "
        f"{format_duration(seconds)}"
    )


def _shared_costs(found: list[CostEstimate]) -> tuple[int, float, float]:
    costs = [c for e in found for c in e.costs.values() if c.steps]
    flops = sum(c.flops * c.shared / c.steps for c in costs)
    return sum(c.shared for c in costs), flops, sum(e.saved for e in found)


def _format_bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
