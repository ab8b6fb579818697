"""Gated weights of a model in a foreign loop, kept outside it, so that its parameters always have their plain names.

Between steps the model holds what its gates let through. For the optimizer's step the weights behind the gates take
that place, with their gradients; the scores have an optimizer of their own.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from sparsesoup.core.masks import Masks
from sparsesoup.core.targets import Targets, target_parameters
from sparsesoup.training.optimizers import OPTIMIZERS
from sparsesoup.training.problem import GateParameters
from sparsesoup.training.state import TrainState


class ShadowWeights(nn.Module):
    """Copies of the prunable weights under their names in the model."""

    def __init__(self, model: nn.Module, targets: Targets) -> None:
        super().__init__()
        for name, parameter in target_parameters(model, targets).items():
            owner, _, own = name.rpartition(".")
            self._module_at(owner).register_parameter(own, Parameter(parameter.detach().clone()))

    def _module_at(self, path: str) -> nn.Module:
        module: nn.Module = self
        for part in path.split(".") if path else []:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        return module

    def weight(self, name: str) -> Tensor:
        """Return a weight as its gate lets it through."""
        owner, _, own = name.rpartition(".")
        found: Tensor = getattr(self.get_submodule(owner), own)
        return found


class Shadow:
    """The gated weights of a model, with the optimizer of their scores.

    Args:
        model, optimizer: the user's.
        targets: the prunable weights.
        attach: puts gates on the copies; returns their scores, and the factor of their learning rate.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, targets: Targets, attach: Callable[[nn.Module], GateParameters]
    ) -> None:
        self.model, self.optimizer, self.targets = model, optimizer, targets
        self.weights = ShadowWeights(model, targets)
        scores, self.factor = attach(self.weights)
        self.scores = list(scores)
        learned = self.scores or [Parameter(torch.zeros(()))]  # an optimizer needs a parameter
        self.score_optimizer = OPTIMIZERS["adamw"](learned, lr=0.0, weight_decay=0.0)
        self.weights.train()

    def behind(self) -> dict[str, Parameter]:
        """Return the weights behind the gates."""
        return target_parameters(self.weights, self.targets)

    def backward(self, state: TrainState, penalty: Callable[[TrainState], Tensor] | None) -> None:
        """Put the weights behind the gates into the model, with their gradients, and find those of the scores."""
        own = target_parameters(self.model, self.targets)
        given = {name: p.grad for name, p in own.items() if p.grad is not None}
        through = [self.weights.weight(name) for name in given]  # the penalty is one of the gates that were used
        pull = None if penalty is None else penalty(state)
        pulled = [pull] if pull is not None and pull.requires_grad else []
        torch.autograd.backward([*through, *pulled], [*given.values(), *(torch.ones_like(pull) for pull in pulled)])
        with torch.no_grad():
            for name, behind in self.behind().items():
                own[name].copy_(behind)
                if name in given:
                    own[name].grad = behind.grad
                behind.grad = None

    @torch.no_grad()
    def take_step(self, rate: float) -> None:
        """Take over the weights after the optimizer's step, and make that of the scores."""
        own = target_parameters(self.model, self.targets)
        for name, behind in self.behind().items():
            behind.copy_(own[name])
        for group in self.score_optimizer.param_groups:
            group["lr"] = rate * self.factor
        self.score_optimizer.step()
        self.score_optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def show(self) -> None:
        """Put into the model what the gates let through."""
        for name, parameter in target_parameters(self.model, self.targets).items():
            parameter.copy_(self.weights.weight(name))

    @torch.no_grad()
    def zero_moments(self, masks: Masks) -> None:
        """Zero the moments of pruned weights in the user's optimizer."""
        for name, parameter in target_parameters(self.model, self.targets).items():
            for value in self.optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == masks[name].shape:
                    value.mul_(masks[name].view(torch.int8))

    def tensors(self) -> dict[str, Tensor]:
        """Return weights, scores, thresholds and moments by name; they are not copies."""
        table = [*self.weights.named_parameters(), *self.weights.named_buffers()]
        found = {f"shadow/{name}": t.detach() for name, t in table}
        for number, score in enumerate(self.scores):
            for key, value in self.score_optimizer.state.get(score, {}).items():
                found[f"moments/{number}/{key}"] = value
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load the tensors of `tensors`."""
        for name, t in [*self.weights.named_parameters(), *self.weights.named_buffers()]:
            t.copy_(tensors[f"shadow/{name}"])
        for entry, value in tensors.items():
            if entry.startswith("moments/"):
                _, number, key = entry.split("/")
                self.score_optimizer.state[self.scores[int(number)]][key] = value.clone()
