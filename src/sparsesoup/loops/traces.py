"""Blocks after which a foreign loop finds everything as it was."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from sparsesoup.core.rng import fork_rng_of
from sparsesoup.loops.problem import LoopProblem


@contextmanager
def without_trace(problem: LoopProblem, model: nn.Module) -> Iterator[None]:
    """Keep modes, gradients and random states of the process; the block may change weights and masks."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [p for group in problem.optimizer.param_groups for p in group["params"]]
    grads = [(p, p.grad) for p in {*trained, *model.parameters(), *problem.pretrained.parameters()}]
    states = random.getstate(), np.random.get_state()
    try:
        for parameter, _ in grads:
            parameter.grad = None
        with fork_rng_of(parameter for parameter, _ in grads), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, mode in modes:
            module.training = mode
        for parameter, grad in grads:
            parameter.grad = grad


@contextmanager
def untouched_weights(problem: LoopProblem) -> Iterator[None]:
    """Keep the prunable weights and all moments, for the start of a method whose run is at a later step."""
    params = dict(problem.pretrained.named_parameters())
    before = {name: p.detach().clone() for name, p in params.items() if name in problem.targets}
    moments = {
        p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in slot.items()}
        for p, slot in problem.optimizer.state.items()
    }
    yield
    with torch.no_grad():
        for name, weight in before.items():
            params[name].copy_(weight)
    problem.optimizer.state.update(moments)
