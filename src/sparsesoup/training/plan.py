"""The plan of a method: phases that are known before anything runs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.core.targets import Targets
from sparsesoup.training.config import TrainingConfig, TrainingOverrides
from sparsesoup.training.evaluation import MAIN, EarlyStopping
from sparsesoup.training.hooks import Hook
from sparsesoup.training.loop import Rate
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState

Pass = Literal["forward", "inputs", "gradient", "hessian"]
Need = Literal["own loss", "own rate", "rewinding", "extra batches"]


@dataclass(frozen=True)
class LoopHooks:
    """Hooks of a method inside a training loop; see `sparsesoup.training.loop.train`.

    Args:
        hooks: called after each step.
        at_start: also call the hooks before the first step of the run.
        observe: called with the gradients of each step.
        penalty: added to the loss.
    """

    hooks: Iterable[Hook] = ()
    at_start: bool = False
    observe: Hook | None = None
    penalty: Callable[[TrainState], Tensor] | None = None


@dataclass
class ActiveRun:
    """A run in progress, as the functions of a phase get it.

    Args:
        problem: what is pruned.
        state: model, optimizer, masks and notes.
        sparsity: share of the prunable weights to remove.
        phases: the plan of the run.
        with_teacher: the problem with the method's own loss, for phases that use it.
        own: what the method keeps in this process, such as its gates or a rewinding point.
    """

    problem: Problem
    state: TrainState
    sparsity: float = 0.0
    phases: Sequence["Phase"] = ()
    with_teacher: Problem | None = None
    own: Any = None


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run: training steps, if any, and the work after them.

    A finished phase is not repeated after a kill. Functions get the run; those of a fork must be picklable (methods of
    the method's dataclass, with functools.partial).

    Args:
        name: name of the phase, unique in the run.
        steps: optimizer steps.
        at_most: the data may end the phase earlier.
        label: cost label of the steps.
        kind: train; head (only the task head and other randomly initialised parameters are trained); blocks (only the
            repeated blocks); or fork: train a copy of the state, whose result, the tensors that `end` returns, is
            added to the memory of the state.
        stream: name of the random stream for row order and noise.
        rate: step -> learning rate, if it is not the run's own schedule over T.
        overrides: settings that differ from the problem's.
        fresh_optimizer: reset the optimizer first.
        loop: work inside the training loop.
        own_loss: train with the method's own loss, which runs a teacher on every batch.
        priced_problem: makes the problem that is trained, for the FLOPs of its steps and validations, where model or
            loss are the method's own; default: the plain steps, with a teacher's forward pass if `own_loss`.
        split_loss: in the loop, `observe` gets the gradients of the answers' loss alone; the distance from a teacher's
            hidden states then takes a second backward pass. A foreign loop has one loss, and observes that.
        shared: the training may be taken from the cache of trainings.
        keeps_moments: whether the next phase uses the optimizer's moments; else they are dropped after the steps,
            and a shared training is cached as weights alone.
        until: train to this step of the run, however many steps that takes.
        lasts: the number of steps, where it depends on the phases that were left out.
        skip: whether to leave the phase out, given the state at its start.
        scores: passes over calibration batches at the end of the phase: (kind of pass, number of batches).
        per_block: the passes of `scores` are made for each repeated block of the model.
        score_path: random stream of the calibration rows.
        validations: passes over the validation rows at the end of the phase.
        store: keep the weights after the steps as an artifact of this name.
        end: work after the steps.
        end_flops: FLOPs of that work on the targets, besides passes through the model.
        rewinds_to: step of the run that `end` goes back to.
        hold: keep the state after the phase on disk until the end of the run.
        always: called after the phase, and at every restart after it.
        copies: copies of the prunable weights that the method holds in this phase, besides plain training and
            snapshots.
        models: copies of the whole model that the method holds in this phase, such as a teacher of its own.
        masks_final: step of the run from which the masks no longer change, in a last phase with a `loop`; None: they
            change until its end.
    """

    name: str
    steps: int = 0
    at_most: bool = False
    label: str = "main"
    kind: Literal["train", "head", "blocks", "fork"] = "train"
    stream: tuple[object, ...] = ()
    rate: Rate | None = None
    overrides: TrainingOverrides | None = None
    fresh_optimizer: bool = False
    loop: Callable[[ActiveRun], LoopHooks] | None = None
    own_loss: bool = False
    priced_problem: Callable[[Problem], Problem] | None = None
    split_loss: bool = False
    shared: bool = False
    keeps_moments: bool = True
    until: int | None = None
    lasts: Callable[[ActiveRun], int] | None = None
    skip: Callable[[TrainState], bool] | None = None
    scores: tuple[tuple[Pass, int], ...] = ()
    per_block: bool = False
    score_path: tuple[object, ...] = ()
    validations: int = 0
    store: str = ""
    end: Callable[[ActiveRun], Any] | None = None
    end_flops: Callable[[Targets], int] | None = None
    rewinds_to: int | None = None
    hold: bool = False
    always: Callable[[ActiveRun], None] | None = None
    copies: float = 0.0
    models: int = 0
    masks_final: int | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """Requirements of the phase on a training loop beyond plain steps."""
        found: dict[Need, bool] = {
            "own loss": self.own_loss,
            "own rate": self.rate is not None,
            "rewinding": self.rewinds_to is not None,
            "extra batches": bool(self.kind == "fork" or self.scores or self.validations),
        }
        return frozenset(need for need, needed in found.items() if needed)


def takes_snapshots(phases: Sequence[Phase]) -> bool:
    """Return True if a run forks or has rewinding points."""
    return any(phase.hold or phase.kind == "fork" for phase in phases)


def first_steps(phases: Sequence[Phase]) -> Iterator[tuple[Phase, int]]:
    """Yield each phase with the step of the run at which it begins.

    >>> train, again = Phase(name="train", steps=10, rewinds_to=2), Phase(name="again", steps=8)
    >>> [(phase.name, begin) for phase, begin in first_steps([train, again])]
    [('train', 0), ('again', 2)]
    """
    step = 0
    for phase in phases:
        yield phase, step
        step += 0 if phase.kind == "fork" else phase.steps
        step = step if phase.rewinds_to is None else phase.rewinds_to


def planned_steps(phases: Sequence[Phase]) -> int:
    """Return the number of training steps of a run, weak ones included; where data decide, the most."""
    return sum(phase.steps for phase in phases)


def early_stopping_of(phases: Sequence[Phase], training: TrainingConfig) -> EarlyStopping | None:
    """Return the early stopping of the last phase of a plan; None without it.

    Raises: UserError if the plan does not end with a training whose masks are final at some step of it.

    >>> config = TrainingConfig(eval_steps=5, early_stopping_patience=2)
    >>> early_stopping_of([Phase(name="train", steps=10)], config)
    EarlyStopping(patience=2, start=0)
    """
    if training.early_stopping_patience is None:
        return None
    last = phases[-1]
    start = 0 if last.loop is None else last.masks_final
    if (
        last.kind not in ("train", "blocks")
        or last.label != MAIN
        or not last.steps
        or last.end
        or last.store
        or start is None
    ):
        raise UserError(
            "this method does not end with one training at final masks, so it cannot stop early; leave it out",
            "train.early_stopping_patience",
        )
    return EarlyStopping(training.early_stopping_patience, start)


def count_evaluations(phase: Phase, begin: int, training: TrainingConfig, may_stop: bool = False) -> int:
    """Return the validations during a phase that begins at this step of the run, at most.

    Args:
        may_stop: whether the phase may stop early; then it is also validated at its end.
    """
    if training.eval_steps is None or phase.label != MAIN or phase.kind not in ("train", "blocks"):
        return 0
    end = begin + phase.steps
    return end // training.eval_steps - begin // training.eval_steps + bool(may_stop and end % training.eval_steps)
