"""Moving averages of a sensitivity and of its uncertainty."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsesoup.training.state import TrainState

Sensitivity = Callable[[Tensor, Tensor, float], Tensor]  # (weight, gradient, learning rate) -> cost of removing it


def first_order_sensitivity(weight: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Return |g w|: the first-order change of the loss if the weight is set to zero. Zhang et al. 2022.

    >>> first_order_sensitivity(torch.tensor([2.0, -1.0]), torch.tensor([-0.5, 0.0]), 0.1).tolist()
    [1.0, 0.0]
    """
    return (weight * gradient).abs_()


def after_step(weight: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Return |g (w - rate g)|: the same for the weight after a plain gradient step. Ren & Zhu 2023, in its code.

    >>> after_step(torch.tensor([2.0]), torch.tensor([-0.5]), 2.0).tolist()
    [1.5]
    """
    return torch.sub(weight, gradient, alpha=rate).mul_(gradient).abs_()


@dataclass(frozen=True, kw_only=True)
class ImportanceAverages:
    """Averages I and U of every weight over the observed steps; their product is the score. Zhang et al. 2022.

    At the end of each window, with s the mean sensitivity of its steps: I = fast I + (1 - fast) s, then
    U = slow U + (1 - slow) |s - I|. Both start at 0 for all weights, so the ranking equals that of unbiased averages.
    They are stored in the state's memory: two tensors per weight, and a third while a window is open.

    Args:
        sensitivity: sensitivity of a weight in one step.
        fast: decay of I.
        slow: decay of U.
        window: steps averaged into one observation.
        origin: a step at which a window ends; others end every `window` steps before and after it.
    """

    sensitivity: Sensitivity
    fast: float
    slow: float
    window: int
    origin: int

    @torch.no_grad()
    def observe_gradients(self, state: TrainState) -> None:
        """Observe the gradients of a step: a hook of `train`."""
        ends, rate = (state.step + 1 - self.origin) % self.window == 0, float(state.optimizer.param_groups[0]["lr"])
        for name, weight in state.prunable_parameters().items():
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            now = self.sensitivity(weight, gradient, rate)
            earlier = state.memory.get(f"open/{name}")
            if earlier is not None:
                now = earlier.add_(now)
            if ends:
                self._close_window(state, name, now.div_(min(self.window, state.step + 1)))
            else:
                state.memory[f"open/{name}"] = now

    def _close_window(self, state: TrainState, name: str, mean: Tensor) -> None:
        state.memory.pop(f"open/{name}", None)
        for what in ("importance", "uncertainty"):
            state.memory.setdefault(f"{what}/{name}", torch.zeros_like(mean))
        importance = state.memory[f"importance/{name}"].lerp_(mean, 1 - self.fast)
        state.memory[f"uncertainty/{name}"].lerp_(mean.sub_(importance).abs_(), 1 - self.slow)

    def current_scores(self, state: TrainState) -> dict[str, Tensor]:
        """Return I U of every weight, as of the last complete window."""
        return {n: state.memory[f"importance/{n}"] * state.memory[f"uncertainty/{n}"] for n in state.targets}

    def clear_averages_(self, state: TrainState) -> None:
        """Remove the averages from the memory."""
        for key in [k for k in state.memory if k.startswith(("open/", "importance/", "uncertainty/"))]:
            del state.memory[key]
