"""Layers that are narrower than their class makes them: the modules, their widths, and how to cut parts out."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class NarrowLinear(nn.Module):
    """A linear layer that reads some of its inputs, and has weights for some of its outputs; the others are constant.

    Attention heads of unequal widths become as wide as the widest that way, by zeros, which change no product; outputs
    added to a residual stay in their places.

    Args:
        weight: [outputs with weights, inputs that are read].
        bias: of the outputs with weights, or of all.
        inputs: inputs that are read, bool [inputs].
        outputs: outputs that have weights, bool [outputs].
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, inputs: Tensor, outputs: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.in_features, self.out_features = len(inputs), len(outputs)
        self.inputs, self.outputs = inputs.nonzero().flatten(), outputs.nonzero().flatten()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        if len(self.inputs) < self.in_features:
            x = x.index_select(-1, self.inputs.to(x.device))
        own = self.bias is not None and len(self.bias) == len(self.outputs)
        if not len(self.outputs):  # OpenVINO takes a matrix without rows for a scalar, and refuses the product
            nothing = x.new_zeros((*x.shape[:-1], self.out_features))
            return nothing if own or self.bias is None else nothing + self.bias
        y = functional.linear(x, self.weight, self.bias if own else None)
        if len(self.outputs) < self.out_features:
            whole = y.new_zeros((*y.shape[:-1], self.out_features))
            y = whole.index_copy(-1, self.outputs.to(y.device), y)
        return y if own or self.bias is None else y + self.bias


class EmptyOutputLinear(nn.Module):
    """A linear layer [features -> 0] without outputs.

    It keeps its empty weight, so that a stock class refuses the checkpoint instead of initialising new weights.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., features] to [..., 0]."""
        return x[..., :0]


class BiasOnly(EmptyOutputLinear):
    """A linear layer [0 -> features] without inputs: only its bias remains."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., 0] to [..., features]."""
        shape = (*x.shape[:-1], len(self.weight))
        return x.new_zeros(shape) if self.bias is None else self.bias.expand(shape)


class NoHeads(nn.Module):
    """An attention without heads, which not all fused kernels support; it keeps its parts under their names."""

    def __init__(self, core: nn.Module, parts: Mapping[str, str], head_size: int) -> None:
        super().__init__()
        for name, child in core.named_children():
            self.add_module(name, child)
        self.head_dim = head_size
        # In BERT the output layer is beside the core, elsewhere inside it.
        output = parts["output"].removeprefix(f"{parts['core']}.")
        self.path = "" if output == parts["output"] else output

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Map [batch, length, hidden] to the output layer's bias, or to no features if that layer is outside."""
        nothing = hidden_states[..., :0]
        return (self.get_submodule(self.path)(nothing) if self.path else nothing), None


def used_outputs(linear: Any) -> Tensor:
    """Return the outputs of a linear layer that have weights, bool [outputs], on the CPU."""
    if not isinstance(linear, NarrowLinear):
        return torch.ones(len(linear.weight), dtype=torch.bool, device="cpu")
    return torch.zeros(linear.out_features, dtype=torch.bool, device="cpu").index_fill(0, linear.outputs, True)


def full_weight(linear: Any) -> Tensor:
    """Return the weight [outputs, inputs] of a linear layer, zero where a narrow one has none."""
    weight: Tensor = linear.weight.detach()
    if not isinstance(linear, NarrowLinear):
        return weight
    rows, columns = linear.outputs.to(weight.device), linear.inputs.to(weight.device)
    wide = weight.new_zeros(len(weight), linear.in_features).index_copy(1, columns, weight)
    return weight.new_zeros(linear.out_features, linear.in_features).index_copy(0, rows, wide)


def full_bias(linear: Any) -> Tensor | None:
    """Return the bias [outputs] of a linear layer, zero where a narrow one has none; None without a bias."""
    if linear.bias is None:
        return None
    bias: Tensor = linear.bias.detach()
    if not isinstance(linear, NarrowLinear) or len(bias) == linear.out_features:
        return bias
    return bias.new_zeros(linear.out_features).index_copy(0, linear.outputs.to(bias.device), bias)


def narrow_linear(
    linear: Any, rows: Tensor, columns: Tensor, outputs: Tensor | None = None, inputs: Tensor | None = None
) -> nn.Module:
    """Return a linear layer with some rows and columns of the full weight of another.

    Args:
        rows, columns: those to keep, bool.
        outputs: outputs of the new layer, True where one of the rows goes, in their order, and the bias with it; by
            default a row stays in its place, and all biases stay.
        inputs: inputs of the new layer, True where one of the columns reads; default: those that stay.
    """
    weight, bias, learned = full_weight(linear), full_bias(linear), linear.weight.requires_grad
    at, across = (index.nonzero().flatten().to(weight.device) for index in (rows, columns))
    # Contiguous: safetensors refuses views of larger tensors.
    new = nn.Parameter(weight.index_select(0, at).index_select(1, across).contiguous(), learned)
    if bias is not None:
        chosen = bias if outputs is None else bias.index_select(0, at)
        bias = nn.Parameter(chosen.clone(), linear.bias.requires_grad)
    outputs = rows if outputs is None else outputs
    inputs = torch.ones_like(columns[columns]) if inputs is None else inputs
    if not len(at) and not len(outputs):
        return EmptyOutputLinear(new, bias)
    if not len(across):
        return BiasOnly(new, bias)
    if not (bool(inputs.all()) and bool(outputs.all())):
        return NarrowLinear(new, bias, inputs, outputs)
    made = nn.Linear(len(inputs), len(outputs), bias=False, device="meta")
    made.weight = new
    made.register_parameter("bias", bias)
    return made.train(linear.training)
