"""Scores from the gradient of the task's loss, and from its curvature along the gradient."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsesoup.core.targets import target_parameters
from sparsesoup.methods.scores.calibration import Rows, for_each_batch, require_finite
from sparsesoup.training.batching import Batch
from sparsesoup.training.problem import Problem

Table = Mapping[str, Tensor]  # parameter name -> tensor of the parameter's shape


def task_gradient(problem: Problem, model: nn.Module, rows: Rows, temperature: float = 1.0) -> dict[str, Tensor]:
    """Return g: the gradient of the task's mean loss over `rows` at the targets, in eval mode and without autocast.

    Args:
        rows: as from `calibration_batches`; one batch is in memory at a time.
        temperature: divides the logits before the loss; no effect on regression.
    Raises: UserError if it is not finite.
    """
    params = target_parameters(model, problem.targets)
    total = {name: torch.zeros_like(p, requires_grad=False) for name, p in params.items()}

    def work(batch: Batch, share: float) -> None:
        loss = _scaled_loss(problem, model, batch, temperature)
        found = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
        _add_gradients(total, found, share)

    for_each_batch(problem, model, rows, "gradient", work)
    return require_finite(total, "the gradient")


def hessian_product(
    problem: Problem, model: nn.Module, rows: Rows, vector: Table, temperature: float = 1.0
) -> dict[str, Tensor]:
    """Return H v: the Hessian of the task's mean loss over `rows` at the targets, times `vector`.

    Uses two backward passes per batch (Pearlmutter 1994), so it is exact and never builds H.

    Args:
        vector: a tensor of its shape for each target.
        temperature: as in `task_gradient`.
    Raises: UserError if it is not finite.
    """
    params = target_parameters(model, problem.targets)
    total = {name: torch.zeros_like(p, requires_grad=False) for name, p in params.items()}
    weights = list(params.values())

    def work(batch: Batch, share: float) -> None:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            loss = _scaled_loss(problem, model, batch, temperature)
            slopes = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
            along = torch.stack([(s * vector[n]).sum() for n, s in zip(params, slopes, strict=True)]).sum()
            _add_gradients(total, torch.autograd.grad(along, weights, materialize_grads=True), share)

    for_each_batch(problem, model, rows, "hessian", work)
    return require_finite(total, "the Hessian-gradient product")


def snip_sensitivity(params: Table, slopes: Table) -> dict[str, Tensor]:
    """Return |g w|: the first-order change of the loss if the weight is removed. SNIP: Lee et al. 2019, sec. 4."""
    return {name: (p.detach() * slopes[name]).abs() for name, p in params.items()}


def movement_sensitivity(params: Table, origin: Table, slopes: Table) -> dict[str, Tensor]:
    """Return |w - w_0| |g w|: a change of the loss for weights that have moved. Lubana & Dick 2021, sec. 4.

    It is 0 everywhere at the origin itself.
    """
    known = snip_sensitivity(params, slopes)
    return {name: (p.detach() - origin[name].detach().to(p.device)).abs() * known[name] for name, p in params.items()}


def gradient_flow_score(params: Table, products: Table) -> dict[str, Tensor]:
    """Return w (H g), with its sign: the gradient flow lost if the weight is removed. GraSP: Wang et al. 2020, sec. 4.

    The paper's score is its negative, and removes the largest; here higher = keep as everywhere.
    """
    return {name: p.detach() * products[name] for name, p in params.items()}


def _scaled_loss(problem: Problem, model: nn.Module, batch: Batch, temperature: float) -> Tensor:
    outputs = problem.predict(model, batch)
    several = outputs.dim() > 1 and outputs.shape[-1] > 1
    return problem.criterion(outputs / temperature if several and temperature != 1.0 else outputs, batch)


def _add_gradients(total: dict[str, Tensor], found: tuple[Tensor, ...], share: float) -> None:
    for value, more in zip(total.values(), found, strict=True):
        value.add_(more.detach(), alpha=share)
