"""Gates in groups: the bits of gates that each have their own group, in a fraction of the operations."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from conftest import tiny
from sparsesoup.core.granularity import CoupledGroups, Element
from sparsesoup.methods import METHODS
from sparsesoup.methods.gates import score_groups
from sparsesoup.methods.gates.attach import attach_gates, gates_of
from sparsesoup.methods.gates.hard_concrete import SHIFT, HardConcrete, SharedNoise, logistic_noise
from sparsesoup.methods.gates.score_samples import median_score, weighted_quantiles
from sparsesoup.methods.gates.straight_through import StraightThroughGate

KINDS = ("hard concrete", "straight-through")
SIZES = [(8, 8), (16, 8), (8, 16)] * 4


class Chain(nn.Module):
    """Twelve layers of three shapes, with dropout between, whose draws interleave with those of the gates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, height) for height, width in SIZES)

    def forward(self, x: Tensor, leave_out: int = -1, lost: int = -1, again: bool = False) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number == leave_out:
                continue
            x = torch.cat([x, x], 1)[:, : SIZES[number][1]]
            y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
            if number != lost:  # its output does not reach the loss
                x = nn.functional.dropout(y.tanh(), 0.2)
        return x


def gated_chain(kind: str) -> Chain:
    model, draw = Chain(), torch.Generator().manual_seed(1)
    noise = SharedNoise(logistic_noise(5000, draw))

    def make(number: int, place: int, tie: CoupledGroups) -> nn.Module:
        score = Parameter(torch.randn(SIZES[number], generator=draw))
        return (
            HardConcrete(score, noise, number)
            if kind == KINDS[0]
            else StraightThroughGate(score, Element, number, 0, SHIFT)
        )

    attach_gates(model, tuple(CoupledGroups(((f"layers.{i}.weight", Element),)) for i in range(len(SIZES))), make)
    for _, gate in gates_of(model):
        gate.level.fill_(0.1)
    return model


def gradients(model: Chain, passes: list[dict[str, Any]], penalty: bool) -> list[Tensor]:
    """Return outputs, shares and all gradients of a few passes, whose gradients add up, and the next random number."""
    torch.manual_seed(2)
    found, x = [], torch.randn(5, 8)
    for settings in passes:
        out = model(x, **settings)
        loss = out.square().sum()
        shares = [gate.share for _, gate in gates_of(model) if gate.share is not None] if penalty else []
        for number, share in enumerate(shares):
            loss = loss + (number + 1) * share
        loss.backward()
        for _, gate in gates_of(model):
            gate.opened = None
        found += [out.detach(), *(share.detach() for share in shares)]
    found += [p.grad if p.grad is not None else torch.full((), torch.nan) for p in model.parameters()]
    return [*found, torch.rand(())]


CASES: dict[str, list[dict[str, Any]]] = {
    "one pass": [{}],
    "passes whose gradients add up": [{}, {}],
    "a layer left out, then used": [{"leave_out": 3}, {}, {"leave_out": 0}],
    "a layer that does not reach the loss": [{"lost": 5}],
    "computed again in the backward pass": [{"again": True}, {"again": True}],
}


@pytest.mark.parametrize("penalty", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_group_computes_the_bits_of_gates_alone(kind: str, case: str, penalty: bool, monkeypatch: Any) -> None:
    together = gradients(gated_chain(kind), CASES[case], penalty)
    monkeypatch.setattr(score_groups, "SMALL", 0)
    alone = gradients(gated_chain(kind), CASES[case], penalty)
    assert len(together) == len(alone)
    assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_without_gradients_is_not_continued_by_one_with_gradients(kind: str) -> None:
    model = gated_chain(kind)
    with torch.no_grad():
        model(torch.ones(2, 8), leave_out=4)
    model(torch.ones(2, 8)).sum().backward()
    assert all(gate.score is not None and gate.score.grad is not None for _, gate in gates_of(model))


def test_a_model_is_copied_between_a_pass_and_its_penalty() -> None:
    model = gated_chain(KINDS[0])
    model(torch.ones(2, 8))
    twin = copy.deepcopy(model)
    twin(torch.ones(2, 8)).sum().backward()
    assert all(gate.score is not None and gate.score.grad is not None for _, gate in gates_of(twin))
    assert all(gate.score is not None and gate.score.grad is None for _, gate in gates_of(model))


class Operations(TorchDispatchMode):
    """Count the operations of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return function(*args, **(kwargs or {}))


def operations(work: Callable[[], Any]) -> int:
    with Operations() as seen:
        work()
    return seen.number


@pytest.mark.parametrize(("kind", "most"), [(KINDS[0], 20), (KINDS[1], 16)])
def test_a_gate_adds_few_operations_to_a_pass(kind: str, most: int) -> None:
    """Each on its own, a hard concrete gate takes 30 and a penalised straight-through one 22."""
    plain, model = Chain(), gated_chain(kind)

    def step(net: Chain) -> None:
        loss = net(torch.ones(5, 8)).sum()
        gates = [gate for _, gate in gates_of(net)]
        (loss + score_groups.shares_of(gates).sum() if gates else loss).backward()

    counts = [operations(lambda net=net: step(net)) for net in (plain, model)]
    assert (counts[1] - counts[0]) / len(SIZES) <= most


@pytest.mark.parametrize(("name", "most"), [("l0", 53), ("soft-movement", 60)])
def test_the_controller_computes_many_scores_at_once(name: str, most: int) -> None:
    problem = tiny()
    run = METHODS[name].start_run(problem, 0.5)
    run.state.step = problem.steps // 2
    run.own.hook(run.state)
    found = operations(lambda: run.own.hook(run.state))
    assert found <= most


def test_weighted_quantiles_are_those_of_a_sort() -> None:
    draw = torch.Generator().manual_seed(3)
    for case in range(30):
        lengths = torch.randint(1, 400, (7,), generator=draw).tolist()
        weights = (torch.rand(7, generator=draw) * 90).tolist() if case % 3 else [2.5] * 7
        scores = torch.randn(sum(lengths), generator=draw) * (1e-5 if case % 2 else 3.0) + (2.0 if case % 2 else 0.0)
        scores = (scores * 4).round() if case % 5 == 0 else scores
        each = torch.tensor(weights).repeat_interleave(torch.tensor(lengths))
        values, order = scores.sort(stable=True)
        below = each.double()[order].cumsum(0).float()
        shares = [0.0, 0.2, 0.5, 0.9, 1.0]
        wanted = [float(values[min(int((below < share * below[-1]).sum()), len(values) - 1)]) for share in shares]
        assert weighted_quantiles(scores, weights, lengths, shares) == wanted
        assert median_score(scores) == float(scores.median())


def test_groups_are_runs_of_small_gates() -> None:
    found = Counter(len(gate.group.gates) for _, gate in gates_of(gated_chain(KINDS[0])) if gate.group)
    assert found == {12: 12}


def test_a_gate_whose_last_scores_fill_no_register_is_in_a_group_of_its_own() -> None:
    """They would be rounded otherwise at another position of a longer tensor."""
    noise = SharedNoise(torch.zeros(500))
    gates = [HardConcrete(Parameter(torch.zeros(shape)), noise, 0) for shape in [(8, 8), (20, 20), (8, 8), (8, 16)]]
    score_groups.group_gates(gates)
    assert [len(gate.group.gates) for gate in gates if gate.group] == [1, 1, 2, 2]
