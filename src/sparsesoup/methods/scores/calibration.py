"""Calibration: batches for data-dependent scores, and a frozen model to run them through."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

from torch import Tensor, nn

from sparsesoup.core.errors import UserError
from sparsesoup.core.rng import derive_seed, devices_of, fork_rng_of, seed_everything
from sparsesoup.core.targets import Targets, target_parameters
from sparsesoup.training.batching import Batch, shapes_of
from sparsesoup.training.problem import Problem, add_batch_cost, record_time, to_device

Rows = list[list[int]]  # the training rows of each batch


def calibration_batches(problem: Problem, batches: int, *path: object) -> Rows:
    """Return training rows to score with: `batches` batches of `train.batch_size` rows.

    The same for the same seed and path. After an epoch rows repeat in another order.
    """
    return list(
        islice(problem.train.train_batches(problem.training.batch_size, 0, problem.seed, "score", *path), batches)
    )


def for_each_batch(
    problem: Problem, model: nn.Module, rows: Rows, what: str, work: Callable[[Batch, float], object]
) -> None:
    """Call `work(batch, share of all rows)` for each batch with the model frozen; counted as "score".

    Args:
        what: name of the work for FLOP counts: the same work on the same shapes costs the same FLOPs.
    """
    total = sum(map(len, rows))
    problem.observer.begin("score", 0, len(rows))
    with frozen_eval(model, problem.targets), fork_rng_of(model.parameters()):
        for number, indices in enumerate(rows):
            with record_time(problem.meter, "score") as cost:
                seed_everything(derive_seed(problem.seed, "score", number), devices_of(model.parameters()))
                batch = to_device(problem.train.batch(indices), problem.accelerator.device)
                shape = ("score", what, *shapes_of(batch))
                _, flops = problem.meter.run_and_count_flops(
                    shape, functools.partial(work, batch, len(indices) / total)
                )
                add_batch_cost(cost, problem.train, indices, flops)
            problem.observer.step({})
    problem.observer.end()


@contextmanager
def frozen_eval(model: nn.Module, targets: Targets) -> Iterator[None]:
    """Put the model in eval mode, in its own precision, with gradients for all targets, within this block."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    own = vars(model)
    mixed, plain = own.get("forward"), own.get("_original_forward")  # accelerate's autocast, and the function it wraps
    try:
        model.eval()
        for parameter in target_parameters(model, targets).values():
            parameter.requires_grad_(True)
        if plain is not None:
            own["forward"] = plain
        yield
    finally:
        if plain is not None:
            own["forward"] = mixed
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        for module, flag in modes:
            module.training = flag


def require_finite(table: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return the table; raise a UserError that names the first tensor with a NaN or an infinity."""
    for name, values in table.items():
        if not bool(values.isfinite().all()):
            raise UserError(
                f"{what} of {name} has NaN or infinite values, which cannot be ranked; check the checkpoint and the "
                f"data, or lower --train.learning-rate"
            )
    return table
