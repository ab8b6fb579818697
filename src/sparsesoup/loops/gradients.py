"""The gradients of a foreign loop: zero where weights are pruned, and observed as the backward pass left them."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from sparsesoup.core.errors import UserError
from sparsesoup.core.masks import Masks
from sparsesoup.core.targets import Targets, bias_of, target_parameters
from sparsesoup.loops.problem import LoopProblem
from sparsesoup.training.overrides import find_dropouts
from sparsesoup.training.state import TrainState


def check_trained(model: nn.Module, optimizer: Optimizer, targets: Targets) -> None:
    """Raise a UserError if the optimizer does not train a weight that is to be pruned."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError("LBFGS computes several losses a step, and nothing holds the masks in between; use AdamW")
    if any(group.get("lr") is None for group in optimizer.param_groups):
        name = type(optimizer).__name__
        raise UserError(f"{name} has lr=None; give it a learning rate (for Adafactor with relative_step=False)")
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    params = dict(model.named_parameters())
    if missing := [n for n in targets if n not in params or id(params[n]) not in trained]:
        raise UserError(
            f"{missing[0]} is to be pruned and not trained by this optimizer ({len(missing)} such weights); make the "
            f"optimizer of the model's parameters once the model is on its device, or leave them out with prunable=..."
        )
    check_requires_grad(model, targets)


def check_requires_grad(model: nn.Module, targets: Targets) -> None:
    """Raise a UserError if a weight that is to be pruned is frozen, since then nothing could make up for it."""
    if frozen := [name for name, p in target_parameters(model, targets).items() if not p.requires_grad]:
        some = f"{frozen[0]} is to be pruned and frozen ({len(frozen)} such weights of {len(targets)})"
        raise UserError(f"{some}; call requires_grad_(True), or leave them out with prunable=...")


def warn_of_eval_mode(model: nn.Module, step: int) -> None:
    """Warn before the first step if a model is trained in eval mode although that switches layers of it off."""
    if step:
        return
    idle = [module for module, _, probability in find_dropouts(model) if probability]
    idle += [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    if idle and not any(module.training for module in (model, *idle)):
        warnings.warn(
            f"{type(model).__name__} is trained in eval mode, without its dropout and with fixed statistics of batch "
            f"norms; call model.train() before the loop, unless that is what you want",
            stacklevel=2,
        )


class GradientWatch:
    """Hooks on the prunable parameters, and on the biases beside them.

    The gradient of a pruned weight is zeroed when it is made. While a method observes, a copy of each gradient is
    kept, so that it is seen before the loop clips it, divided by the scale of the loop's gradient scaler. If a model
    runs in float16 and the scaler is not known, gradients are seen as the optimizer gets them, after clipping.

    Args:
        problem: that of the loop.
        scaler: the loop's gradient scaler, or None.
        masks: gives the present masks.
    """

    def __init__(self, problem: LoopProblem, scaler: Any, masks: Callable[[], Masks]) -> None:
        self.problem, self.scaler, self.masks = problem, scaler, masks
        self.observing, self.paused = False, False
        self._scale_unknown = False
        self._made: dict[str, Tensor] = {}
        self._params: dict[str, Parameter] = {}
        self._biases: dict[str, Parameter] = {}
        self._handles: list[Any] = []

    def renew(self) -> None:
        """Follow the parameters of the model, which may have been replaced; call it before each forward pass.

        Raises: UserError if the optimizer does not train the new ones.
        """
        kind = self.problem.accelerator.device.type
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16
        self._scale_unknown = half and self.scaler is None
        params = target_parameters(self.problem.pretrained, self.problem.targets)
        if params.keys() == self._params.keys() and all(p is self._params[n] for n, p in params.items()):
            return
        if self._params:
            check_trained(self.problem.pretrained, self.problem.optimizer, self.problem.targets)
            if self.problem.gated is not None:
                raise UserError(
                    "parameters were replaced after attach, which learned masks cannot follow; attach afterwards"
                )
        self.remove()
        self._params, every = params, dict(self.problem.pretrained.named_parameters())
        biases = {bias_of(name) for name in params} & every.keys()
        self._biases = {name: every[name] for name in sorted(biases) if every[name].requires_grad}
        watched = params | self._biases
        self._handles = [p.register_post_accumulate_grad_hook(self._hook(name)) for name, p in watched.items()]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._made = [], {}

    def zero(self) -> None:
        """Zero the gradients of pruned weights that were made before the masks."""
        for name, parameter in self._params.items():
            self._zero(name, parameter)

    @contextmanager
    def shown(self, optimizer: Optimizer, state: TrainState) -> Iterator[None]:
        """Give the parameters the gradients that a method observes."""
        params = state.prunable_parameters() | self._biases
        given = {name: p.grad for name, p in params.items()}
        for name, parameter in params.items():
            if parameter.grad is not None:
                parameter.grad = self._observed(name, parameter.grad, optimizer)
        try:
            yield
        finally:
            for name, parameter in params.items():
                parameter.grad = given[name]

    def _observed(self, name: str, grad: Tensor, optimizer: Optimizer) -> Tensor:
        inside = getattr(optimizer, "grad_scale", None)  # a fused optimizer divides by it itself
        if name not in self._made or self._scale_unknown:
            return grad if inside is None else grad / inside
        made = self._made[name]
        scaled = self.scaler is not None and self.scaler.is_enabled()
        return made / self.scaler.get_scale() if scaled else made if inside is None else made / inside

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if self.paused:
                return
            if name in self._params:
                self._zero(name, parameter)
            if self.observing and parameter.grad is not None and not self._scale_unknown:
                made = self._made.get(name)
                if made is None or made.shape != parameter.grad.shape or made.dtype != parameter.grad.dtype:
                    self._made[name] = parameter.grad.clone()
                else:
                    made.copy_(parameter.grad)

        return hook

    def _zero(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.mul_(self.masks()[name].view(torch.int8))
