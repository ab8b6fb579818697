"""The only training loop."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparsesoup.core.errors import UserError
from sparsesoup.core.masks import apply_masks_, sparsity
from sparsesoup.core.rng import cpu_generator, derive_seed, seed_everything
from sparsesoup.training.batching import RowBatches
from sparsesoup.training.cost import Cost
from sparsesoup.training.problem import Problem, add_batch_cost, charge_time, to_device
from sparsesoup.training.state import TrainState

# Without gradient and moments these keep zeros at zero, weight decay included: no pass over the weights is needed.
OPTIMIZERS_THAT_KEEP_ZEROS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop)

Hook = Callable[[TrainState], None]
Rate = Callable[[int], float]


@dataclass(frozen=True, kw_only=True)
class TrainingOverrides:
    """Settings of a short run that differ from the main one; None keeps a setting.

    Args:
        rate: factor on the main run's learning rate at that step; or two, the range from which each run draws its own.
        weight_decay: weight decay of matrices.
        dropout: probability of every dropout in the model.
        share: share of the training rows it sees, drawn anew for each run.
    """

    rate: float | tuple[float, float] = 1.0
    weight_decay: float | None = None
    dropout: float | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        low, high = self._rate_range()
        if not 0 <= low <= high < math.inf or not 0 < self.share <= 1:
            raise UserError(
                f"a protocol has rate >= 0 (or two of them, the lower one first) and share in (0, 1], "
                f"got {self.rate} and {self.share}"
            )
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay of a protocol is a number of at least 0, got {self.weight_decay}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(f"dropout of a protocol lies in [0, 1), got {self.dropout}")

    def rate_factor(self, seed: int, *path: object) -> float:
        """Return the factor on the learning rate of one run, drawn uniformly if given as a range.

        Args:
            seed, path: random stream of the run; the same stream gives the same factor.

        >>> TrainingOverrides(rate=2.0).rate_factor(0, "weak", 1)
        2.0
        """
        low, high = self._rate_range()
        return low + (high - low) * float(
            torch.rand((), dtype=torch.float64, generator=cpu_generator(seed, "rate", *path))
        )

    def _rate_range(self) -> tuple[float, float]:
        return (self.rate, self.rate) if isinstance(self.rate, (int, float)) else self.rate


def train(
    state: TrainState,
    problem: Problem,
    steps: int,
    *,
    stream: tuple[object, ...] = (),
    rate: Rate | None = None,
    hooks: Iterable[Hook] = (),
    observe: Hook | None = None,
    penalty: Callable[[TrainState], Tensor] | None = None,
    label: str = "strong",
    protocol: TrainingOverrides | None = None,
) -> TrainState:
    """Train `state` in place for `steps` steps; the masks hold after every one.

    A step: forward, penalty, backward, zero the gradients of pruned weights, observe, clip, optimizer step, hooks,
    apply the masks.

    Args:
        stream: name of the random stream for row order and noise. It continues at `state.step`, so that a rewound run
            sees the same rows again, and training in two halves equals training at once.
        rate: step -> learning rate; default: the problem's schedule over T.
        hooks: called after each step; may prune, store tensors or halt, but not train.
        observe: called with the gradients of each step, before clipping; may only store tensors.
        penalty: added to the loss.
        label: cost label of the steps.
        protocol: settings that differ from the problem's.
    Raises: UserError at the first step whose loss is not finite, with the state as it was before that step.
    """
    rate = problem.rate_schedule() if rate is None else rate
    hooks = tuple(hooks)
    until = problem.journal.resume_step(state, state.step + steps)
    data = problem.train if protocol is None else problem.train.random_subset(protocol.share, problem.seed, *stream)
    order = data.train_batches(problem.training.rows_per_step, state.step, problem.seed, *stream)
    state.model.train()
    state.enforce_masks_()
    state.halt = False
    params, masks, gone = state.prunable_parameters(), state.masks, sparsity(state.masks)
    kind = "train" if any(p.requires_grad for p in params.values()) else "head"  # FLOPs differ between the two
    problem.observer.begin(label, state.step, until)
    with _apply_overrides(state, protocol), _zero_pruned_gradients(state, params), torch.random.fork_rng():
        for indices in islice(order, max(until - state.step, 0)):
            with charge_time(problem.meter, label) as cost:
                seed_everything(derive_seed(problem.seed, "noise", *stream, state.step))
                now = rate(state.step)
                _set_learning_rate(state, now)
                seen = data.augmented_view(problem.seed, "look", *stream, state.step)
                loss = _accumulate_gradients(state, problem, seen, indices, penalty, cost, kind)
                if not math.isfinite(loss):
                    problem.journal.save_if_due(state, until, ending=True)
                elif observe is not None:
                    observe(state)
                _update_weights(state, problem, loss, label)
                cost.steps += 1
                state.step += 1
                for hook in hooks:
                    hook(state)
                if state.masks is not masks:
                    state.enforce_masks_()
                    masks, gone = state.masks, sparsity(state.masks)
                elif gone and (hooks or not isinstance(state.optimizer, OPTIMIZERS_THAT_KEEP_ZEROS)):
                    apply_masks_(params, masks)
            problem.observer.step(
                {"step": state.step, "label": label, "loss": loss, "rate": now, "sparsity": gone or state.masked}
            )
            if state.halt:
                break
            problem.journal.save_if_due(state, until)
    problem.observer.end()
    return state


def train_head(state: TrainState, problem: Problem, steps: int) -> None:
    """Train only the head and other randomly initialised parameters; the rest is frozen.

    Charged to the label "search", with the FLOPs computed: no gradient is computed for the frozen part.
    """
    wanted = {*problem.head, *problem.fresh}
    others = [p for name, p in state.model.named_parameters() if p.requires_grad and name not in wanted]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        train(state, problem, steps, label="search")
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def train_to(state: TrainState, problem: Problem, step: int, rate: Rate | None = None) -> None:
    """Train up to this step of the run; does nothing if the step is reached."""
    train(state, problem, step - state.step, rate=rate)


def _set_learning_rate(state: TrainState, rate: float) -> None:
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["factor"]


@contextmanager
def _zero_pruned_gradients(state: TrainState, params: Mapping[str, Parameter]) -> Iterator[None]:
    """Zero the gradients of pruned weights before clipping, so they do not count towards the gradient norm.

    Each gradient is zeroed when it is made, while it is in the cache, by a product with bytes: 2 ms for MiniLM on one
    thread, where a pass of masked_fill_ over all gradients takes 16.
    """

    def hook(name: str) -> Callable[[Tensor], None]:
        def zero(parameter: Tensor) -> None:
            if parameter.grad is not None:
                parameter.grad.mul_(state.masks[name].view(torch.int8))

        return zero

    handles = [p.register_post_accumulate_grad_hook(hook(name)) for name, p in params.items() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _update_weights(state: TrainState, problem: Problem, loss: float, label: str) -> None:
    if not math.isfinite(loss):
        state.optimizer.zero_grad(set_to_none=True)
        raise UserError(
            f"the loss is {loss} at step {state.step + 1} ({label}); what was finished is kept. "
            f"Lower --train.learning-rate (now {problem.training.learning_rate:g}) or check the data"
        )
    if problem.training.max_grad_norm:
        problem.accelerator.clip_grad_norm_(state.model.parameters(), problem.training.max_grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)


def _accumulate_gradients(
    state: TrainState,
    problem: Problem,
    data: RowBatches,
    indices: list[int],
    penalty: Callable[[TrainState], Tensor] | None,
    cost: Cost,
    kind: str,
) -> float:
    """Accumulate the gradients of the mean loss over the rows `indices`, in parts; return the loss."""
    parts = list(_micro_batches(indices, problem.training.batch_size))
    return sum(
        _backward_pass(state, problem, data, part, len(part) / len(indices), penalty, cost, kind) for part in parts
    )


def _micro_batches(indices: list[int], size: int) -> Iterator[list[int]]:
    for i in range(0, len(indices), size):
        yield indices[i : i + size]


def _backward_pass(
    state: TrainState,
    problem: Problem,
    data: RowBatches,
    indices: list[int],
    weight: float,
    penalty: Callable[[TrainState], Tensor] | None,
    cost: Cost,
    kind: str,
) -> float:
    batch = to_device(data.batch(indices), problem.accelerator.device)

    def work() -> float:
        loss = problem.training_loss(state.model, batch)
        whole = loss if penalty is None else loss + penalty(state)
        problem.accelerator.backward(whole * weight)
        # The log shows the criterion, comparable between methods; a non-finite loss is reported whatever its source.
        return float(loss.detach()) if math.isfinite(float(whole.detach())) else float(whole.detach())

    loss, flops = problem.meter.run_and_count_flops(
        (kind, problem.objective, penalty, *(tuple(t.shape) for t in batch.values())), work
    )
    add_batch_cost(cost, data, indices, flops)
    return loss * weight


@contextmanager
def _apply_overrides(state: TrainState, protocol: TrainingOverrides | None) -> Iterator[None]:
    """Apply the overrides of weight decay and dropout for the duration of a run."""
    decays = [group["weight_decay"] for group in state.optimizer.param_groups]
    drops = find_dropouts(state.model) if protocol and protocol.dropout is not None else []
    try:
        for group in state.optimizer.param_groups:
            if protocol and protocol.weight_decay is not None and group["decays"]:
                group["weight_decay"] = protocol.weight_decay
        for owner, name, _ in drops:
            setattr(owner, name, protocol.dropout if protocol else None)
        yield
    finally:
        for group, decay in zip(state.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for owner, name, value in drops:
            setattr(owner, name, value)


def find_dropouts(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Return all dropout probabilities of a model: (module, attribute, value); attention has some as plain numbers."""
    found: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout", "dropout_p", "drop_prob"):
            value = getattr(module, name, None)
            if isinstance(value, float) and (name != "p" or isinstance(module, nn.modules.dropout._DropoutNd)):
                found.append((module, name, value))
    return found
