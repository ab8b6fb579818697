"""What scores by data have in common: rows to score by, and a model that is held still while they go through it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from sparsesoup.core.errors import UserError
from sparsesoup.core.rng import derive_seed, seed_everything
from sparsesoup.core.targets import Targets, target_parameters
from sparsesoup.training.batching import Batch
from sparsesoup.training.problem import Problem, add_batch_cost, charge_time, to_device

Rows = list[list[int]]  # the training rows of each batch


def need_batches(method: str, batches: int) -> None:
    """Raise a UserError if there is no batch to score by."""
    if batches < 1:
        raise UserError(f"{method} needs batches >= 1, got {batches}")


def calibration_batches(problem: Problem, batches: int, *path: object) -> Rows:
    """Training rows to score by: that many batches of `train.batch_size` rows.

    The same for the same seed and path. Beyond one epoch rows come again, in another order.
    """
    return list(
        islice(problem.train.train_batches(problem.training.batch_size, 0, problem.seed, "score", *path), batches)
    )


def for_each_batch(
    problem: Problem, model: nn.Module, rows: Rows, what: str, work: Callable[[Batch, float], object]
) -> None:
    """Do `work(batch, share of all rows)` for each batch with the model held still; charged to "score".

    Args:
        what: names the work: the same work on the same shapes costs the same FLOPs.
    """
    total = sum(map(len, rows))
    problem.observer.begin("score", 0, len(rows))
    with frozen_eval(model, problem.targets), torch.random.fork_rng():
        for number, indices in enumerate(rows):
            with charge_time(problem.meter, "score") as cost:
                seed_everything(derive_seed(problem.seed, "score", number))
                batch = to_device(problem.train.batch(indices), problem.accelerator.device)
                shape = ("score", what, *(tuple(t.shape) for t in batch.values()))
                _, flops = problem.meter.run_and_count_flops(
                    shape, functools.partial(work, batch, len(indices) / total)
                )
                add_batch_cost(cost, problem.train, indices, flops)
            problem.observer.step({})
    problem.observer.end()


@contextmanager
def frozen_eval(model: nn.Module, targets: Targets) -> Iterator[None]:
    """In this block the model is in eval mode, computes in its own precision and takes gradients at all targets."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    own = vars(model)
    mixed, plain = own.get("forward"), own.get("_original_forward")  # accelerate's autocast, and what it wraps
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
    """The table itself; UserError that names the first tensor with a NaN or an infinity."""
    for name, values in table.items():
        if not bool(values.isfinite().all()):
            raise UserError(
                f"{what} of {name} has NaN or infinite values, which cannot be ranked; check the checkpoint and the "
                f"data, or lower --train.learning-rate"
            )
    return table
