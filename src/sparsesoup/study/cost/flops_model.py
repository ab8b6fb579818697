"""The cost of a plan: steps, rows and tokens exactly; FLOPs of a batch by rows and width, from a few counted passes."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch
from torch.nn import Parameter

from sparsesoup.core.rng import fork_rng_of
from sparsesoup.core.targets import block_of, names_in_blocks, target_parameters
from sparsesoup.methods.scores.activation import LayerInputs
from sparsesoup.methods.scores.calibration import calibration_batches
from sparsesoup.methods.scores.gradient import hessian_product, task_gradient
from sparsesoup.training.backends import gradients_checkpointed
from sparsesoup.training.batching import RowBatches
from sparsesoup.training.cost import Cost, CostTracker, CountFlops
from sparsesoup.training.evaluation import EVALUATION
from sparsesoup.training.overrides import only_trained
from sparsesoup.training.plan import Phase, count_evaluations, early_stopping_of, first_steps
from sparsesoup.training.problem import Problem, add_batch_cost, to_device

Price = Callable[[int, int], int]  # (rows, width of a batch) -> FLOPs
WIDTHS = 3  # attention is quadratic in the width, everything else linear or constant
Costs = dict[str, Cost]
LONG = 50_000  # steps of a phase that are looked at one by one; more cost as much as these on average
FINAL = Phase(name="final", validations=1)  # what a run ends with


class FlopsModel:
    """FLOPs of a problem's passes, each kind counted on first use on one and two rows of three widths.

    Exact for models linear in rows and at most quadratic in width, as stock transformers are.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._known: dict[object, Price] = {}

    def price_of(self, what: str, own: Callable[[Problem], Problem] | None = None) -> Price:
        """Return the FLOPs function of a pass: train, head, blocks, forward, gradient or hessian.

        Args:
            own: makes the problem of the pass; default: the problem itself.
        """
        if (what, own) not in self._known:
            problem = self.problem if own is None else own(self.problem)
            self._known[what, own] = _fit_prices(problem, PASSES[what])
        return self._known[what, own]


def _fit_prices(problem: Problem, count: Callable[[Problem, list[int]], int]) -> Price:
    samples = {width: (count(problem, [row]), count(problem, [row, row])) for width, row in _sample_rows(problem.train)}
    each = {width: two - one for width, (one, two) in samples.items()}
    fixed = {width: one - each[width] for width, (one, _) in samples.items()}
    known: dict[tuple[int, int], int] = {}

    def price(rows: int, width: int) -> int:
        if (rows, width) not in known:
            known[rows, width] = round(lagrange_interpolate(fixed, width) + rows * lagrange_interpolate(each, width))
        return known[rows, width]

    return price


def _sample_rows(data: RowBatches) -> list[tuple[int, int]]:
    """Return (width, index of a row): the shortest, the longest and one between; one of width 1 if all are alike."""
    if not data.lengths:
        return [(1, 0)]
    widths = sorted(set(data.lengths))
    chosen = {widths[i * (len(widths) - 1) // (WIDTHS - 1)] for i in range(WIDTHS)}
    return [(width, data.lengths.index(width)) for width in sorted(chosen)]


def lagrange_interpolate(points: Mapping[int, float], at: int) -> float:
    """Evaluate at `at` the Lagrange polynomial through some points.

    >>> lagrange_interpolate({1: 1, 2: 4, 3: 9}, 5)
    25.0
    """
    weights = {x: math.prod((at - other) / (x - other) for other in points if other != x) for x in points}
    return float(sum(weights[x] * y for x, y in points.items()))


def _train_flops(problem: Problem, rows: list[int]) -> int:
    return _pass_flops(problem, rows, [p for p in problem.pretrained.parameters() if p.requires_grad])


def _split_flops(problem: Problem, rows: list[int]) -> int:
    """Return the FLOPs of a step that takes the gradients of the two parts of its loss in two passes."""
    learned = [p for p in problem.pretrained.parameters() if p.requires_grad]
    batch = to_device(problem.train.batch(rows), problem.accelerator.device)
    with _as_in_training(problem), CountFlops() as count:
        parts = problem.loss_parts(problem.pretrained, batch)
        torch.autograd.grad(parts.answers, learned, allow_unused=True, retain_graph=bool(parts.states))
        if parts.states:
            torch.autograd.grad(parts.states, learned, allow_unused=True)
    return count.flops


def _head_flops(problem: Problem, rows: list[int]) -> int:
    wanted = {*problem.head, *problem.fresh}
    return _pass_flops(problem, rows, [p for name, p in problem.pretrained.named_parameters() if name in wanted])


def _blocks_flops(problem: Problem, rows: list[int]) -> int:
    params = dict(problem.pretrained.named_parameters())
    with only_trained(problem.pretrained, wanted := names_in_blocks(params, problem.targets)):
        return _pass_flops(problem, rows, [params[name] for name in wanted])


def _pass_flops(problem: Problem, rows: list[int], learned: list[Parameter]) -> int:
    """Return the FLOPs of a loss and its gradient for some parameters."""
    batch = to_device(problem.train.batch(rows), problem.accelerator.device)
    with _as_in_training(problem), CountFlops() as count:
        torch.autograd.grad(problem.training_loss(problem.pretrained, batch), learned, allow_unused=True)
    return count.flops


@contextmanager
def _as_in_training(problem: Problem) -> Iterator[None]:
    """Prepare the pre-trained model to compute as in a training with the problem's settings."""
    model = problem.pretrained
    with fork_rng_of(model.parameters()), gradients_checkpointed(model, problem.training.gradient_checkpointing):
        yield


def _forward_flops(problem: Problem, rows: list[int]) -> int:
    batch = to_device(problem.train.batch(rows), problem.accelerator.device)
    with fork_rng_of(problem.pretrained.parameters()), torch.no_grad(), CountFlops() as count:
        problem.predict(problem.pretrained, batch)
    return count.flops


def _inputs_flops(problem: Problem, rows: list[int]) -> int:
    counting = replace(problem, meter=CostTracker())
    LayerInputs(counting, problem.pretrained, [rows], full=True).inputs_of(problem.targets)
    return counting.meter.costs["score"].flops


def _gradient_flops(problem: Problem, rows: list[int]) -> int:
    counting = replace(problem, meter=CostTracker())
    task_gradient(counting, problem.pretrained, [rows])
    return counting.meter.costs["score"].flops


def _hessian_flops(problem: Problem, rows: list[int]) -> int:
    counting = replace(problem, meter=CostTracker())
    weights = target_parameters(problem.pretrained, problem.targets)
    hessian_product(counting, problem.pretrained, [rows], {name: torch.ones_like(w) for name, w in weights.items()})
    return counting.meter.costs["score"].flops


PASSES: dict[str, Callable[[Problem, list[int]], int]] = {
    "train": _train_flops,
    "split": _split_flops,
    "head": _head_flops,
    "blocks": _blocks_flops,
    "forward": _forward_flops,
    "inputs": _inputs_flops,
    "gradient": _gradient_flops,
    "hessian": _hessian_flops,
}


def plan_costs(
    phases: Sequence[Phase],
    problem: Problem,
    prices: FlopsModel,
    is_known: Callable[[Phase, object], bool] = lambda phase, key: False,
) -> Costs:
    """Return the costs of a run by label; where data decide, the most.

    `is_known` says if the training of a phase and a key has been done by another run, which shares it.
    """
    costs, history, training = Costs(), 0, problem.training
    may_stop = early_stopping_of(phases, training) is not None
    for phase, begin in first_steps([*phases, FINAL]):
        validated = count_evaluations(phase, begin, training, may_stop and phase is phases[-1])
        parts = [*phase_costs(phase, begin, problem, prices)]
        parts += [(EVALUATION, _validation_cost(problem, prices, validated, phase))] if validated else []
        for label, cost in parts:
            costs[label] = costs.get(label, Cost()) + cost
        if phase.shared and not validated and is_known(phase, (history, begin, phase.steps, phase.stream)):
            costs[phase.label].shared += phase.steps
        history = hash((history, begin, _content_of(phase)))
    return costs


def phase_costs(phase: Phase, begin: int, problem: Problem, prices: FlopsModel) -> Iterator[tuple[str, Cost]]:
    """Yield (label, cost) of the training, the scores and the validations of a phase that begins at this step."""
    if phase.steps:
        yield phase.label, _training_cost(phase, begin, problem, prices)
    blocks = len({block_of(name) or name for name in problem.targets}) if phase.per_block else 1
    for what, count in phase.scores:
        rows = calibration_batches(problem, count, *phase.score_path)
        yield "score", _times(_passes_cost(problem.train, rows, [prices.price_of(what)]), blocks)
    if phase.end_flops is not None:
        yield "score", Cost(flops=phase.end_flops(problem.targets))
    if phase.validations:
        yield "validation", _validation_cost(problem, prices, phase.validations)


def _validation_cost(problem: Problem, prices: FlopsModel, times: int, phase: Phase = FINAL) -> Cost:
    rows = problem.validation.eval_batches(2 * problem.training.batch_size)
    return _times(_passes_cost(problem.validation, rows, [prices.price_of("forward", phase.priced_problem)]), times)


def _training_cost(phase: Phase, begin: int, problem: Problem, prices: FlopsModel) -> Cost:
    train, seed, size = problem.training, problem.seed, problem.training.batch_size
    share = 1.0 if phase.overrides is None else phase.overrides.share
    data, steps = problem.train.random_subset(share, seed, *phase.stream), min(phase.steps, LONG)
    order = islice(data.train_batches(train.rows_per_step, begin, seed, *phase.stream), steps)
    parts = [rows[i : i + size] for rows in order for i in range(0, len(rows), size)]
    kind = phase.kind if phase.kind in ("head", "blocks") else "split" if phase.split_loss else "train"
    known = [prices.price_of(kind, phase.priced_problem)]
    known += [prices.price_of("forward")] if phase.own_loss and phase.priced_problem is None else []
    cost = _passes_cost(data, parts, known)
    cost.steps = steps
    return cost if steps == phase.steps else _times(cost, phase.steps / steps)


def _passes_cost(data: RowBatches, batches: Iterable[list[int]], known: Sequence[Price]) -> Cost:
    cost = Cost()
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
