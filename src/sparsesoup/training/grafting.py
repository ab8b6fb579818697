"""Grafting: blocks of a teacher compute instead of the student's. Huang et al. 2022, after Xu et al. 2020."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.func import functional_call


@contextmanager
def grafted_blocks(student: nn.Module, teacher: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Replace the student's blocks of these names by the teacher's while a model runs in this block.

    Their weights are not trained, nor are the student's own of these blocks. A gradient is computed for them all the
    same, and dropped: so a step costs the same whichever blocks are sampled, and a plan can say how much.

    >>> student, teacher = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Identity())
    >>> with grafted_blocks(student, teacher, ["0"]):
    ...     student(nn.Parameter(1 + student[0].bias.detach() * 0)).tolist()
    [1.0, 1.0]
    """
    before: list[tuple[nn.Module, Any]] = []
    try:
        for name in names:
            block = student.get_submodule(name)
            before.append((block, vars(block).get("forward")))
            vars(block)["forward"] = _forward_of(teacher.get_submodule(name), block)
        yield
    finally:
        for block, forward in before:
            if forward is None:
                vars(block).pop("forward")
            else:
                vars(block)["forward"] = forward


def _forward_of(block: nn.Module, replaced: nn.Module) -> Any:
    trained = any(p.requires_grad for p in replaced.parameters())

    def forward(*inputs: Any, **named: Any) -> Any:
        weights = {name: p.detach().requires_grad_(trained) for name, p in block.named_parameters()}
        return functional_call(block, weights, inputs, named)

    return forward
