"""Hard concrete gate (Louizos et al. 2018): stochastic during training, replaced by its mean at the end."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsesoup.core.granularity import Element
from sparsesoup.methods.gates.score_groups import KeptTensors
from sparsesoup.methods.gates.straight_through import StraightThroughGate

LOW, HIGH = -0.1, 1.1  # the stretched interval of the concrete distribution
BETA = 2 / 3
START = 2.197  # logit of 0.9
CLOSED_LOGIT = math.log(-LOW / HIGH)  # below this score the deterministic gate is 0
SHIFT = BETA * math.log(-LOW / HIGH)  # a gate is open with probability sigmoid(score - SHIFT)


class SharedNoise:
    """Noise that all gates of a model share; no buffer, since it is derived from the seed. It moves once, with them."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def on(self, device: torch.device) -> Tensor:
        """Return the noise on a device."""
        if self.values.device != device:
            self.values = self.values.to(device)
        return self.values


class HardConcrete(StraightThroughGate):
    """z = clamp(sigmoid((log u - log(1 - u) + score) / beta) (1.2) - 0.1, 0, 1). Louizos et al. 2018, eq. 10 to 12.

    Args:
        score: log alpha of each weight, [out, in].
        noise: logistic noise over beta, at least as long as the weight; each forward pass uses a random section of it,
            since sampling ten million logits at every step would cost a third of the step.
        coupled: index of the coupled groups in the model.
    """

    def __init__(self, score: Parameter, noise: "Tensor | SharedNoise", coupled: int) -> None:
        super().__init__(score, Element, coupled, 0, SHIFT)
        self.level.fill_(CLOSED_LOGIT)
        self.noise = noise if isinstance(noise, SharedNoise) else SharedNoise(noise)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight times its gate: random in training, else at the median of the noise."""
        if not self.training:
            return weight * self.mean_gate(weight)
        assert self.score is not None
        noise, score = self.noise.on(weight.device), self.score
        start = int(torch.randint(len(noise) - weight.numel() + 1, ()))
        section = noise.as_strided(score.shape, score.stride(), start)
        now = self.join_pass()
        product: Tensor = HardConcreteFunction.apply(weight, now.anchor, section, now.kept, self.index)
        return product

    @staticmethod
    def task_gradient(*kept: Tensor) -> Tensor:
        """Return dL/dS = dL/dW' W dz/dS, which is 0 where z is clamped."""
        weight, gate, grad = kept
        # With s = (z - LOW) / 1.2: dz/dS = 1.2 s (1 - s) / beta = (z (1 - z) + 0.11) / (1.2 beta) inside, 0 at 0 and 1.
        slope = torch.addcmul(gate, gate, gate, value=-1)
        return slope.add_(slope.sign(), alpha=-LOW * HIGH).mul_(weight).mul_(grad / ((HIGH - LOW) * BETA))

    def mean_gate(self, weight: Tensor) -> Tensor:
        """clamp(1.2 sigmoid(score) - 0.1, 0, 1). Louizos et al. 2018, eq. 13; it is not binary."""
        assert self.score is not None
        return (self.score.detach().sigmoid() * (HIGH - LOW) + LOW).clamp_(0, 1)


class HardConcreteFunction(torch.autograd.Function):
    """W' = W z; backward: dL/dW = dL/dW' z; the gradient of the scores is that of their group."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, anchor: Tensor, noise: Tensor, kept: KeptTensors, index: int) -> Tensor:
        gate = torch.add(noise, kept.scores[index], alpha=1 / BETA)
        gate.sigmoid_().mul_(HIGH - LOW).add_(LOW).clamp_(0, 1)
        ctx.kept, ctx.index = kept, index
        ctx.save_for_backward(weight, gate)
        return weight * gate

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad, (weight, gate), kept = grads[0], ctx.saved_tensors, ctx.kept
        kept.keep(ctx.index, weight, gate, grad)
        return gate.mul_(grad) if kept.alone else gate * grad, None, None, None, None


def logistic_noise(length: int, draw: torch.Generator) -> Tensor:
    """Return (log u - log(1 - u)) / beta for uniform u."""
    uniform = torch.rand(length, generator=draw).clamp_(1e-6, 1 - 1e-6)
    return uniform.logit_().div_(BETA)
