"""FLOPs of any batch on a real model, by rows and width, interpolated from a few counted passes."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch.nn import Parameter

from sparsesoup.core.targets import target_parameters
from sparsesoup.methods.scores.gradient import hessian_product, task_gradient
from sparsesoup.training.batching import RowBatches
from sparsesoup.training.cost import CostTracker, CountFlops
from sparsesoup.training.problem import Problem, to_device

Price = Callable[[int, int], int]  # (rows, width of a batch) -> FLOPs
WIDTHS = 3  # attention is quadratic in the width, everything else linear or constant


class FlopsModel:
    """FLOPs of a problem's passes, each kind counted on first use.

    Exact for models linear in rows and at most quadratic in width, as stock transformers are.

    Args:
        problem: the real problem; its model is run on one and two rows of three widths, and never modified.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._known: dict[str, Price] = {}

    def price_of(self, what: str) -> Price:
        """Return the FLOPs function of a pass: train, forward, gradient or hessian."""
        if what not in self._known:
            self._known[what] = _fit_prices(self.problem, PASSES[what])
        return self._known[what]


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
    total = 0.0
    for x, y in points.items():
        part = float(y)
        for other in points:
            if other != x:
                part *= (at - other) / (x - other)
        total += part
    return total


def _train_flops(problem: Problem, rows: list[int]) -> int:
    return _pass_flops(problem, rows, [p for p in problem.pretrained.parameters() if p.requires_grad])


def _head_flops(problem: Problem, rows: list[int]) -> int:
    wanted = {*problem.head, *problem.fresh}
    return _pass_flops(problem, rows, [p for name, p in problem.pretrained.named_parameters() if name in wanted])


def _pass_flops(problem: Problem, rows: list[int], learnt: list[Parameter]) -> int:
    """Return the FLOPs of a loss and its gradient for some parameters."""
    batch = to_device(problem.train.batch(rows), problem.accelerator.device)
    with torch.random.fork_rng(), CountFlops() as count:
        torch.autograd.grad(problem.training_loss(problem.pretrained, batch), learnt, allow_unused=True)
    return count.flops


def _forward_flops(problem: Problem, rows: list[int]) -> int:
    batch = to_device(problem.train.batch(rows), problem.accelerator.device)
    with torch.random.fork_rng(), torch.no_grad(), CountFlops() as count:
        problem.predict(problem.pretrained, batch)
    return count.flops


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
    "head": _head_flops,
    "forward": _forward_flops,
    "gradient": _gradient_flops,
    "hessian": _hessian_flops,
}
