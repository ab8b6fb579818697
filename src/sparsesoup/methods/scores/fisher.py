"""Diagonal of the empirical Fisher information, averaged over the steps of a training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsesoup.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class FisherAverage:
    """Moving average F of the squared gradient of every weight; w^2 F is the score. LeCun et al. 1990, eq. 5.

    F = decay F + (1 - decay) g^2 after each step, in the state's memory: one tensor per weight. It starts at 0 for all
    weights, so the ranking equals that of an unbiased average.

    Args:
        decay: decay of the average in a step.
    """

    decay: float

    @torch.no_grad()
    def observe_gradients(self, state: TrainState) -> None:
        """Observe the gradients of a step: a hook of `train`."""
        for name, weight in state.prunable_parameters().items():
            if (key := f"fisher/{name}") not in state.memory:
                state.memory[key] = torch.zeros_like(weight)
            average = state.memory[key].mul_(self.decay)
            if weight.grad is not None:
                average.addcmul_(weight.grad, weight.grad, value=1 - self.decay)

    def scores(self, state: TrainState) -> dict[str, Tensor]:
        """Return w^2 F of every weight: twice the loss that its removal adds, to second order."""
        weights = state.prunable_parameters()
        return {name: w.detach().square() * state.memory[f"fisher/{name}"] for name, w in weights.items()}

    def clear_(self, state: TrainState) -> None:
        """Remove the averages from the memory."""
        for name in state.targets:
            state.memory.pop(f"fisher/{name}", None)
