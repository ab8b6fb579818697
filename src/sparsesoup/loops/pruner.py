"""Pruner: carries out the plan of a method from hooks on a model and its optimizer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sparsesoup.core.errors import UserError
from sparsesoup.core.masks import Masks, apply_masks_
from sparsesoup.core.masks import sparsity as sparsity_of
from sparsesoup.loops.forward_hook import ForwardHook
from sparsesoup.loops.gradients import GradientWatch, warn_of_eval_mode
from sparsesoup.loops.optimizer import RelativeRate, StepNesting, is_skipped, lent_optimizer
from sparsesoup.loops.problem import LoopProblem
from sparsesoup.loops.pruned_folder import save_pruned
from sparsesoup.loops.pruner_checks import check_state, warn_of_missed_sparsity
from sparsesoup.loops.traces import untouched_weights, without_trace
from sparsesoup.methods import Method, row_of
from sparsesoup.training.cost import Cost
from sparsesoup.training.driver import run_forks, run_phase
from sparsesoup.training.loop import OPTIMIZERS_THAT_KEEP_ZEROS, Rate
from sparsesoup.training.overrides import dropout_set_to
from sparsesoup.training.plan import ActiveRun, LoopHooks, Phase
from sparsesoup.training.state import TrainState, parameter_versions


class Pruner:
    """Prunes a model while a foreign loop trains it; made by `attach`.

    What a plan does between two steps (look-aheads, a pruning, scores) is done before the next forward pass, when the
    loop's scheduler has moved on.
    """

    def __init__(
        self, model: nn.Module, method: Method, problem: LoopProblem, phases: Sequence[Phase], sparsity: float,
        scaler: Any = None,
    ) -> None:  # fmt: skip
        self.method, self.problem, self.phases, self.target_sparsity = method, problem, phases, sparsity
        self._run: ActiveRun | None = None
        self._phase: Phase | None = None
        self._factor: Rate | None = None
        self._next, self._end, self._inside, self._overrides = 0, 0, LoopHooks(), ExitStack()
        self._due, self._busy, self._masks = True, False, Masks()
        self._rates, self._steps = list[Any](), StepNesting()
        self._gradients = GradientWatch(problem, scaler, lambda: self.masks)
        optimizer = problem.optimizer
        self._hooks = [
            model.register_forward_pre_hook(ForwardHook(self)),
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def __repr__(self) -> str:
        return f"<Pruner: {row_of(self.method)} to {self.target_sparsity:g} in {self.problem.steps} steps>"

    @property
    def masks(self) -> Masks:
        """The kept weights by name, True = kept."""
        return self._started.state.masks

    @property
    def sparsity(self) -> float:
        """The share of the prunable weights that is removed now."""
        return sparsity_of(self.masks)

    @property
    def step(self) -> int:
        """The optimizer steps that were made."""
        return self._started.state.step

    @property
    def cost(self) -> Cost:
        """The cost of work outside the loop: weak runs and scores."""
        return self.problem.meter.total_cost()

    def finish(self, early: bool = False) -> Masks:
        """End the pruning: remove all hooks, and return the masks.

        Args:
            early: accept a loop that ended before its T steps; the masks are those of that moment.
        Raises: UserError if the loop ended early and that is not accepted.
        Warns: if the masks of all T steps miss the target sparsity.
        """
        if not early and self.step < self.problem.steps:
            raise UserError(
                f"the loop ended at step {self.step} of {self.problem.steps}, at sparsity {self.sparsity:.3f} of "
                f"{self.target_sparsity:g}; train on, or use what there is with finish(early=True)"
            )
        if self._due and self.step >= self.problem.steps:
            self._catch_up()
        self._enforce_masks()
        self.remove_hooks()
        if self.step >= self.problem.steps:
            warn_of_missed_sparsity(repr(self), self.sparsity, self.target_sparsity)
        return self.masks

    def remove_hooks(self) -> None:
        """Leave the loop alone from now on, with the weights as they are."""
        self._overrides.close()
        while self._hooks:
            self._hooks.pop().remove()
        self._gradients.remove()

    def save(self, folder: str | Path) -> Path:
        """Write the model as `save_pretrained` does, with its masks: `export` and `benchmark` take the folder.

        Of a module that is none of transformers' the weights are written as model.safetensors, which
        `safetensors.torch.load_model` reads, and which `export` takes as dense and packed.

        Raises: UserError if the folder exists.
        """
        self._enforce_masks()
        facts = {"method": row_of(self.method), "sparsity": self.sparsity}
        return save_pruned(self.problem.pretrained, self.masks, folder, facts)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a restarted loop needs besides its own model and optimizer: plain values and tensors."""
        state = self._started.state
        own = {k: t for k, t in state.tensors().items() if k.startswith(("masks/", "memory/"))}
        shadow = self.problem.gated
        own |= {} if shadow is None else shadow.tensors()
        position = {
            "next": self._next, "open": self._phase is not None, "end": self._end, "due": self._due,
            "score_factor": 1.0 if shadow is None else shadow.factor,
        }  # fmt: skip
        costs = self.problem.meter.to_json()
        return {"plan": self._plan_key, "position": position, "facts": state.facts(), "costs": costs, "tensors": own}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Resume from `state_dict`; call it after model and optimizer are loaded, before the first forward pass.

        Raises: UserError if it is of another method, T, sparsity or model, or no state of a pruner.
        """
        check_state(saved, self._plan_key, self.problem.targets)
        with untouched_weights(self.problem):
            state = self._started.state
        device = next(iter(state.masks.values())).device
        tensors = {name: t.to(device, copy=True) for name, t in saved["tensors"].items()}
        state.masks = {name: tensors[f"masks/{name}"] for name in state.targets}
        state.memory = {k.removeprefix("memory/"): t for k, t in tensors.items() if k.startswith("memory/")}
        facts, position = saved["facts"], saved["position"]
        state.step, state.masked, state.notes = int(facts["step"]), float(facts["masked"]), dict(facts["notes"])
        self.problem.meter.restore(saved["costs"])
        for phase in self.phases[: position["next"]]:
            if phase.always is not None:
                phase.always(self._started)
        if self.problem.gated is not None:
            self.problem.gated.factor = position["score_factor"]
            self.problem.gated.load(tensors)
        self._next, self._end, self._due = position["next"], position["end"], position["due"]
        if position["open"]:
            self._open(self.phases[self._next], self._end)
        self._masks = Masks()

    @property
    def _plan_key(self) -> str:
        return f"{self.method}, T {self.problem.steps}, sparsity {self.target_sparsity:g}"

    @property
    def _started(self) -> ActiveRun:
        if self._run is None:
            self._run = self.method.start_run(self.problem, self.target_sparsity)
            self._run.phases, self._run.sparsity = self.phases, self.target_sparsity
        return self._run

    def before_forward(self) -> None:
        """Do what is due before a forward pass; the hook on the model calls it."""
        if self._busy:
            return
        self._steps.begin_forward()
        if self._due:
            self._catch_up()
        self._gradients.renew()

    def _catch_up(self) -> None:
        """Do what the plan has between the steps that were made and the next ones."""
        run = self._started
        with self._asleep(), without_trace(self.problem, run.state.model):
            if self._phase is not None:
                self._close(run, self._phase)
            while self._phase is None and self._next < len(self.phases):
                self._begin_next(run)
            if self.problem.gated is not None:
                self._hold_masks(run.state, written=bool(self._inside.hooks))
                self.problem.gated.show()
        self._due = False

    def _begin_next(self, run: ActiveRun) -> None:
        phase, state = self.phases[self._next], run.state
        if phase.kind == "fork":
            forks = list(takewhile(lambda other: other.kind == "fork", self.phases[self._next :]))
            self._run_forks(run, forks)
            self._next += len(forks)
        elif phase.skip is not None and phase.skip(state):
            self._next += 1
        else:
            steps = phase.steps if phase.until is None else phase.until - state.step
            if steps := steps if phase.lasts is None else phase.lasts(run):
                self._open(phase, state.step + steps)
                for hook in self._inside.hooks if self._inside.at_start and state.step == 0 else ():
                    hook(state)
            else:
                run_phase(run, replace(phase, skip=None))
                if phase.always is not None:
                    phase.always(run)
                self._next += 1

    def _open(self, phase: Phase, end: int) -> None:
        self._phase, self._end = phase, end
        self._inside = LoopHooks() if phase.loop is None else phase.loop(self._started)
        self._inside = replace(self._inside, hooks=tuple(self._inside.hooks))
        self._gradients.observing = self._inside.observe is not None
        self._factor = None if phase.rate == self.problem.rate_schedule() else phase.rate
        if phase.overrides is not None:
            self._overrides.enter_context(dropout_set_to(self._started.state.model, phase.overrides.dropout))

    def _close(self, run: ActiveRun, phase: Phase) -> None:
        self._overrides.close()
        for after in (phase.end, phase.always):
            if after is not None:
                after(run)
        self._phase, self._inside, self._factor, self._gradients.observing = None, LoopHooks(), None, False
        self._next += 1

    def _run_forks(self, run: ActiveRun, forks: Sequence[Phase]) -> None:
        """Run the forks at the loop's present learning rates, times the factor of each."""
        own = self.problem.rate_schedule()
        now = own(run.state.step)
        with lent_optimizer(self.problem):
            run_forks(run, [replace(fork, rate=RelativeRate(fork.rate or own, now)) for fork in forks])

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        return None if self._busy else self._steps.begin(args, kwargs, partial(self._prepare_step, optimizer))

    def _prepare_step(self, optimizer: Optimizer) -> None:
        """Do what comes between the gradients of a step and the step itself."""
        if self._due:  # the forward pass was made on something that wraps the model
            self._catch_up()
            self._gradients.zero()
        state = self._started.state
        warn_of_eval_mode(self.problem.pretrained, state.step)
        self._rates = [group["lr"] for group in optimizer.param_groups]
        if self._factor is not None:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * (self._factor(state.step) / self.problem.training.learning_rate)
        if self.problem.gated is not None and not is_skipped(optimizer):
            self.problem.gated.backward(state, self._inside.penalty)
        if self._inside.observe is not None and not is_skipped(optimizer):
            with self._gradients.shown(optimizer, state):
                self._inside.observe(state)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._busy or not self._steps.end():
            return
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        if is_skipped(optimizer):
            return
        state, shadow = self._started.state, self.problem.gated
        if shadow is not None:
            shadow.take_step(float(self._rates[0]))
        state.step += 1
        params = state.prunable_parameters()
        before = parameter_versions(params) if self._inside.hooks else []
        for hook in self._inside.hooks:
            hook(state)
        self._hold_masks(state, written=bool(self._inside.hooks) and before != parameter_versions(params))
        if shadow is not None:
            shadow.show()
        self._due = self._phase is not None and (state.step >= self._end or state.halt)

    def _hold_masks(self, state: TrainState, written: bool) -> None:
        if state.masks is not self._masks:
            state.enforce_masks_()
            if self.problem.gated is not None:
                self.problem.gated.zero_moments(state.masks)
            self._masks = state.masks
        elif written or type(self.problem.optimizer) not in OPTIMIZERS_THAT_KEEP_ZEROS:
            apply_masks_(state.prunable_parameters(), state.masks)

    def _enforce_masks(self) -> None:
        self._started.state.enforce_masks_()
        if self.problem.gated is not None:
            self.problem.gated.show()

    @contextmanager
    def _asleep(self) -> Iterator[None]:
        """Disable the hooks while code of this library runs in the block."""
        self._busy = self._gradients.paused = True
        try:
            yield
        finally:
            self._busy = self._gradients.paused = False
