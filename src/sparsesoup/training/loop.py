"""The only training loop."""

import contextlib
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.core.masks import Masks, apply_masks_, sparsity
from sparsesoup.core.rng import derive_seed, devices_of, fork_rng_of, seed_everything
from sparsesoup.training.batching import RowBatches, shapes_of
from sparsesoup.training.config import TrainingOverrides
from sparsesoup.training.cost import Cost, label_name
from sparsesoup.training.evaluation import EarlyStopping, Evaluator
from sparsesoup.training.extrapolation import extrapolated_weights, keep_gradients_
from sparsesoup.training.hooks import Hook, is_due
from sparsesoup.training.loss_parts import SeparateGradients, backward_parts
from sparsesoup.training.overrides import apply_overrides, only_trained
from sparsesoup.training.prefetch import StepBatches, micro_batches
from sparsesoup.training.problem import Problem, add_batch_cost, record_time, to_device
from sparsesoup.training.state import TrainState, parameter_versions
from sparsesoup.training.step_loss import LATE_DEVICES, StepLoss, can_skip_update, step_optimizer
from sparsesoup.training.zero_hooks import zero_gradients

# Without gradient and moments these keep zeros at zero, weight decay included: no pass over the weights is needed.
OPTIMIZERS_THAT_KEEP_ZEROS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop)

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
    split: bool = False,
    label: str = "main",
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
        split: `observe` gets the gradients of the answers' loss alone; others take a second backward pass, after it.
        label: cost label of the steps.
        protocol: settings that differ from the problem's.
        stopping: stop early, by the validations every `eval_steps` steps.
    Raises: UserError for the first step whose loss or gradient norm is not finite, with the state as before that step.
        On a GPU it comes while the next step is computed, as do the records for the observer.
    """
    until = problem.checkpointer.resume_step(state, state.step + steps)
    data = problem.train if protocol is None else problem.train.random_subset(protocol.share, problem.seed, *stream)
    order = data.train_batches(problem.training.rows_per_step, state.step, problem.seed, *stream)
    order, look = islice(order, max(until - state.step, 0)), (problem.seed, "look", *stream)
    batches = StepBatches(data, order, state.step, look, problem.training, problem.accelerator.device)
    state.model.train()
    state.enforce_masks_()
    state.halt = False
    rate = rate or problem.rate_schedule()
    loop = _Loop(state, problem, batches, stream, rate, tuple(hooks), observe, penalty, split, label, until)
    evaluator = Evaluator(problem, label, until, stopping)
    problem.observer.begin(label, state.step, until)
    with (
        apply_overrides(state, problem.training, protocol),
        fork_rng_of(state.model.parameters()),
        contextlib.closing(batches),
        ExitStack() as after,
    ):
        after.callback(zero_gradients(loop.params, loop.masks_of_gradients))
        loop.run(evaluator)
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
        batches: StepBatches,
        stream: tuple[object, ...],
        rate: Rate,
        hooks: tuple[Hook, ...],
        observe: Hook | None,
        penalty: Callable[[TrainState], Tensor] | None,
        split: bool,
        label: str,
        until: int,
    ) -> None:
        self.state, self.problem, self.batches, self.stream, self.rate = state, problem, batches, stream, rate
        self.hooks, self.observe, self.penalty, self.label, self.until = hooks, observe, penalty, label, until
        self.params, self.masks, self.gone = state.prunable_parameters(), state.masks, sparsity(state.masks)
        self.every_parameter = list(state.model.parameters())  # a walk over all modules takes a millisecond
        trained = any(p.requires_grad for p in self.params.values())
        self.kind = "train" if trained else "head"  # FLOPs differ between the two
        self.separate = SeparateGradients([p for p in self.every_parameter if p.requires_grad]) if split else None
        # What is observed or kept must be finite, so then the loss is read before.
        self.keeps = observe is not None or problem.training.extrapolate > 0
        self.late = problem.accelerator.device.type in LATE_DEVICES and can_skip_update(state) and not self.keeps
        self.devices = devices_of(state.model.parameters())
        self._unread: tuple[dict[str, Any], Callable[[], tuple[float, float]]] | None = None
        self._records: list[dict[str, Any]] = []

    def run(self, evaluator: Evaluator) -> None:
        """Train to the last step, or until a hook or a validation halts the training."""
        state, checkpointer = self.state, self.problem.checkpointer
        for indices in self.batches.steps:
            self.step(indices)
            if evaluator.is_due(state) or state.halt or checkpointer.will_save(state):
                self.settle()
            self.report()
            evaluator.evaluate_if_due(state)
            if state.halt:
                break
            if self._unread is None:
                checkpointer.save_if_due(state, self.until)
        self.settle()
        self.report()

    def step(self, indices: list[int]) -> None:
        """Train on these rows; the record of the step is kept for `report`."""
        state, problem, rate = self.state, self.problem, self.rate(self.state.step)
        with record_time(problem.meter, self.label) as cost:
            seed_everything(derive_seed(problem.seed, "noise", *self.stream, state.step), self.devices)
            _set_learning_rate(state, rate)
            rows = self.batches.view_of(state.step, indices)
            with extrapolated_weights(state, problem.training.extrapolate):
                loss = _accumulate_gradients(
                    state, problem, rows, indices, self.penalty, self.separate, cost, self.kind
                )
            self.settle()
            late = self.late and not any(is_due(hook, state.step + 1) for hook in self.hooks)
            read = self._update_weights(loss, late)
            cost.steps += 1
            state.step += 1
            before = parameter_versions(self.params) if self.hooks else []
            for hook in self.hooks:
                hook(state)
            self._hold_masks(written=bool(self.hooks) and before != parameter_versions(self.params))
        share = self.gone or state.masked
        record = {"step": state.step, "label": self.label, "loss": math.nan, "rate": rate, "sparsity": share}
        self._unread = (record, read)
        if not late:
            self.settle()

    def settle(self) -> None:
        """Read the numbers of the last step, if that was not done yet.

        Raises: UserError if they are not finite; the state is then as it was before that step.
        """
        if self._unread is None:
            return
        (record, read), self._unread = self._unread, None
        loss, norm = read()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.state.step = record["step"] - 1
            self.problem.meter.add_cost(self.label, Cost(steps=-1))
            self._refuse(loss, norm)
        self._records.append(record | {"loss": loss})

    def report(self) -> None:
        """Give the observer the records of the steps whose numbers were read."""
        for record in self._records:
            self.problem.observer.step(record)
        self._records.clear()

    def _update_weights(self, loss: StepLoss, late: bool) -> Callable[[], tuple[float, float]]:
        """Update the weights if loss and norm are finite; return a function that returns both."""
        state, problem = self.state, self.problem
        if self.separate is not None:
            finite = math.isfinite(loss.read()) and (state.scaler is None or _gradients_are_finite(state))
            self.separate.observe_and_add_(state, self.observe if finite else None)
        if state.scaler is not None:
            state.scaler.unscale_(state.optimizer)
        value = math.nan if late else loss.read()
        if not late and not math.isfinite(value):
            self._refuse(value)
        overflow = self.keeps and state.scaler is not None and not _gradients_are_finite(state)
        if self.observe is not None and self.separate is None and not overflow:
            self.observe(state)
        if problem.training.max_grad_norm:
            norm = problem.accelerator.clip_grad_norm_(self.every_parameter, problem.training.max_grad_norm)
            loss.norm = norm if state.scaler is None else None  # gradients may overflow in fp16
        if late:
            step_optimizer(state, loss.not_finite())
            state.optimizer.zero_grad(set_to_none=True)
            return loss.read_later()
        if not math.isfinite(norm := loss.read_norm()):
            self._refuse(value, norm)
        step_optimizer(state, None)
        if problem.training.extrapolate and not overflow:
            keep_gradients_(state)
        state.optimizer.zero_grad(set_to_none=True)
        return lambda: (value, norm)

    def _refuse(self, loss: float, norm: float = 0.0) -> NoReturn:
        """Raise the error of a step that is not finite, which has changed nothing."""
        state, problem = self.state, self.problem
        state.optimizer.zero_grad(set_to_none=True)
        problem.checkpointer.save_if_due(state, self.until, ending=True)
        what = f"gradient norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
        raise UserError(
            f"the {what} at step {state.step + 1} of the {label_name(self.label)}; what was finished is kept; lower "
            f"--train.learning-rate (now {problem.training.learning_rate:g}) or check the data"
        )

    def masks_of_gradients(self) -> Masks | None:
        """Return the masks of the state; None if nothing is pruned."""
        return None if self.state.masks is self.masks and not self.gone else self.state.masks

    def _hold_masks(self, written: bool) -> None:
        if self.state.masks is not self.masks:
            self.state.enforce_masks_()
            self.masks, self.gone = self.state.masks, sparsity(self.state.masks)
        elif self.gone and (written or not isinstance(self.state.optimizer, OPTIMIZERS_THAT_KEEP_ZEROS)):
            apply_masks_(self.params, self.masks)


def train_head(state: TrainState, problem: Problem, steps: int) -> None:
    """Train only the head and other randomly initialised parameters; the rest is frozen.

    Counted under the label "search", with the FLOPs computed: no gradient is computed for the frozen part.
    """
    with only_trained(state.model, {*problem.head, *problem.fresh}):
        train(state, problem, steps, label="search")


def _set_learning_rate(state: TrainState, rate: float) -> None:
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def _gradients_are_finite(state: TrainState) -> bool:
    found = [p.grad for p in state.model.parameters() if p.grad is not None]
    return bool(torch.nn.utils.get_total_norm(found).isfinite())


def _accumulate_gradients(
    state: TrainState,
    problem: Problem,
    data: RowBatches,
    indices: list[int],
    penalty: Callable[[TrainState], Tensor] | None,
    separate: SeparateGradients | None,
    cost: Cost,
    kind: str,
) -> StepLoss:
    """Accumulate the gradients of the mean loss over the rows `indices`, in parts; return the losses."""
    parts = list(micro_batches(indices, problem.training.batch_size))
    every = (len(indices), penalty, separate, cost, kind)
    return StepLoss([_backward_pass(state, problem, data, part, *every) for part in parts])


def _backward_pass(
    state: TrainState,
    problem: Problem,
    data: RowBatches,
    indices: list[int],
    rows: int,
    penalty: Callable[[TrainState], Tensor] | None,
    separate: SeparateGradients | None,
    cost: Cost,
    kind: str,
) -> tuple[Tensor, Tensor, float]:
    batch, weight = to_device(data.batch(indices), problem.accelerator.device), len(indices) / rows

    def work() -> tuple[Tensor, Tensor]:
        parts = problem.loss_parts(state.model, batch)
        whole = backward_parts(state, parts, None if penalty is None else penalty(state), weight, separate)
        return parts.total.detach(), whole.detach()

    key = (kind, problem.objective, penalty, separate is None, *shapes_of(batch))
    losses, flops = problem.meter.run_and_count_flops(key, work)
    add_batch_cost(cost, data, indices, flops)
    return *losses, weight
