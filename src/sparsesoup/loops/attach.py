"""attach: prune a model while a loop of one's own trains it."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from sparsesoup.core.errors import UserError, as_python, require
from sparsesoup.core.granularity import Element
from sparsesoup.core.masking import check_sparsity
from sparsesoup.core.single_process import require_single_process
from sparsesoup.core.targets import Target, Targets
from sparsesoup.hub.models.prunable import prunable_matrices
from sparsesoup.loops.forward_hook import ForwardHook
from sparsesoup.loops.gradients import check_trained
from sparsesoup.loops.losses import check_function, check_loss
from sparsesoup.loops.problem import LoopProblem, Loss, count_batches, first_batches, make_problem
from sparsesoup.loops.pruner import Pruner
from sparsesoup.methods import HardConcreteL0, HybridMovement, Method, SoftMovement, row_of
from sparsesoup.runs.config import method_named
from sparsesoup.training.plan import Phase
from sparsesoup.training.snapshots import SnapshotStore

Prunable = Callable[[str, Parameter], bool]


def attach(
    model: nn.Module,
    optimizer: Any,
    method: str | Method = "gradual",
    sparsity: float = 0.9,
    *,
    steps: int,
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    prunable: Prunable | None = None,
    seed: int = 0,
    max_grad_norm: float = 1.0,
    scaler: Any = None,
    snapshots: str = "device",
) -> Pruner:
    """Prune a model while your own loop trains it; the loop only calls `finish` once at its end.

    Only steps that the innermost torch optimizer has taken count.

    Args:
        model: the model, as it is trained.
        optimizer: its optimizer, or accelerate's wrapper of it.
        method: a method's name, or a method object with settings.
        sparsity: share of the prunable weights to remove.
        steps: T, the optimizer steps of the loop.
        loss: (model, batch) -> mean loss; for methods that need batches of their own (isp, wanda, snip, ...).
        batches: training batches for those; the loop's DataLoader will do, since it is iterated separately.
        prunable: (name, parameter) -> whether to prune it; default: the matrices of the repeated blocks; without such
            blocks, of all linear layers but the last.
        seed: seed of all random choices.
        max_grad_norm: maximum gradient norm in weak runs; 0 disables clipping.
        scaler: the loop's gradient scaler, if it has one (accelerate's is detected), for methods that read gradients.
        snapshots: keep the state to return to after weak runs on the device, in host memory (host) or on disk (disk).
    Returns: the pruner, with `masks`, `sparsity`, `cost`, `state_dict` and `finish`.
    Raises: UserError if the method cannot run in such a loop, or does not fit it.

    >>> import torch
    >>> layer = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> pruner = attach(layer, optimizer, "gradual", sparsity=0.5, steps=10)
    >>> for _ in range(10):
    ...     layer(torch.randn(4, 8)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> masks = pruner.finish()
    >>> int((layer[0].weight == 0).sum())
    32
    """
    _check_given(model, sparsity, steps, loss)
    check_gates(chosen := _with_extra_steps(named_method(method)))
    bare, inner = unwrapped(model), innermost(optimizer)
    check_trained(bare, inner, targets := find_targets(bare, prunable))
    own: Any = (seed, max_grad_norm, count_batches(batches))
    problem = make_problem(bare, inner, targets, steps, None, None, *own)
    check_phases(chosen, phases := chosen.plan(problem.size, sparsity), loss is not None and batches is not None)
    if loss is not None and batches is not None:
        problem = make_problem(bare, inner, targets, steps, loss, first_batches(batches, phases, seed), *own)
    _check_method(chosen, problem, sparsity)
    problem, scaler = replace(problem, snapshots=SnapshotStore(snapshots)), scaler or getattr(optimizer, "scaler", None)
    return Pruner(model, chosen, problem, phases, sparsity, scaler)


def _check_method(method: Method, problem: LoopProblem, sparsity: float) -> None:
    """Raise a UserError if the method does not fit the model; warn of what it doubts."""
    method.check(problem, sparsity)
    for doubt in method.doubts(problem, sparsity):
        warnings.warn(as_python(doubt), stacklevel=3)


def _check_given(model: nn.Module, sparsity: float, steps: int, loss: Any) -> None:
    require_single_process()
    require(isinstance(model, nn.Module), "model", "the module that is trained", repr(model))
    require_unattached(model)
    check_sparsity(sparsity)
    check_loss(loss)
    require(
        not isinstance(steps, bool) and isinstance(steps, Integral) and steps >= 0,
        "steps",
        "the optimizer steps of the loop",
        repr(steps),
    )


def _with_extra_steps(method: Method) -> Method:
    if getattr(method, "budget", "extra") != "extra" and getattr(method, "weak_masks", 1):
        return replace(method, budget="extra")  # type: ignore[call-arg]  # the loop has its T steps
    return method


def require_unattached(model: nn.Module) -> None:
    """Raise a UserError if a pruner that has not finished holds a model."""
    for hook in (hook for module in model.modules() for hook in module._forward_pre_hooks.values()):
        if isinstance(hook, ForwardHook) and hook.pruner is not None:
            raise UserError(
                f"another pruner ({row_of(hook.pruner.method)}) has hooks on this {type(model).__name__}; end it first "
                f"with finish(), or finish(early=True), or load the model again"
            )


def named_method(method: str | Method) -> Method:
    """Return a method by name, or the method itself.

    Raises: UserError if there is none of that name, or it is something else.
    """
    if isinstance(method, str):
        return method_named(method)
    if not isinstance(method, Method):
        raise UserError(f"a method is a name such as 'isp', or an object such as InstantSoup(), got {method!r}")
    return method


def innermost(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside wrappers such as accelerate's."""
    while not isinstance(optimizer, Optimizer) or hasattr(optimizer, "optimizer"):
        if not hasattr(optimizer, "optimizer"):
            raise UserError(f"{type(optimizer).__name__} is no torch optimizer, nor a wrapper of one")
        optimizer = optimizer.optimizer
    return optimizer


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile and DataParallel, whose parameters have the plain names."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(
        inside := getattr(model, "module" if isinstance(model, wrappers) else "_orig_mod", None), nn.Module
    ):
        model = inside
    return model


def find_targets(model: nn.Module, prunable: Prunable | None) -> Targets:
    """Return the prunable parameters of any model; see `attach`."""
    check_function(prunable, "prunable", "name", "parameter")
    if prunable is None:
        found = prunable_matrices(model) if hasattr(model, "base_model_prefix") else {}
        if not found:
            linear = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            found = _targets_of(model, lambda name, parameter: name in linear[:-1] and min(parameter.shape) > 1)
    else:
        found = _targets_of(model, prunable)
    if not found:
        raise UserError(
            f"found nothing to prune in {type(model).__name__}; name what with "
            f'prunable=lambda name, parameter: name.endswith("proj.weight")'
        )
    return found


def _targets_of(model: nn.Module, prunable: Prunable) -> Targets:
    chosen = [(name, p) for name, p in model.named_parameters() if prunable(name, p)]
    if flat := [name for name, p in chosen if p.dim() < 2 or min(p.shape) < 2]:
        raise UserError(f"{flat[0]} is no matrix, so it cannot be pruned; leave it out of prunable=...")
    owners = dict(model.named_modules())
    turned = {name: isinstance(owners[name.rpartition(".")[0]], Conv1D) for name, _ in chosen}  # stored [in, out]
    return {name: Target("other", tuple(p.shape), turned[name]) for name, p in chosen}


def check_gates(method: Method) -> None:
    """Raise a UserError if the gates of a method cannot be kept outside the model."""
    whole = isinstance(method, HybridMovement | HardConcreteL0)
    if whole or (isinstance(method, SoftMovement) and method.pattern != Element):
        raise UserError(
            f"{row_of(method)} masks biases or samples gates, which is not possible in a loop of your own; "
            f"let sparsesoup train with prune(trainer=...) or prune(model=...), or use movement or magnitude-ste here"
        )


def check_phases(method: Method, phases: Sequence[Phase], has_batches: bool) -> None:
    """Raise a UserError if a plan needs what a foreign loop does not give."""
    name, needs = row_of(method), {need for phase in phases for need in phase.needs}
    if any(phase.scores for phase in phases) and getattr(method, "temperature", 1.0) != 1.0:
        raise UserError(f"{name} cannot divide the logits inside loss=... by a temperature; leave it at 1")
    reasons = {
        "has a teacher in its loss": any(phase.own_loss for phase in phases),
        "goes back to an earlier step": any(phase.rewinds_to is not None for phase in phases),
        "validates on rows of its own": any(phase.validations for phase in phases),
        "trains the head alone first": any(phase.kind == "head" for phase in phases),
        "trains a model or a loss of its own": any(phase.priced_problem is not None for phase in phases),
        "trains the blocks alone": any(phase.kind == "blocks" for phase in phases),
    }
    for why, holds in reasons.items():
        if holds:
            raise UserError(
                f"{name} {why}, which a loop that is not ours does not; let sparsesoup train with "
                f"prune(trainer=...) or prune(model=...), or use gradual, platon, wanda or isp here"
            )
    if "extra batches" in needs and not has_batches:
        raise UserError(
            f"{name} needs batches of its own; give loss=lambda model, batch: model(**batch).loss and batches=loader"
        )
