"""Distillation: the loss by hand, a model taught by itself, and what is refused."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import tiny_bert
from conftest import Net, same, tiny
from sparsesoup.core.errors import UserError
from sparsesoup.training.config import DistillConfig
from sparsesoup.training.cost import CountFlops
from sparsesoup.training.distillation import block_names, distillation_divergence, distillation_objective
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem


def objective(problem: Problem, teacher: torch.nn.Module, **settings: Any) -> Callable[..., Tensor]:
    made = distillation_objective(problem, teacher, DistillConfig(teacher="some", **settings))
    return lambda model, batch: made(model, batch).total


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("hidden", [0.0, 2.0])
def test_distilling_a_model_into_itself_is_its_share_of_the_loss(alpha: float, hidden: float) -> None:
    problem = tiny()
    model, batch = copy.deepcopy(problem.pretrained).eval(), problem.train.batch(range(16))
    problem = replace(problem, targets={n: t for n, t in problem.targets.items() if n.startswith("blocks")})
    loss = objective(problem, copy.deepcopy(model), alpha=alpha, temperature=3.0, hidden=hidden)(model, batch)
    assert loss.item() == pytest.approx((1 - alpha) * problem.training_loss(model, batch).item(), abs=1e-6)


def test_the_divergence_is_that_of_the_definition() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    for temperature in (1.0, 2.0, 7.0):
        for s, t, found in zip(student, teacher, distillation_divergence(student, teacher, temperature), strict=True):
            p = [float(v) for v in (t / temperature).exp() / (t / temperature).exp().sum()]
            q = [float(v) for v in (s / temperature).exp() / (s / temperature).exp().sum()]
            by_hand = sum(a * torch.tensor(a / b).log().item() for a, b in zip(p, q, strict=True)) * temperature**2
            assert float(found) == pytest.approx(by_hand, rel=1e-4)


def test_a_number_is_compared_by_its_square_and_a_span_by_both_of_its_ends() -> None:
    assert distillation_divergence(torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0], [1.0]]), 2.0).tolist() == [
        4.0,
        0.0,
    ]
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 2, 7), torch.randn(3, 2, 7)
    parts = [distillation_divergence(student[:, i], teacher[:, i], 2.0) for i in range(2)]
    assert distillation_divergence(student, teacher, 2.0).allclose((parts[0] + parts[1]) / 2)


def test_a_teacher_that_is_sure_of_the_labels_weighs_as_much_as_they_do() -> None:
    """The criterion of a span is a mean over its two ends: a sum here would double the share of the teacher."""
    torch.manual_seed(0)
    for shape, wanted in (((3, 7), [1, 5, 2]), ((3, 2, 7), [[1, 2], [5, 5], [0, 3]])):
        labels, outputs = torch.tensor(wanted), torch.randn(shape)
        sure = torch.where(functional.one_hot(labels, 7) > 0, 0.0, -1e4)
        criterion = functional.cross_entropy(outputs.reshape(-1, 7), labels.flatten())
        assert distillation_divergence(outputs, sure).mean().item() == pytest.approx(criterion.item(), rel=1e-5)


def test_the_temperature_keeps_the_size_of_the_gradient() -> None:
    """At a high temperature the gradient on the logits is (student - teacher) / classes (Hinton, eq. 4)."""
    student = torch.tensor([[1.0, -2.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[-1.0, 0.5, 0.5]])
    distillation_divergence(student, teacher, 1e3).sum().backward()
    assert student.grad is not None
    assert student.grad.allclose((student.detach() - teacher) / 3, atol=5e-3)


def test_hidden_states_are_compared_block_by_block() -> None:
    problem = tiny()
    problem = replace(problem, targets={n: t for n, t in problem.targets.items() if n.startswith("blocks")})
    assert block_names(problem.targets) == ["blocks.0", "blocks.1"]
    assert block_names(dict.fromkeys(["a.layer.10.b.3.weight"])) == ["a.layer.10"]
    student, teacher = copy.deepcopy(problem.pretrained).eval(), copy.deepcopy(problem.pretrained).eval()
    with torch.no_grad():
        teacher.blocks[1].bias += 1.0  # its output differs by exactly 1 everywhere, the first block's by nothing
    batch = problem.train.batch(range(16))
    with_hidden, without = (objective(problem, teacher, alpha=0.0, hidden=h)(student, batch) for h in (4.0, 0.0))
    assert (with_hidden - without).item() == pytest.approx(4.0 * 0.5, rel=1e-5)


def test_hidden_states_of_padding_are_not_compared() -> None:
    narrow, wide = tiny_bert.bert(), tiny_bert.bert(extra=7)
    student, teacher = copy.deepcopy(narrow.pretrained).eval(), copy.deepcopy(narrow.pretrained).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    losses = [
        objective(p, teacher, alpha=0.0, hidden=1.0)(student, p.train.batch(rows)).item()
        for p in (narrow, wide)
        for rows in (range(8), [0], [1])
    ]
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    pair = objective(narrow, teacher, alpha=0.0, hidden=1.0)(student, narrow.train.batch([0, 1])).item()
    assert pair == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-5)


def test_the_teacher_is_not_trained_and_sees_no_dropout() -> None:
    problem = tiny()
    teacher = copy.deepcopy(problem.pretrained)
    before = {n: t.clone() for n, t in teacher.state_dict().items()}
    with_teacher = replace(problem, objective=objective(problem, teacher))
    state = train(with_teacher.start_run(), with_teacher, 5)
    assert same(teacher.state_dict(), before)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in state.model.parameters())
    torch.manual_seed(3)
    batch = problem.train.batch(range(8))
    one, two = (objective(problem, teacher, alpha=1.0)(teacher, batch) for _ in range(2))
    assert one.item() == two.item() == 0.0


def test_the_teachers_forward_pass_is_on_the_meter() -> None:
    plain, problem = tiny(), tiny()
    with_teacher = replace(problem, objective=objective(problem, copy.deepcopy(problem.pretrained)))
    for each in (plain, with_teacher):
        train(each.start_run(), each, 2)
    with CountFlops() as forward:
        problem.predict(problem.pretrained, problem.train.batch(range(16)))
    assert forward.flops > 0
    assert with_teacher.meter.total_cost().flops - plain.meter.total_cost().flops == 2 * forward.flops


def test_a_taught_student_moves_towards_its_teacher() -> None:
    problem = tiny()
    teacher = train(tiny(seed=5).start_run(), tiny(seed=5), 60).model
    with torch.no_grad():  # its answers are the labels' neighbours
        teacher.head.weight.copy_(teacher.head.weight.roll(1, 0))
        teacher.head.bias.copy_(teacher.head.bias.roll(1, 0))
    settings = DistillConfig(teacher="some", alpha=1.0)
    with_teacher = replace(problem, objective=distillation_objective(problem, copy.deepcopy(teacher), settings))
    batch = problem.validation.batch(range(96))

    def far(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(distillation_divergence(model.eval()(batch["x"]), teacher.eval()(batch["x"])).mean())

    taught_by_labels = far(train(problem.start_run(), problem, 60).model)
    assert far(train(with_teacher.start_run(), with_teacher, 60).model) < 0.1 * taught_by_labels


def test_a_teacher_of_another_task_is_refused() -> None:
    problem = tiny()
    batch = problem.train.batch(range(4))
    other = Net()
    other.head = torch.nn.Linear(60, 2)
    with pytest.raises(UserError, match=r"the teacher answers \(2,\) a row, the model \(3,\)"):
        objective(problem, other)(problem.pretrained, batch)
    narrow = replace(problem, targets={"blocks.0.weight": problem.targets["blocks.0.weight"]})
    thin = Net(width=10)
    with pytest.raises(UserError, match="blocks of equal number and width"):
        objective(narrow, thin, hidden=1.0)(problem.pretrained, batch)
    with pytest.raises(UserError, match="numbered blocks"):
        block_names({"wide.weight": problem.targets["wide.weight"]})


@pytest.mark.parametrize("change", [{"alpha": 1.5}, {"alpha": -0.1}, {"temperature": 0.0}, {"hidden": -1.0}])
def test_impossible_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(change))}: "):
        DistillConfig(**change)
