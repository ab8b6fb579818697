"""The cost of a plan: steps, rows and tokens exactly, FLOPs from the price of a batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from sparsesoup.methods.scores.calibration import calibration_batches
from sparsesoup.study.cost.flops_model import FlopsModel
from sparsesoup.training.batching import RowBatches
from sparsesoup.training.cost import Cost
from sparsesoup.training.plan import Phase, first_steps
from sparsesoup.training.problem import Problem, add_batch_cost

Costs = dict[str, Cost]
LONG = 50_000  # steps of a phase that are looked at one by one; more cost as much as these on average
FINAL = Phase(name="final", validations=1)  # what a run ends with


def plan_costs(
    phases: Sequence[Phase],
    problem: Problem,
    prices: FlopsModel,
    is_known: Callable[[object], bool] = lambda key: False,
) -> Costs:
    """Return the costs of a run by label; where data decide, the most.

    Args:
        is_known: whether the training of this key has been done by another run, which shares it.
    """
    costs, history = Costs(), 0
    for phase, begin in first_steps([*phases, FINAL]):
        for label, cost in phase_costs(phase, begin, problem, prices):
            costs[label] = costs.get(label, Cost()) + cost
        if phase.shared and is_known((history, begin, phase.steps, phase.stream)):
            costs[phase.label].shared += phase.steps
        history = hash((history, begin, _content_of(phase)))
    return costs


def phase_costs(phase: Phase, begin: int, problem: Problem, prices: FlopsModel) -> Iterator[tuple[str, Cost]]:
    """Yield (label, cost) of the training, the scores and the validations of a phase that begins at this step."""
    if phase.steps:
        yield phase.label, _training_cost(phase, begin, problem, prices)
    for what, count in phase.scores:
        rows = calibration_batches(problem, count, *phase.score_path)
        yield "score", _passes_cost(problem.train, rows, prices, what)
    if phase.validations:
        rows = problem.validation.eval_batches(2 * problem.training.batch_size)
        yield "validation", _times(_passes_cost(problem.validation, rows, prices, "forward"), phase.validations)


def _training_cost(phase: Phase, begin: int, problem: Problem, prices: FlopsModel) -> Cost:
    train, seed, size = problem.training, problem.seed, problem.training.batch_size
    share = 1.0 if phase.overrides is None else phase.overrides.share
    data, steps = problem.train.random_subset(share, seed, *phase.stream), min(phase.steps, LONG)
    order = islice(data.train_batches(train.rows_per_step, begin, seed, *phase.stream), steps)
    parts = [rows[i : i + size] for rows in order for i in range(0, len(rows), size)]
    kinds = ["head" if phase.kind == "head" else "train", *(["forward"] if phase.own_loss else [])]
    cost = _passes_cost(data, parts, prices, *kinds)
    cost.steps = steps
    return cost if steps == phase.steps else _times(cost, phase.steps / steps)


def _passes_cost(data: RowBatches, batches: Iterable[list[int]], prices: FlopsModel, *kinds: str) -> Cost:
    cost, known = Cost(), [prices.price_of(kind) for kind in kinds]
    for rows in batches:
        width = max(data.lengths[i] for i in rows) if data.lengths else 1  # all images have the same size
        add_batch_cost(cost, data, rows, sum(price(len(rows), width) for price in known))
    return cost


def _times(cost: Cost, factor: float) -> Cost:
    return Cost(**{name: round(factor * value) for name, value in asdict(cost).items()})


def _content_of(phase: Phase) -> Any:
    """Return what a phase does to the state, in a form that is equal for equal phases of this process."""
    loop = (phase.rate, phase.overrides, phase.loop, phase.own_loss, phase.kind)
    return repr((phase.steps, phase.stream, *loop, phase.end))
