"""prune_once: prune a model object by a few batches, without training."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sparsesoup.core.errors import UserError
from sparsesoup.core.masking import Scope, check_rows, check_sparsity, fixed_sparsity, topk_masks
from sparsesoup.core.masks import Masks
from sparsesoup.core.rng import cpu_generator
from sparsesoup.core.targets import Target, Targets, block_of, target_parameters
from sparsesoup.loops.attach import Prunable, find_targets
from sparsesoup.methods.scores.sparsegpt import sparsegpt

OnceMethod = Literal["magnitude", "random", "wanda", "sparsegpt"]


def prune_once(
    model: nn.Module,
    batches: Iterable[Any] = (),
    method: OnceMethod = "wanda",
    sparsity: float | str = 0.5,
    *,
    prunable: Prunable | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
) -> Masks:
    """Prune a model in place, without training: every matrix to the same sparsity.

    wanda and sparsegpt go from block to block: a block is scored by its inputs behind the pruned blocks before it.
    Wanda: Sun et al. 2024. SparseGPT: Frantar & Alistarh 2023; it also changes the weights that stay.

    Args:
        model: the model; its prunable weights are changed.
        batches: calibration batches, for wanda and sparsegpt; padding of an `attention_mask` is left out.
        method: magnitude, random, wanda (each output keeps as many weights) or sparsegpt.
        sparsity: share of every matrix to remove, or N:M such as "2:4".
        prunable: (name, parameter) -> whether to prune it; see `sparsesoup.attach`.
        forward: (model, batch) -> anything; default: model(**batch).
        seed: seed of the random masks.
    Returns: name -> mask, True = kept.
    Raises: UserError if a batch is missing, or the matrices do not fit N:M.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> masks = prune_once(model, [torch.randn(16, 8)], "sparsegpt", "2:4", forward=lambda model, x: model(x))
    >>> int(masks["0.weight"].sum())
    32
    """
    if method not in get_args(OnceMethod):
        raise UserError(f"there is no method {method} without training; take {', '.join(get_args(OnceMethod))}")
    scope: Scope = "tensor" if isinstance(sparsity, float | int) else _scope_of(sparsity)
    share = float(sparsity) if isinstance(sparsity, float | int) else fixed_sparsity(scope) or 0.0
    check_sparsity(share)
    targets, rows = find_targets(model, prunable), list(batches)
    for name, target in targets.items():
        _check_matrix(name, target, scope)
    if method in ("wanda", "sparsegpt") and not rows:
        raise UserError(f"{method} needs batches; give a few, such as 128 texts of the training set")
    training, masks = model.training, Masks()
    model.eval()
    for block in _blocks_of(targets):
        inputs = _inputs_of(model, block, rows, forward, method) if method in ("wanda", "sparsegpt") else {}
        for name, target in block.items():
            masks[name] = _prune_matrix(model, name, target, method, share, scope, inputs.get(name), seed)
    model.train(training)
    return masks


def _scope_of(text: str) -> Scope:
    scopes: dict[str, Scope] = {"1:4": "1:4", "2:4": "2:4", "4:8": "4:8"}
    if text not in scopes:
        raise UserError(f"sparsity is a share in [0, 1) or one of {', '.join(scopes)}, got {text}")
    return scopes[text]


def _check_matrix(name: str, target: Target, scope: Scope) -> None:
    if len(target.shape) != 2:
        raise UserError(f"{name} is a stack of matrices {target.shape}; leave it out with prunable=...")
    check_rows(scope, target.shape[::-1] if target.transposed else target.shape, name)


def _blocks_of(targets: Targets) -> list[Targets]:
    """Return the targets of each repeated block, in order; those outside of blocks one by one."""
    found: dict[str, Targets] = {}
    for name, target in targets.items():
        found.setdefault(block_of(name) or name, {})[name] = target
    return list(found.values())


class _InputStatistics:
    """Sum x x^T, or only its diagonal, over the inputs of a module, in float32."""

    def __init__(self, full: bool) -> None:
        self.full, self.total, self.calls = full, torch.zeros(()), 0
        self.mask: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x, mask = inputs[0].detach(), self.mask
        if mask is not None and x.shape[:-1] in (mask.shape, (mask.numel(),)):
            x = x.reshape(-1, x.shape[-1])[mask.reshape(-1).bool()]
        x = x.reshape(-1, x.shape[-1]).float()
        self.total = self.total.to(x.device) + (x.T @ x if self.full else x.square().sum(0))
        self.calls += 1


@torch.no_grad()
def _inputs_of(
    model: nn.Module,
    block: Targets,
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    method: OnceMethod,
) -> Mapping[str, Tensor]:
    """Return the input statistics of each matrix of a block, behind the blocks as they are now."""
    device = next(model.parameters()).device
    found = {name: _InputStatistics(method == "sparsegpt") for name in block}
    with _listening(model, found):
        for batch in batches:
            moved = _to(batch, device)
            for statistics in found.values():
                statistics.mask = moved.get("attention_mask") if isinstance(moved, Mapping) else None
            _ = forward(model, moved) if forward is not None else model(**moved)
    if unused := [name for name, statistics in found.items() if not statistics.calls]:
        raise UserError(f"the model does not call the module of {unused[0]}; leave it out with prunable=...")
    return {name: statistics.total for name, statistics in found.items()}


@contextmanager
def _listening(model: nn.Module, found: Mapping[str, _InputStatistics]) -> Iterator[None]:
    handles = []
    for name, statistics in found.items():
        handles.append(model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(statistics))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {name: _to(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_to(value, device) for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch


@torch.no_grad()
def _prune_matrix(
    model: nn.Module,
    name: str,
    target: Target,
    method: OnceMethod,
    share: float,
    scope: Scope,
    inputs: Tensor | None,
    seed: int,
) -> Tensor:
    parameter = target_parameters(model, {name: target})[name]
    weight = parameter.detach().T if target.transposed else parameter.detach()
    new = weight
    if method == "sparsegpt":
        assert inputs is not None
        new, mask = sparsegpt(weight, inputs, share, "global" if scope == "tensor" else scope)
    else:
        if method == "random":
            scores = torch.rand(weight.shape, generator=cpu_generator(seed, "score", name)).to(weight.device)
        else:
            scores = weight.abs().float() * (1.0 if inputs is None else inputs.sqrt())
        ranked: Scope = "row" if method == "wanda" and scope == "tensor" else scope
        mask = topk_masks({name: scores.contiguous()}, share, scope=ranked)[name]
        new = weight.masked_fill(~mask, 0.0)
    parameter.copy_(new.T if target.transposed else new)
    return mask.T.contiguous() if target.transposed else mask
