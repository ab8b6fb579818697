"""Cost tracking: steps, examples, tokens, FLOPs and seconds of a run, by label."""

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

LABELS = {  # of the cost -> (name, meaning)
    "main": ("main training", "training of the final model"),
    "weak": ("weak-mask runs", "short trainings that each give a weak mask or model"),
    "search": ("mask search", "trainings before the one that gave the result, such as the rounds of IMP"),
    "score": ("scoring", "passes over training rows to score weights"),
    "teacher": ("teacher", "training of the dense teacher, done once and counted in every run that uses it"),
    "evaluation": ("validation curve", "scores during the main training (train.eval_steps)"),
    "validation": ("validation", "model selection and final score"),
}


def label_name(label: str) -> str:
    """Return the name of a label of the cost.

    >>> label_name("main"), label_name("other")
    ('main training', 'other')
    """
    return LABELS[label][0] if label in LABELS else label


@dataclass
class Cost:
    """Cost of a training or an evaluation.

    Args:
        steps: optimizer steps.
        examples: rows passed through the model.
        tokens: tokens computed, padding included.
        padding: padding tokens among them.
        flops: floating-point operations of the dense model (2 for a multiply-add).
        seconds: wall-clock time.
        shared: steps reused from another run.
    """

    steps: int = 0
    examples: int = 0
    tokens: int = 0
    padding: int = 0
    flops: int = 0
    seconds: float = 0.0
    shared: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


class CostTracker:
    """Costs by label: main (training that leads to the final model), weak, search, score, teacher, validation."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}
        self._flops: dict[tuple[object, ...], int] = {}

    def add_cost(self, label: str, cost: Cost) -> None:
        """Add a cost to a label."""
        self.costs[label] = self.costs.get(label, Cost()) + cost

    def total_cost(self) -> Cost:
        """Return the sum of all costs."""
        return sum(self.costs.values(), Cost())

    def run_and_count_flops(self, shape: tuple[object, ...], work: Callable[[], Any]) -> tuple[Any, int]:
        """Return (result of `work`, its FLOPs); counted once per shape, since FLOPs depend on nothing else."""
        if shape in self._flops:
            return work(), self._flops[shape]
        # Compiled code hides its products; what has not been compiled spares the seconds of importing the compiler.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        with CountFlops() as count, eager:
            result = work()
        self._flops[shape] = count.flops
        return result, count.flops

    def to_json(self) -> dict[str, dict[str, float]]:
        """Return the costs as plain numbers, by label."""
        return {label: asdict(cost) for label, cost in self.costs.items()}

    def restore(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace the costs by those of `to_json`."""
        self.costs = {label: Cost(**cost) for label, cost in saved.items()}


class CountFlops(TorchDispatchMode):
    """Count the FLOPs of every matrix product, convolution and attention in the block.

    Uses torch's formulas, except for fused attention: on CPU torch 2.13 counts none for it, and the fused backward pass
    is counted with its recomputation. Ours equals the cost of the unfused products.

    >>> with CountFlops() as count:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
    >>> count.flops
    60
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        name = packet.__name__
        if name.startswith("_scaled_dot_product_") and name.endswith("_backward"):
            self.flops += 2 * _attention_flops(*args[1:4])
        elif name.startswith("_scaled_dot_product_"):
            self.flops += _attention_flops(*args[:3])
        elif name == "_native_multi_head_attention":
            self.flops += _whole_attention(args[0])
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def is_counted_op(packet: Any) -> bool:
    """Return True for operations with counted FLOPs: matrix products, convolutions, attention."""
    name = packet.__name__
    return packet in flop_registry or name.startswith("_scaled_dot_product_") or name == "_native_multi_head_attention"


def _whole_attention(rows: torch.Tensor) -> int:
    """FLOPs of nn.MultiheadAttention fused for inference, [rows, length, width], with its projections."""
    # The heads together are as wide as the rows, whatever their number.
    return 8 * rows.numel() * rows.shape[-1] + _attention_flops(rows, rows, rows)


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """FLOPs of Q K^T and P V, [..., length, width] each: 2 multiply-adds for every query, key and width."""
    *batch, queries, width = query.shape
    keys, out = key.shape[-2], value.shape[-1]
    count = 1
    for side in batch:
        count *= side
    return 2 * count * queries * keys * (width + out)
