"""Gates by other roads: hand-written masks and gradients, draws of the noise, formulas left to autograd."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from conftest import tiny
from sparsesoup.core.granularity import Block, Column, CoupledGroups, Element, Row
from sparsesoup.core.groups import block_groups
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import count_kept
from sparsesoup.methods import METHODS
from sparsesoup.methods.gates.attach import (
    attach_gates,
    detach_gates_,
    fold_gates_,
    gates_of,
    underlying_weight,
    weight_scores,
)
from sparsesoup.methods.gates.density import group_sizes, masked_share, set_thresholds_
from sparsesoup.methods.gates.hard_concrete import CLOSED_LOGIT, SHIFT, HardConcrete, SharedNoise, logistic_noise
from sparsesoup.methods.gates.straight_through import StraightThroughGate
from sparsesoup.methods.learned_masks import initial_scores, straight_through_gates
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState

EXACT = {"dtype": torch.float64}


class Pair(nn.Module):
    """tanh(x W1' + b) W2', all of it in double precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 4, **EXACT)
        self.second = nn.Linear(4, 6, bias=False, **EXACT)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def group_of(shape: Sequence[int], block: Block) -> Tensor:
    """The number of the group of each weight, counted out one by one."""
    rows, cols = block.rows or shape[0], block.cols or shape[1]
    return torch.tensor(
        [[i // rows * (shape[1] // cols) + j // cols for j in range(shape[1])] for i in range(shape[0])]
    )


def gradients_by_hand(model: Pair, masks: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """dL/dW' of a net written out: its effective weights are leaves."""
    leaf = {n: (p.detach() * masks.get(n, torch.ones_like(p))).requires_grad_() for n, p in model.named_parameters()}
    hid = (x @ leaf["first.weight"].T + leaf["first.bias"]).tanh()
    (hid @ leaf["second.weight"].T).square().sum().backward()
    return {n: t.grad for n, t in leaf.items() if t.grad is not None}


def gradients_of_gates(model: Pair, x: Tensor) -> None:
    model(x).square().sum().backward()


def check_identities(model: Pair, tie: CoupledGroups, score: Parameter, level: float, x: Tensor) -> None:
    """dL/dS = the sum of dL/dW' * W over a group, masked or not; dL/dW = dL/dW' * M."""
    own = score.dim() == 2 and len(tie.members) > 1
    open_ = (score.detach() >= level).any(0) if own else (score.detach() >= level).flatten()
    assert open_.any()
    assert not open_.all()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    place = {n: group_of(weights[n].shape, block) for n, block in tie.members}
    masks = {n: open_[numbers] for n, numbers in place.items()}
    leaf = gradients_by_hand(model, masks, x)
    attach_gates(model, (tie,), straight_through_gates([score]))
    for _, gate in gates_of(model):
        gate.level.fill_(level)
    gradients_of_gates(model, x)
    parts = {n: torch.zeros(len(open_), **EXACT) for n in place}
    for n, numbers in place.items():
        parts[n].index_add_(0, numbers.flatten(), (leaf[n] * weights[n]).flatten())
        found = underlying_weight(model, n).grad
        assert found is not None
        assert found.allclose(leaf[n] * masks[n], rtol=1e-12)
    wanted = torch.stack(list(parts.values())) if own else torch.stack(list(parts.values())).sum(0)
    assert score.grad is not None
    assert score.grad.allclose(wanted.view(score.shape), rtol=1e-12)
    if len(tie.members) == 1:  # a unit that is masked whole says nothing, and nothing reaches it
        assert score.grad.flatten()[~open_].all()


@pytest.mark.parametrize("block", [Element, Block(2, 3), Block(4, 2), Row, Column])
def test_both_straight_through_identities_hold(block: Block) -> None:
    model, tie = Pair(), CoupledGroups((("first.weight", block),))
    shape = (4, 6) if block == Element else (tie.num_groups({"first.weight": (4, 6)}),)
    draw = torch.Generator().manual_seed(1)
    ranks = torch.randperm(math.prod(shape), generator=draw).double() - math.prod(shape) // 2
    score = Parameter(ranks.view(shape))
    check_identities(model, tie, score, 0.0, torch.randn(5, 6, generator=draw, dtype=torch.float64))


def test_a_unit_learns_from_its_row_and_its_column_together() -> None:
    tie = CoupledGroups((("first.weight", Row), ("second.weight", Column)))
    score = Parameter(torch.tensor([0.3, -0.2, 0.1, -0.4], **EXACT))
    check_identities(Pair(), tie, score, 0.0, torch.randn(5, 6, **EXACT))


def test_with_scores_of_their_own_members_learn_apart_and_any_of_them_opens_the_group() -> None:
    tie = CoupledGroups((("first.weight", Block(2, 0)), ("second.weight", Block(0, 2))))
    score = Parameter(torch.tensor([[0.3, -0.2], [-0.1, -0.4]], **EXACT))
    model = Pair()
    check_identities(model, tie, score, 0.0, torch.randn(5, 6, **EXACT))
    assert model.first.weight[:2].all()
    assert model.second.weight[:, :2].all()  # its own score says no
    assert not model.first.weight[2:].any()
    assert not model.second.weight[:, 2:].any()
    for n, gate in gates_of(model):  # trimming ranks a group by the member that wants it most
        assert gate.group_scores(underlying_weight(model, n)).tolist() == [0.3, -0.2]


def test_by_magnitude_a_masked_weight_gets_no_gradient_and_stays_behind_its_mask() -> None:
    model, x = Pair(), torch.randn(5, 6, **EXACT)
    plain = model.first.weight.detach().clone()
    open_ = plain.abs() >= 0.2
    assert 5 < int(open_.sum()) < 19
    leaf = gradients_by_hand(model, {"first.weight": open_}, x)
    assert attach_gates(model, (CoupledGroups((("first.weight", Element),)),), straight_through_gates([None])) == []
    for _, gate in gates_of(model):
        gate.level.fill_(0.2)
    gradients_of_gates(model, x)
    weight = underlying_weight(model, "first.weight")
    assert weight.equal(plain)
    assert model.first.weight.detach().equal(plain * open_)
    assert weight.grad is not None
    assert weight.grad.allclose(leaf["first.weight"] * open_, rtol=1e-12)
    assert not weight.grad[~open_].any()


def logits(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_gradient_of_a_hard_concrete_gate_is_that_of_its_formula() -> None:
    weight, score, noise = logits(0, 30, 20).requires_grad_(), Parameter(logits(1, 30, 20)), logits(2, 600)
    direction = logits(3, 30, 20)
    (HardConcrete(score, noise / (2 / 3), 0).train()(weight) * direction).sum().backward()
    own, leaf = weight.detach().clone().requires_grad_(), score.detach().clone().requires_grad_()
    soft = ((noise.view(30, 20) + leaf) / (2 / 3)).sigmoid() * 1.2 - 0.1
    z = soft.clamp(0, 1)
    assert 50 < int((z == 0).sum()) < 500
    assert 50 < int((z == 1).sum()) < 500
    (own * z * direction).sum().backward()
    assert weight.grad is not None
    assert weight.grad.allclose(own.grad, rtol=1e-10)
    assert score.grad is not None
    assert score.grad.allclose(leaf.grad, rtol=1e-8, atol=1e-12)
    assert not score.grad[(z == 0) | (z == 1)].any()


@pytest.mark.parametrize("score", [-3.0, -1.0, 0.0, 1.5, 2.197, 4.0])
def test_the_expected_share_of_open_gates_is_that_of_many_draws(score: float) -> None:
    ones = torch.ones(200, 200)
    noise = logistic_noise(1 << 20, torch.Generator().manual_seed(4))
    torch.manual_seed(5)
    gate = HardConcrete(Parameter(torch.full_like(ones, score)), noise, 0).train()
    share = float((gate(ones) > 0).float().mean())
    assert share == pytest.approx(1 / (1 + math.exp(SHIFT - score)), abs=0.01)
    assert 0 < share < 1


def test_all_gates_share_the_one_copy_of_their_noise_that_moved_to_the_device() -> None:
    noise = SharedNoise(logistic_noise(5000, torch.Generator().manual_seed(6)))
    gates = [HardConcrete(Parameter(torch.ones(3, 4)), noise, i) for i in range(3)]
    there = {id(gate.noise.on(torch.device("meta"))) for gate in gates}
    assert len(there) == 1
    assert noise.values.device.type == "meta"


def test_gates_are_found_anew_when_they_are_attached_and_detached() -> None:
    problem = tiny()
    run = METHODS["l0"].start_run(problem, 0.5)
    assert len(list(gates_of(run.state.model))) == 3
    assert len(list(gates_of(copy.deepcopy(run.state.model)))) == 3
    detach_gates_(run.state)
    assert not list(gates_of(run.state.model))


def test_evaluated_a_hard_concrete_gate_is_its_scale_and_nothing_random() -> None:
    weight, score = logits(0, 30, 20).float(), Parameter(logits(1, 30, 20).float())
    gate = HardConcrete(score, logistic_noise(5000, torch.Generator().manual_seed(6)), 0)
    assert not gate.train()(weight).equal(gate(weight))  # each forward pass has its own noise
    gate.eval()
    wanted = (score.detach().sigmoid() * 1.2 - 0.1).clamp(0, 1)
    assert gate(weight).equal(gate(weight))
    assert gate(weight).detach().allclose(weight * wanted)
    assert ((gate.mean_gate(weight) > 0) == (score > CLOSED_LOGIT)).all()
    assert 0 < int((gate.mean_gate(weight) == 0).sum()) < 600
    assert "noise" not in gate.state_dict()


def gated(problem: Problem, hard: bool = False) -> TrainState:
    """A run at its beginning, a gate with random scores on every weight."""
    ties = block_groups(problem.targets, Element)
    learnt = initial_scores(problem, ties)
    for number, score in enumerate(learnt):
        assert score is not None
        with torch.no_grad():
            score.copy_(logits(number, *score.shape))
    noise = logistic_noise(5000, torch.Generator().manual_seed(0))

    def concrete(number: int, place: int, tie: CoupledGroups) -> nn.Module:
        score = learnt[number]
        assert score is not None
        return HardConcrete(score, noise, number)

    return problem.start_run(
        lambda model: (attach_gates(model, ties, concrete if hard else straight_through_gates(learnt)), 50.0)
    )


@pytest.mark.parametrize("hard", [True, False])
def test_folded_the_model_answers_as_its_gates_did_in_evaluation(hard: bool) -> None:
    problem = tiny()
    state = gated(problem, hard)
    if not hard:
        set_thresholds_(state, [1, 1, 1], 0.4, "global")
    x = problem.validation.batch(range(96))["x"]
    with torch.no_grad():
        before = state.model.eval()(x)
        shut = {n: gate.mean_gate(underlying_weight(state.model, n)) == 0 for n, gate in gates_of(state.model)}
        fold_gates_(state)
        detach_gates_(state)
        for n, mask in shut.items():
            assert mask.any()
            assert state.prunable_parameters()[n].all()  # none is exactly 0, whatever trimming keeps
        small = state.model(x)
        for n, mask in shut.items():
            state.prunable_parameters()[n][mask] = 0.0
        assert state.model(x).allclose(before, atol=1e-6)
        assert small.allclose(before, atol=0.02)  # a shut gate leaves a thousandth
        assert not problem.pretrained.eval()(x).allclose(before, atol=0.1)


def test_scores_have_their_own_rate_and_no_decay_and_leave_with_the_gates() -> None:
    problem = tiny()
    state = gated(problem)
    group = state.optimizer.param_groups[-1]
    learnt = {id(gate.score) for _, gate in gates_of(state.model)}
    assert {id(p) for p in group["params"]} == learnt
    assert len(learnt) == 3
    assert (group["weight_decay"], group["decays"], group["factor"]) == (0.0, False, 50.0)
    for other in state.optimizer.param_groups[:-1]:
        assert not learnt & {id(p) for p in other["params"]}
    rates: list[list[float]] = []
    train(state, problem, 3, hooks=[lambda s: rates.append([g["lr"] for g in s.optimizer.param_groups])])
    assert all(r[-1] == pytest.approx(50 * r[0]) and r[0] == r[1] > 0 for r in rates)
    assert learnt < {id(p) for p in state.optimizer.state}
    detach_gates_(state)
    living = {id(p) for p in state.model.parameters()}
    assert [id(p) for g in state.optimizer.param_groups for p in g["params"] if id(p) not in living] == []
    assert {id(p) for p in state.optimizer.state} <= living
    assert len(state.optimizer.param_groups) == 2
    assert [n for n, m in state.model.named_modules() if isinstance(m, StraightThroughGate)] == []
    assert state.model.state_dict().keys() == problem.pretrained.state_dict().keys()


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
def test_levels_mask_the_share_that_is_asked_for_and_those_that_keep_masks(scope: str, sparsity: float) -> None:
    problem = tiny()
    state = gated(problem)
    areas = group_sizes(block_groups(problem.targets, Element), problem.targets)
    assert areas == [1, 1, 1]
    set_thresholds_(state, areas, sparsity, scope)
    masks = topk_masks(weight_scores(state), sparsity, scope=scope)
    for n in problem.targets:
        through = state.model.get_submodule(n.removesuffix(".weight")).weight
        assert isinstance(through, Tensor)
        assert (through != 0).equal(masks[n])
    assert masked_share(state, areas, exact=True) == pytest.approx(1 - count_kept(masks) / 2000)


@pytest.mark.parametrize(("shape", "block"), [((7, 5), Element), ((4,), Row)])
def test_a_penalty_has_the_gradient_of_its_formula_beside_that_of_the_task(
    shape: tuple[int, ...], block: Block
) -> None:
    weight, score = logits(0, *(shape if block == Element else (4, 8))), Parameter(logits(1, *shape))
    gate, leaf = StraightThroughGate(score, block, 0, 0, SHIFT).train(), score.detach().clone().requires_grad_()
    gate.level.fill_(0.0)
    product = gate(weight)
    assert gate.share is not None
    plain = (leaf - SHIFT).sigmoid().mean()
    assert gate.share.item() == pytest.approx(plain.item(), rel=1e-12)
    (product.square().sum() + 3 * gate.share).backward()
    (3 * plain).backward()
    task = 2 * product.detach() * weight
    assert score.grad is not None
    assert leaf.grad is not None
    assert score.grad.allclose((task if block == Element else task.sum(1)) + leaf.grad, rtol=1e-10)


def test_a_penalty_is_told_once_a_tie_and_in_training_alone() -> None:
    weight, score = logits(0, 4, 8), Parameter(logits(1, 4))
    for place, shift, training, told in [(0, 0.0, True, True), (1, 0.0, True, False), (0, None, True, False)]:
        gate = StraightThroughGate(score, Row, 0, place, shift).train(training)
        gate(weight)
        assert (gate.share is not None) == told
    evaluated = StraightThroughGate(score, Row, 0, 0, 0.0).eval()
    evaluated(weight)
    assert evaluated.share is None
