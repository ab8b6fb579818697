"""prune_once: prune a model object by a few batches, without training."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.masking import GROUPS, Scope, check_sparsity, fixed_sparsity
from sparsesoup.core.masks import Masks, dense_masks
from sparsesoup.core.single_process import require_single_process
from sparsesoup.core.targets import target_parameters
from sparsesoup.loops.attach import Prunable, find_targets, named_method, require_unattached
from sparsesoup.loops.losses import scalar_loss
from sparsesoup.loops.problem import Loss, PlainDevice, as_mapping
from sparsesoup.methods import Method, OneShot, SparseGpt, Wanda, row_of
from sparsesoup.training.batching import Batch, RowBatches
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.driver import carry_out_plan
from sparsesoup.training.plan import Phase
from sparsesoup.training.problem import GateParameters, Problem
from sparsesoup.training.state import TrainState

REMEDY = "forward=lambda model, batch: model(batch), or loss=lambda model, batch: ... for snip and grasp"


def prune_once(
    model: nn.Module,
    batches: Iterable[Any] = (),
    method: str | Method = "wanda",
    sparsity: float | str = 0.5,
    *,
    prunable: Prunable | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> Masks:
    """Prune a model in place, without training: what a run with no steps does, without its report.

    By name, every matrix is pruned to the same sparsity, and wanda and sparsegpt go from block to block: a block is
    scored by its inputs behind the pruned blocks before it. Wanda: Sun et al. 2024. SparseGPT: Frantar & Alistarh 2023;
    it also changes the weights that stay.

    Args:
        model: the model; its prunable weights are changed.
        batches: calibration batches; padding of an `attention_mask` is left out.
        method: magnitude, random, wanda (each output keeps as many weights), sparsegpt, snip or grasp; or a method with
            settings, of which the number of batches is that of `batches`.
        sparsity: share of the weights to remove, or N:M such as "2:4".
        prunable: (name, parameter) -> whether to prune it; see `sparsesoup.attach`.
        forward: (model, batch) -> anything; default: model(**batch).
        loss: (model, batch) -> mean loss, for snip and grasp; default: the loss that the model returns.
        seed: seed of all random choices.
    Returns: name -> mask, True = kept.
    Raises: UserError if a batch is missing, the method needs training, or the matrices do not fit N:M.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> masks = prune_once(model, [torch.randn(16, 8)], "sparsegpt", "2:4", forward=lambda model, x: model(x))
    >>> int(masks["0.weight"].sum())
    32
    """
    require_single_process()
    require_unattached(model)
    require(isinstance(batches, Iterable), "batches", "batches of tensors, such as a DataLoader", repr(batches))
    rows = list(batches)
    chosen, share = _method_at(method, sparsity)
    if hasattr(chosen, "batches"):
        if not rows:
            name = method if isinstance(method, str) else type(method).__name__
            raise UserError(f"{name} needs batches; give a few, such as 128 texts of the training set")
        chosen = _with(chosen, batches=len(rows))
    data = RowBatches(rows or [None], lambda some: as_mapping(some[0]))
    problem = OnceProblem(
        pretrained=model, targets=find_targets(model, prunable), train=data, validation=data, steps=0, seed=seed,
        predict=lambda model, batch: _call(model, _as_given(batch, rows), forward),
        criterion=lambda outputs, batch: outputs.mean(), metric=lambda outputs, labels: {},
        training=TrainingConfig(batch_size=1),
    )  # fmt: skip
    if any(what in ("gradient", "hessian") for phase in _plan_of(chosen, problem, share) for what, _ in phase.scores):
        own = loss or (lambda model, batch: _call(model, batch, None).loss)
        problem = replace(problem, predict=lambda model, batch: scalar_loss(own(model, _as_given(batch, rows)))[None])
    training = model.training
    try:
        return carry_out_plan(chosen, problem, share).state.masks
    finally:
        model.train(training)


@dataclass(frozen=True, kw_only=True)
class OnceProblem(Problem):
    """A problem whose runs prune the user's own model, in place, without training it."""

    @property
    def accelerator(self) -> Any:
        """The device of the model."""
        return PlainDevice(next(self.pretrained.parameters()).device)

    def start_run(self, attach: Callable[[nn.Module], GateParameters] | None = None) -> TrainState:
        """Start a run on the model itself."""
        self.checkpointer.begin_run(self.meter)
        masks = dense_masks(target_parameters(self.pretrained, self.targets))
        idle = torch.optim.SGD(self.pretrained.parameters(), lr=0.0)
        return TrainState(model=self.pretrained, optimizer=idle, targets=self.targets, masks=masks)


def _method_at(method: str | Method, sparsity: float | str) -> tuple[Method, float]:
    """Return the method, with the scope that a sparsity as N:M says, and the sparsity as a share."""
    scope: Scope = "tensor"
    if isinstance(sparsity, str):
        if sparsity not in GROUPS:
            raise UserError(f"sparsity is a share in [0, 1) or one of {', '.join(GROUPS)}, got {sparsity}")
        scope = cast(Scope, sparsity)
    check_sparsity(share := (fixed_sparsity(scope) or 0.0) if isinstance(sparsity, str) else sparsity)
    if not isinstance(method, str):
        given = named_method(method)
        return (_with(given, scope=scope) if isinstance(sparsity, str) else given), share
    ranked: Scope = "row" if scope == "tensor" else scope
    own: dict[str, Method] = {
        "magnitude": OneShot(scope=scope), "random": OneShot(score="random", scope=scope),
        "wanda": Wanda(inputs="pruned", scope=ranked), "sparsegpt": _with(SparseGpt(), scope=scope),
    }  # fmt: skip
    chosen = own.get(method) or named_method(method)
    if method not in own and hasattr(chosen, "scope"):
        chosen = _with(chosen, scope=scope)
    return chosen, share


def _with(method: Method, **settings: Any) -> Method:
    """Return the method with other settings, which not every method has."""
    return cast(Method, replace(cast(Any, method), **settings))


def _plan_of(method: Method, problem: Problem, sparsity: float) -> list[Phase]:
    try:
        return method.plan(problem.size, sparsity)
    except UserError as error:
        raise UserError(f"{row_of(method)} does not prune without training ({error})") from error


def _as_given(batch: Batch, rows: list[Any]) -> Any:
    """Return a batch in the form in which the user gave it."""
    if isinstance(rows[0], Mapping):
        return batch
    return next(iter(batch.values())) if isinstance(rows[0], Tensor) else tuple(batch.values())


def _call(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None) -> Any:
    if forward is not None:
        return forward(model, batch)
    if not isinstance(batch, Mapping):
        raise UserError(f"a batch is a {type(batch).__name__}; show how the model reads it, with {REMEDY}")
    return model(**batch)
