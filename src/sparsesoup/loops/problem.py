"""The problem of a foreign loop: the user's model, optimizer and loss, for the parts of a method that need batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsesoup.core.errors import UserError
from sparsesoup.core.masks import dense_masks
from sparsesoup.core.rng import cpu_generator, fork_rng_of
from sparsesoup.core.targets import Targets, target_parameters
from sparsesoup.loops.losses import CheckedLoss
from sparsesoup.loops.shadow import Shadow
from sparsesoup.training.batching import Batch, RowBatches
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.plan import Phase
from sparsesoup.training.problem import GateParameters, Problem
from sparsesoup.training.state import TrainState

Loss = Callable[[nn.Module, Any], Tensor]
PLAIN = (Tensor, str, int, float, type(None))  # names of columns and the like come with a Trainer's batches


class PlainDevice:
    """Device and clipping, in a process that may have an Accelerator of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def clip_grad_norm_(self, parameters: Iterable[Tensor], most: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, most)


@dataclass(frozen=True, kw_only=True)
class LoopProblem(Problem):
    """A problem whose runs prune the user's own model, in place.

    Args:
        optimizer: the user's innermost optimizer.
        epoch: steps of one pass over the user's batches, of which `train` may have only some.
    """

    optimizer: Optimizer
    epoch: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in an epoch; a plan and its run have the same."""
        return self.epoch

    @property
    def accelerator(self) -> Any:
        """The device of the model."""
        return PlainDevice(next(self.pretrained.parameters()).device)

    def start_run(self, attach: Callable[[nn.Module], GateParameters] | None = None) -> TrainState:
        """Start a run on the model itself; with gates on a shadow of its weights."""
        self.checkpointer.begin_run(self.meter)
        model, optimizer = self.pretrained, self.optimizer
        if attach is not None:
            shadow = self.__dict__["shadow"] = Shadow(model, optimizer, self.targets, attach)
            model, optimizer = shadow.weights, shadow.score_optimizer
        masks = dense_masks(target_parameters(model, self.targets))
        return TrainState(model=model, optimizer=optimizer, targets=self.targets, masks=masks)

    @property
    def gated(self) -> Shadow | None:
        """The shadow of a run with gates."""
        return self.__dict__.get("shadow")


def make_problem(
    model: nn.Module,
    optimizer: Optimizer,
    targets: Targets,
    steps: int,
    loss: Loss | None,
    batches: Iterable[Any] | None,
    seed: int,
    max_grad_norm: float,
    epoch: int = 1,
) -> LoopProblem:
    """Return the problem of a foreign loop. A row of its data is a batch of the user's."""
    rows = list(batches) if isinstance(batches, Sequence) else []
    plain = any(not isinstance(batch, Mapping) for batch in rows[:1])

    checked = None if loss is None else CheckedLoss(loss)

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        assert checked is not None
        return checked(model, tuple(batch.values()) if plain else batch)

    data = RowBatches(rows or [None], lambda rows: as_mapping(rows[0]))
    return LoopProblem(
        pretrained=model, optimizer=optimizer, targets=targets, train=data, validation=data, steps=steps, epoch=epoch,
        predict=lambda model, batch: objective(model, batch)[None], criterion=lambda outputs, batch: outputs.mean(),
        metric=lambda outputs, labels: {}, objective=objective if loss is not None else None, seed=seed,
        training=TrainingConfig(
            learning_rate=peak_rate(optimizer), warmup_ratio=0.0, weight_decay=0.0, batch_size=1,
            max_grad_norm=max_grad_norm,
        ),
    )  # fmt: skip


def peak_rate(optimizer: Optimizer) -> float:
    """Return the learning rate from which the loop's scheduler started; 1 if that is not known yet."""
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    return max(rates, default=0.0) or 1.0


def as_mapping(batch: Any) -> Batch:
    """Return a batch as a mapping of tensors and plain values: a tuple or a list by position.

    Raises: UserError if it is something else.
    """
    if isinstance(batch, Tensor):
        batch = (batch,)
    if isinstance(batch, str) or not isinstance(batch, Iterable):
        raise UserError(f"a batch is {batch!r}; give mappings, tuples or lists of tensors")
    table = dict(batch) if isinstance(batch, Mapping) else {str(i): t for i, t in enumerate(batch)}
    if wrong := [name for name, t in table.items() if not isinstance(t, PLAIN)]:
        raise UserError(
            f"a batch has {type(table[wrong[0]]).__name__} as {wrong[0]!r}; give mappings, tuples or lists of tensors"
        )
    return table


def count_batches(batches: Any) -> int:
    """Return the number of batches in one pass; 1 if that is not known."""
    try:
        return max(1, len(batches))
    except TypeError:  # a stream, or a DataLoader over one
        return 1


def first_batches(batches: Iterable[Any], phases: Sequence[Phase], seed: int) -> list[Any]:
    """Return as many batches as the extra passes of a plan can use; all of a list.

    The rows of a DataLoader over a dataset with a length are sampled again, in a separate order: neither its sampler
    nor a random number of the process is used up, so the loop sees the rows that it would have seen.
    """
    most = sum(phase.steps for phase in phases if phase.kind == "fork")
    most = max(most + sum(count for phase in phases for _, count in phase.scores), 1)
    if isinstance(batches, Mapping):
        raise UserError("is one batch; give a list of batches, [batch], or a DataLoader", "batches")
    with fork_rng_of(()):
        if isinstance(batches, Sequence):
            found = list(batches)
        elif isinstance(getattr(batches, "dataset", None), Sized) and hasattr(batches, "collate_fn"):
            found = list(islice(_own_batches(batches, seed), most))
        else:
            found = list(islice(iter(batches), most))
    if not found:
        raise UserError("batches=... is empty; give the training batches, such as the loop's DataLoader")
    return found


def _own_batches(loader: Any, seed: int) -> Iterator[Any]:
    rows, size = loader.dataset, loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 8
    order = torch.randperm(len(rows), generator=cpu_generator(seed, "batches")).tolist()
    for begin in range(0, len(rows), size):
        yield loader.collate_fn([rows[i] for i in order[begin : begin + size]])
