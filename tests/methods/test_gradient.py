"""Gradients and Hessian products of a problem's loss, against oracles by another road."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from conftest import same, tiny, tiny_double
from sparsesoup.core.errors import UserError
from sparsesoup.core.targets import target_parameters
from sparsesoup.methods.scores.calibration import Rows, calibration_batches
from sparsesoup.methods.scores.gradient import (
    gradient_flow_score,
    hessian_product,
    movement_sensitivity,
    snip_sensitivity,
    task_gradient,
)
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.problem import Problem
from tiny_bert import bert


def everything(problem: Problem, model: nn.Module, weights: Mapping[str, Tensor], rows: Rows) -> Tensor:
    """The loss of all rows in one batch, as a function of the targets."""
    batch = problem.train.batch([i for part in rows for i in part])
    outputs = functional_call(model, dict(weights), (batch["x"].to(next(iter(weights.values())).dtype),))
    return problem.criterion(outputs, batch)


def start(problem: Problem) -> nn.Module:
    return copy.deepcopy(problem.pretrained)


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor], **tolerance: float) -> bool:
    return one.keys() == other.keys() and all(t.allclose(other[n], **tolerance) for n, t in one.items())


def test_the_sensitivity_is_the_gradient_of_a_mask_that_multiplies_the_weights() -> None:
    """SNIP's own definition: the masks are variables, and the derivative is taken where all are 1."""
    problem = tiny()
    model, rows = start(problem), calibration_batches(problem, 5)
    found = snip_sensitivity(target_parameters(model, problem.targets), task_gradient(problem, model, rows))
    weights = {n: p.detach() for n, p in target_parameters(model, problem.targets).items()}
    masks = {n: torch.ones_like(w, requires_grad=True) for n, w in weights.items()}
    loss = everything(problem, model.eval(), {n: weights[n] * masks[n] for n in weights}, rows)
    by_hand = dict(zip(masks, torch.autograd.grad(loss, list(masks.values())), strict=True))
    assert close(found, {n: g.abs() for n, g in by_hand.items()}, rtol=1e-4, atol=1e-8)
    assert any((g < 0).any() for g in by_hand.values())


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_the_flow_is_w_times_the_explicit_hessian_times_the_gradient(temperature: float) -> None:
    problem = tiny_double()
    model, rows = start(problem).eval(), calibration_batches(problem, 3)
    params = target_parameters(model, problem.targets)
    sizes = [p.numel() for p in params.values()]
    batch = problem.train.batch([i for part in rows for i in part])

    def loss(flat: Tensor) -> Tensor:
        parts = {n: part.view(params[n].shape) for n, part in zip(params, flat.split(sizes), strict=True)}
        outputs = functional_call(model, parts, (batch["x"].double(),))
        return functional.cross_entropy(outputs / temperature, batch["labels"])

    here = parameters_to_vector(list(params.values())).detach()
    slopes = torch.autograd.functional.jacobian(loss, here)
    product = torch.autograd.functional.hessian(loss, here) @ slopes
    g = task_gradient(problem, model, rows, temperature)
    found = gradient_flow_score(params, hessian_product(problem, model, rows, g, temperature))
    assert torch.cat([t.flatten() for t in g.values()]).allclose(slopes, rtol=1e-9, atol=1e-16)
    flat = torch.cat([t.flatten() for t in found.values()])
    assert flat.allclose(here * product, rtol=1e-8, atol=1e-18)
    assert (flat < 0).any()
    assert (flat > 0).any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_hessian_product_of_a_bert_is_the_difference_of_its_gradients(attention: str) -> None:
    problem = bert(torch.float64, attention=attention)
    model, rows = start(problem), calibration_batches(problem, 3)
    assert model.config._attn_implementation == attention
    params = list(target_parameters(model, problem.targets).values())
    g = task_gradient(problem, model, rows)
    found = hessian_product(problem, model, rows, g)
    here, along = parameters_to_vector(params).detach(), torch.cat([t.flatten() for t in g.values()])
    step, sides = 1e-4 / along.norm(), []
    for sign in (1, -1):
        with torch.no_grad():
            vector_to_parameters(here + sign * step * along, params)
        sides.append(torch.cat([t.flatten() for t in task_gradient(problem, model, rows).values()]))
    difference = (sides[0] - sides[1]) / (2 * step)
    flat = torch.cat([t.flatten() for t in found.values()])
    assert difference.norm() > 0
    assert (flat - difference).norm() < 1e-6 * difference.norm()


def test_one_answer_is_a_number_that_no_temperature_divides() -> None:
    def regress(outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return functional.mse_loss(outputs.reshape(-1), batch["labels"].double())

    for predict in (lambda m, b: m(b["x"].double())[:, :1], lambda m, b: m(b["x"].double())[:, 0]):
        problem = tiny_double(predict=predict, criterion=regress)
        model, rows = start(problem), calibration_batches(problem, 2)
        g = task_gradient(problem, model, rows)
        assert same(g, task_gradient(problem, model, rows, 200.0))
        assert same(*(hessian_product(problem, model, rows, g, t) for t in (1.0, 200.0)))
    problem = tiny_double()
    assert not close(*(task_gradient(problem, start(problem), rows, t) for t in (1.0, 200.0)))


@pytest.mark.parametrize("size", [16, 6])
def test_many_batches_are_one_batch_of_all_their_rows(size: int) -> None:
    problem = tiny_double(training=TrainingConfig(batch_size=size))
    model, rows = start(problem), calibration_batches(problem, 5)
    assert [len(part) for part in rows] == [size] * 5
    whole = [[i for part in rows for i in part]]
    parts, once = task_gradient(problem, model, rows), task_gradient(problem, model, whole)
    assert close(parts, once, rtol=1e-10, atol=1e-16)
    products = [hessian_product(problem, model, r, once) for r in (rows, whole)]
    assert close(*products, rtol=1e-10, atol=1e-16)
    one = task_gradient(problem, model, rows[:1])
    assert not close(one, once, rtol=1e-2)


def test_batches_of_unequal_size_count_by_their_rows() -> None:
    problem = bert(torch.float64)
    model, rows = start(problem), [[0, 1, 2, 3, 4], [5], [6, 7]]
    parts, once = task_gradient(problem, model, rows), task_gradient(problem, model, [list(range(8))])
    assert close(parts, once, rtol=1e-8, atol=1e-14)


def test_a_problem_that_trains_in_bf16_is_scored_in_float32() -> None:
    plain, mixed = bert(), bert(training=TrainingConfig(batch_size=8, precision="bf16"))
    rows, models = calibration_batches(plain, 3), [p.start_run().model for p in (plain, mixed)]
    batch = plain.train.batch(range(4))
    with torch.no_grad():
        outputs = [plain.predict(m.eval(), batch) for m in models]
    assert not outputs[0].equal(outputs[1])  # its training does run in bf16
    first, second = (task_gradient(p, m, rows) for p, m in zip((plain, mixed), models, strict=True))
    assert same(first, second)
    assert same(*(hessian_product(p, m, rows, first) for p, m in zip((plain, mixed), models, strict=True)))
    with torch.no_grad():
        assert plain.predict(models[1], batch).equal(outputs[1])


def test_scoring_leaves_no_trace() -> None:
    def predict(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["x"]) + 0.0 * torch.rand(1)

    problem = tiny(predict=predict, training=TrainingConfig(batch_size=16, precision="bf16"))
    state = problem.start_run()
    state.model.train()
    state.model.blocks[0].eval()
    state.model.wide.weight.requires_grad_(False)
    for p in state.model.parameters():
        p.grad = torch.ones_like(p)

    def facts() -> list[object]:
        modules, params = dict(state.model.named_modules()), dict(state.model.named_parameters())
        return [
            {n: m.training for n, m in modules.items()},
            {n: p.requires_grad for n, p in params.items()},
            {n: m.forward for n, m in modules.items()},
            torch.get_rng_state().tolist(),
            torch.backends.cuda.flash_sdp_enabled(),
        ]

    before, tensors = facts(), {n: t.clone() for n, t in state.tensors().items()}
    rows = calibration_batches(problem, 2)
    products = hessian_product(problem, state.model, rows, task_gradient(problem, state.model, rows))
    assert not any(t.requires_grad for t in products.values())
    assert facts() == before
    assert same(state.tensors(), tensors)
    assert all(bool((p.grad == 1).all()) for p in state.model.parameters() if p.grad is not None)
    broken = replace(problem, criterion=lambda outputs, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        task_gradient(broken, state.model, rows)
    assert facts() == before


def test_no_dropout_is_in_the_scores() -> None:
    problem = tiny()
    model, rows = start(problem), calibration_batches(problem, 2)
    calm = start(problem)
    calm.dropout.p = 0.0
    assert same(task_gradient(problem, model.train(), rows), task_gradient(problem, calm.train(), rows))


def test_a_model_that_draws_noise_even_then_gets_the_same_scores() -> None:
    problem = tiny(predict=lambda model, batch: model(batch["x"] + torch.randn_like(batch["x"])))
    model, rows, found = start(problem), calibration_batches(problem, 2), []
    for seed in (5, 6):
        torch.manual_seed(seed)
        found.append(task_gradient(problem, model, rows))
    assert same(*found)


def test_the_plain_loss_of_the_task_is_scored_whatever_a_training_minimises() -> None:
    problem = tiny()
    other = replace(problem, objective=lambda model, batch: 1 / 0)
    assert same(*(task_gradient(p, start(p), calibration_batches(p, 2)) for p in (problem, other)))


def test_scores_cost_what_hand_arithmetic_says() -> None:
    """Products of a linear layer from a to b features: a * b multiply-adds a row, once for each thing asked for."""
    embed, block, wide, head = 8 * 20, 20 * 20, 20 * 60, 60 * 3
    forward = embed + 2 * block + wide + head
    # Asked for: the gradient of each target, and of what enters a layer behind the first target.
    first = block + 2 * block + 2 * wide + head
    # And once more, through the gradient of each weight (its input, the gradient at its output), through the gradient
    # of each input (the weight, the gradient at the output), and through the forward pass.
    second = (block + 2 * block + 2 * wide) + (2 * block + 2 * wide + head) + first
    problem = tiny()
    model, rows = start(problem), calibration_batches(problem, 3)
    g = task_gradient(problem, model, rows)
    cost = problem.meter.costs["score"]
    assert (cost.steps, cost.examples, cost.tokens, cost.padding) == (0, 48, 48, 0)
    assert cost.flops == 2 * 48 * (forward + first)
    assert cost.seconds > 0
    hessian_product(problem, model, rows, g)
    assert problem.meter.costs.keys() == {"score"}
    assert problem.meter.costs["score"].flops == cost.flops + 2 * 48 * (forward + first + second)
    assert problem.meter.costs["score"].examples == 96


def test_fused_attention_and_its_double_backward_cost_what_the_written_out_products_cost() -> None:
    costs = []
    for attention in ("sdpa", "eager"):
        problem = bert(attention=attention)
        model, rows = start(problem), calibration_batches(problem, 3)
        g = task_gradient(problem, model, rows)
        first = problem.meter.costs["score"].flops
        hessian_product(problem, model, rows, g)
        costs.append((first, problem.meter.costs["score"].flops - first))
        tokens, padding = (sum(n) for n in zip(*(problem.train.count_tokens(part) for part in rows), strict=True))
        assert (problem.meter.costs["score"].tokens, problem.meter.costs["score"].padding) == (2 * tokens, 2 * padding)
    assert costs[0] == costs[1]
    assert costs[0][1] > 2 * costs[0][0]


def test_a_weight_that_the_loss_does_not_use_has_no_gradient() -> None:
    """As an expert to which no token of the batch was sent."""
    problem = tiny()
    problem.pretrained.blocks[1].forward = lambda x: 0 * x
    model = problem.pretrained
    rows = calibration_batches(problem, 1)
    g = task_gradient(problem, model, rows)
    assert [bool(t.any()) for t in g.values()] == [True, False, True]
    assert [bool(t.any()) for t in hessian_product(problem, model, rows, g).values()] == [True, False, True]


@pytest.mark.parametrize("flaw", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_refused_in_one_line(flaw: float) -> None:
    problem = tiny()
    model, rows = start(problem), calibration_batches(problem, 1)
    g = task_gradient(problem, model, rows)
    broken = replace(problem, criterion=lambda outputs, batch: outputs.square().mean() * flaw)
    with pytest.raises(UserError, match=r"^the gradient of blocks\.0\.weight has NaN or infinite values") as caught:
        task_gradient(broken, model, rows)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^the Hessian-gradient product of blocks\.0\.weight has NaN"):
        hessian_product(broken, model, rows, g)


def test_the_rows_to_score_by_are_a_function_of_seed_and_path() -> None:
    one = calibration_batches(tiny(), 4, 1)
    assert one == calibration_batches(tiny(), 4, 1)
    assert len({i for part in one for i in part}) == 64
    assert all(one != other for other in (calibration_batches(tiny(seed=1), 4, 1), calibration_batches(tiny(), 4, 2)))
    assert len(calibration_batches(tiny(), 40)) == 40  # more than an epoch
    few = replace(tiny(), train=replace(tiny().train, rows=tiny().train.rows[:5]))
    assert [len(part) for part in calibration_batches(few, 2)] == [5, 5]


def test_what_has_not_moved_has_not_travelled() -> None:
    params, slopes = {"w": torch.tensor([[2.0, -3.0, 4.0]])}, {"w": torch.tensor([[1.0, 2.0, -0.5]])}
    assert movement_sensitivity(params, params, slopes)["w"].tolist() == [[0.0, 0.0, 0.0]]
    origin = {"w": torch.tensor([[2.0, -1.0, 7.0]])}
    assert movement_sensitivity(params, origin, slopes)["w"].tolist() == [[0.0, 12.0, 6.0]]
    assert snip_sensitivity(params, slopes)["w"].tolist() == [[2.0, 6.0, 2.0]]
    assert gradient_flow_score(params, slopes)["w"].tolist() == [[2.0, -6.0, -2.0]]
