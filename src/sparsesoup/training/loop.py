"""The only training loop."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sparsesoup.core.errors import UserError
from sparsesoup.core.masks import Masks, apply_masks_, sparsity
from sparsesoup.core.rng import derive_seed, fork_rng_of, seed_everything
from sparsesoup.training.batching import RowBatches, shapes_of
from sparsesoup.training.config import TrainingConfig, TrainingOverrides
from sparsesoup.training.cost import Cost
from sparsesoup.training.evaluation import EarlyStopping, Evaluator
from sparsesoup.training.extrapolation import extrapolated_weights, keep_gradients_
from sparsesoup.training.problem import Problem, add_batch_cost, charge_time, to_device
from sparsesoup.training.state import TrainState
from sparsesoup.training.zero_hooks import zero_gradients

# Without gradient and moments these keep zeros at zero, weight decay included: no pass over the weights is needed.
OPTIMIZERS_THAT_KEEP_ZEROS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop)

Hook = Callable[[TrainState], None]
Rate = Callable[[int], float]


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
    stopping: EarlyStopping | None = None,
) -> TrainState:
    """Train `state` in place for `steps` steps; the masks hold after every one.

    A step: forward, penalty, backward (all at extrapolated weights, if so set), zero the gradients of pruned weights,
    observe, clip, optimizer step, hooks, apply the masks.

    Args:
        stream: name of the random stream for row order and noise. It continues at `state.step`, so that a rewound run
            sees the same rows again, and training in two halves equals training at once.
        rate: step -> learning rate; default: the problem's schedule over T.
        hooks: called after each step; may prune, store tensors or halt, but not train. One that writes weights does
            so under `torch.no_grad()`, not through `.data`, which hides it from the masks until the end.
        observe: called with the gradients of each step, before clipping; may only store tensors.
        penalty: added to the loss.
        label: cost label of the steps.
        protocol: settings that differ from the problem's.
        stopping: stop early, by the validations every `eval_steps` steps.
    Raises: UserError at the first step whose loss is not finite, with the state as it was before that step.
    """
    until = problem.journal.resume_step(state, state.step + steps)
    data = problem.train if protocol is None else problem.train.random_subset(protocol.share, problem.seed, *stream)
    order = data.train_batches(problem.training.rows_per_step, state.step, problem.seed, *stream)
    state.model.train()
    state.enforce_masks_()
    state.halt = False
    rate = problem.rate_schedule() if rate is None else rate
    loop = _Loop(state, problem, data, stream, rate, tuple(hooks), observe, penalty, label, until)
    evaluator = Evaluator(problem, label, until, stopping)
    problem.observer.begin(label, state.step, until)
    with (
        _apply_overrides(state, problem.training, protocol),
        fork_rng_of(state.model.parameters()),
        ExitStack() as after,
    ):
        after.callback(zero_gradients(loop.params, loop.masks_of_gradients))
        for indices in islice(order, max(until - state.step, 0)):
            problem.observer.step(loop.step(indices))
            evaluator.evaluate_if_due(state)
            if state.halt:
                break
            problem.journal.save_if_due(state, until)
    evaluator.finish_training(state)
    apply_masks_(loop.params, state.masks if loop.gone else {})
    problem.observer.end()
    return state


class _Loop:
    """The steps of a training."""

    def __init__(
        self,
        state: TrainState,
        problem: Problem,
        data: RowBatches,
        stream: tuple[object, ...],
        rate: Rate,
        hooks: tuple[Hook, ...],
        observe: Hook | None,
        penalty: Callable[[TrainState], Tensor] | None,
        label: str,
        until: int,
    ) -> None:
        self.state, self.problem, self.data, self.stream, self.rate = state, problem, data, stream, rate
        self.hooks, self.observe, self.penalty, self.label, self.until = hooks, observe, penalty, label, until
        self.params, self.masks, self.gone = state.prunable_parameters(), state.masks, sparsity(state.masks)
        trained = any(p.requires_grad for p in self.params.values())
        self.kind = "train" if trained else "head"  # FLOPs differ between the two

    def step(self, indices: list[int]) -> dict[str, Any]:
        """Train on these rows; return the record of the step."""
        state, problem, rate = self.state, self.problem, self.rate(self.state.step)
        with charge_time(problem.meter, self.label) as cost:
            seed_everything(derive_seed(problem.seed, "noise", *self.stream, state.step))
            _set_learning_rate(state, rate)
            rows = self.data.augmented_view(problem.seed, "look", *self.stream, state.step)
            with extrapolated_weights(state, problem.training.extrapolate):
                loss = _accumulate_gradients(state, problem, rows, indices, self.penalty, cost, self.kind)
            if not math.isfinite(loss):
                problem.journal.save_if_due(state, self.until, ending=True)
            elif self.observe is not None:
                self.observe(state)
            _update_weights(state, problem, loss, self.label)
            cost.steps += 1
            state.step += 1
            before = self._writes() if self.hooks else []
            for hook in self.hooks:
                hook(state)
            self._hold_masks(written=bool(self.hooks) and before != self._writes())
        share = self.gone or state.masked
        return {"step": state.step, "label": self.label, "loss": loss, "rate": rate, "sparsity": share}

    def masks_of_gradients(self) -> Masks | None:
        """Return the masks of the state; None if nothing is pruned."""
        return None if self.state.masks is self.masks and not self.gone else self.state.masks

    def _writes(self) -> list[tuple[int, int]]:
        """Return what changes when a weight is written in place or moved."""
        return [(p._version, p.data_ptr()) for p in self.params.values()]

    def _hold_masks(self, written: bool) -> None:
        if self.state.masks is not self.masks:
            self.state.enforce_masks_()
            self.masks, self.gone = self.state.masks, sparsity(self.state.masks)
        elif self.gone and (written or not isinstance(self.state.optimizer, OPTIMIZERS_THAT_KEEP_ZEROS)):
            apply_masks_(self.params, self.masks)


def train_head(state: TrainState, problem: Problem, steps: int) -> None:
    """Train only the head and other randomly initialised parameters; the rest is frozen.

    Charged to the label "search", with the FLOPs computed: no gradient is computed for the frozen part.
    """
    with only_trained(state.model, {*problem.head, *problem.fresh}):
        train(state, problem, steps, label="search")


@contextmanager
def only_trained(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Freeze all but the named parameters of a model within the block."""
    others = [p for name, p in model.named_parameters() if p.requires_grad and name not in names]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _set_learning_rate(state: TrainState, rate: float) -> None:
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["factor"]


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
    if problem.training.extrapolate:
        keep_gradients_(state)
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

    loss, flops = problem.meter.run_and_count_flops((kind, problem.objective, penalty, *shapes_of(batch)), work)
    add_batch_cost(cost, data, indices, flops)
    return loss * weight


@contextmanager
def _apply_overrides(state: TrainState, training: TrainingConfig, protocol: TrainingOverrides | None) -> Iterator[None]:
    """Apply the dropout of a training, and a run's overrides of weight decay and dropout, for its duration."""
    protocol = TrainingOverrides() if protocol is None else protocol
    decays = [group["weight_decay"] for group in state.optimizer.param_groups]
    try:
        for group in state.optimizer.param_groups:
            if protocol.weight_decay is not None and group["decays"]:
                group["weight_decay"] = protocol.weight_decay
        with dropout_set_to(state.model, training.dropout if protocol.dropout is None else protocol.dropout):
            yield
    finally:
        for group, decay in zip(state.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay


@contextmanager
def dropout_set_to(model: nn.Module, probability: float | None) -> Iterator[None]:
    """Set all dropout probabilities of a model within the block; None leaves them."""
    drops = [] if probability is None else find_dropouts(model)
    try:
        for owner, name, _ in drops:
            setattr(owner, name, probability)
        yield
    finally:
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
