"""The meter: FLOPs by formula, equal for fused and hand-written attention."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sparsesoup.training.cost import Cost, CostTracker, CountFlops

SHAPES = [((2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8)), ((1, 4, 7, 16), (1, 4, 9, 16), (1, 4, 9, 16))]


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ((query @ key.transpose(-2, -1)) / math.sqrt(query.shape[-1])).softmax(-1) @ value


def flops_of(attention: object, shapes: tuple[tuple[int, ...], ...], backward: bool, **settings: object) -> int:
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(s, generator=draw, requires_grad=backward) for s in shapes]
    with CountFlops() as count:
        out = attention(*given, **settings)
        if backward:
            out.sum().backward()
    return count.flops


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("backward", [False, True])
def test_fused_attention_costs_what_its_products_cost(shapes: tuple[tuple[int, ...], ...], backward: bool) -> None:
    batch, heads, queries, width = shapes[0]
    formula = 2 * batch * heads * queries * shapes[1][2] * 2 * width * (3 if backward else 1)
    assert flops_of(by_hand, shapes, backward) == formula
    assert flops_of(scaled_dot_product_attention, shapes, backward) == formula
    mask = torch.ones(queries, shapes[1][2], dtype=torch.bool)
    assert flops_of(scaled_dot_product_attention, shapes, backward, attn_mask=mask) == formula
    assert flops_of(scaled_dot_product_attention, shapes, backward, dropout_p=0.5) == formula


def test_fused_attention_is_the_path_that_is_tested() -> None:
    """Were it not fused here, the test above would compare the products with themselves."""
    names = []

    class Names(CountFlops):
        def __torch_dispatch__(self, func: object, *rest: object, **more: object) -> object:
            names.append(str(func))
            return super().__torch_dispatch__(func, *rest, **more)

    with Names():
        scaled_dot_product_attention(*(torch.randn(s) for s in SHAPES[0]))
    assert any("_scaled_dot_product_" in name for name in names)
    assert not any("bmm" in name for name in names)


def test_linear_and_batched_products_are_counted_by_hand() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(5, 6)
    with CountFlops() as count:
        y = layer(x)
    assert count.flops == 2 * 5 * 6 * 4
    with CountFlops() as count:
        y.sum().backward()
    assert count.flops == 2 * 5 * 6 * 4  # the weight's gradient; nobody asks for the input's
    with CountFlops() as count:
        torch.bmm(torch.ones(3, 2, 5), torch.ones(3, 5, 7))
        layer(torch.randn(2, 5, 6))
    assert count.flops == 2 * 3 * 2 * 5 * 7 + 2 * 10 * 6 * 4
    with CountFlops() as count:
        nn.Conv2d(3, 8, 4, stride=4)(torch.randn(1, 3, 8, 8)) + 1
    assert count.flops == 2 * 4 * 3 * 16 * 8


def test_a_shape_is_counted_once_and_its_work_done_each_time() -> None:
    meter, done = CostTracker(), []

    def work() -> str:
        done.append(torch.is_grad_enabled())
        torch.ones(2, 3) @ torch.ones(3, len(done))
        return "result"

    assert meter.run_and_count_flops(("train", 2), work) == ("result", 12)
    assert meter.run_and_count_flops(("train", 2), work) == ("result", 12)  # though the product was larger
    assert meter.run_and_count_flops(("train", 3), work) == ("result", 36)
    assert len(done) == 3


def test_costs_add_up_by_label_and_go_through_json() -> None:
    meter = CostTracker()
    meter.add_cost("weak", Cost(steps=2, examples=8, tokens=40, padding=4, flops=100, seconds=0.5))
    meter.add_cost("main", Cost(steps=1, flops=7))
    meter.add_cost("weak", Cost(steps=3, examples=1, tokens=2, padding=1, flops=5, seconds=0.25))
    assert meter.costs["weak"] == Cost(5, 9, 42, 5, 105, 0.75)
    assert meter.total_cost() == Cost(6, 9, 42, 5, 112, 0.75)
    other = CostTracker()
    other.add_cost("search", Cost(steps=9))
    other.restore(meter.to_json())
    assert other.costs == meter.costs
    other.add_cost("weak", Cost(steps=1))
    assert meter.costs["weak"].steps == 5
