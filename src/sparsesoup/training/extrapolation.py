"""Extrapolation: the gradient of a step is taken at a point moved along the gradient of the step before."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparsesoup.training.state import TrainState

FORMER = "former_gradient"  # beside the moments of a parameter: masked, saved, rewound and reset with them


@contextmanager
def extrapolated_weights(state: TrainState, extrapolate: float) -> Iterator[None]:
    """Move the weights to w - extrapolate * rate * (gradient of the step before) within the block; 0 moves none.

    Lin et al. 2020 (Extrapolation for large-batch training). Afterwards the weights are what they were, to the bit,
    also after an error. `rate` is the learning rate of the optimizer's group. Pruned weights stay at zero.
    """
    before = []
    with torch.no_grad():
        for group in state.optimizer.param_groups if extrapolate else ():
            for p in group["params"]:
                former = state.optimizer.state.get(p, {}).get(FORMER)
                if p.requires_grad and former is not None:
                    before.append((p, p.detach().clone()))
                    p.add_(former, alpha=-extrapolate * group["lr"])
    try:
        yield
    finally:
        with torch.no_grad():
            for p, weights in before:
                p.copy_(weights)


def keep_gradients_(state: TrainState) -> None:
    """Keep the gradients of a step for the extrapolation of the next one; call it after the optimizer's step."""
    for group in state.optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                state.optimizer.state[p][FORMER] = p.grad.detach()
            elif p in state.optimizer.state:
                state.optimizer.state[p].pop(FORMER, None)
