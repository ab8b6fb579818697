"""Models in a loop of one's own: replaced, compiled, tied and frozen weights, buffers, heads beside the model."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional

from conftest import same
from sparsesoup.core.errors import UserError
from sparsesoup.core.masks import count_kept
from sparsesoup.loops.attach import attach
from sparsesoup.methods import METHODS, Method
from sparsesoup.methods.isp import InstantSoup
from sparsesoup.methods.soft_movement_and_l0 import SoftMovement
from tiny_loops import BATCHES, KEPT, STEPS, Loop, loss_of, prunable

pytestmark = pytest.mark.filterwarnings("ignore:before the first weights are masked a weight can travel")
NO_CHANGE = InstantSoup(stages=3, weak_masks=2, budget="extra", look_ahead=0.05)  # at sparsity 0


def zeros_hold(model: nn.Module, masks: dict[str, Tensor]) -> bool:
    params = dict(model.named_parameters())
    return not any(bool(params[name][~mask].any()) for name, mask in masks.items())


def replace_weight(model: nn.Module) -> tuple[Parameter, Parameter]:
    layer: Any = model.get_submodule("blocks.1")
    before, layer.weight = layer.weight, Parameter(layer.weight.detach() + 0.01)
    return before, layer.weight


def test_parameters_that_are_replaced_after_attach_are_followed() -> None:
    loop = Loop()
    pruner = loop.attach("gradual")
    loop.train(0, 30)
    before, after = replace_weight(loop.model)
    for group in loop.optimizer.param_groups:
        group["params"] = [after if p is before else p for p in group["params"]]

    def check(step: int) -> None:
        assert zeros_hold(loop.model, pruner.masks)
        assert not bool(after[~pruner.masks["blocks.1.weight"]].any())

    loop.train(30, after=check)
    assert count_kept(pruner.finish()) == KEPT


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("gradual", r"blocks.1.weight is to be pruned and not trained by this optimizer"),
        ("movement", r"replaced after attach"),
    ],
)
def test_parameters_that_are_replaced_without_the_optimizer_are_refused(method: str, says: str) -> None:
    loop = Loop()
    loop.attach(method)
    loop.train(0, 5)
    before, after = replace_weight(loop.model)
    if method == "movement":
        for group in loop.optimizer.param_groups:
            group["params"] = [after if p is before else p for p in group["params"]]
    with pytest.raises(UserError, match=says) as caught:
        loop.train(5, 6)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["gradual", "platon", "movement"])
def test_a_compiled_model_gives_the_same_bits(method: str) -> None:
    plain, compiled = Loop(), Loop()
    first, wrapped = plain.attach(METHODS[method]), torch.compile(compiled.model, backend="eager")
    second = attach(
        wrapped, compiled.optimizer, METHODS[method], 0.7, steps=STEPS, prunable=prunable, max_grad_norm=0.0
    )  # type: ignore[arg-type]
    inside, compiled.model = compiled.model, wrapped  # type: ignore[assignment]
    plain.train()
    compiled.train()
    assert same(first.finish(), second.finish())
    assert same(plain.model.state_dict(), inside.state_dict())
    torch.compiler.reset()


def test_tied_weights_are_pruned_once() -> None:
    loop = Loop()
    first: Any = loop.model.get_submodule("blocks.0")
    other: Any = loop.model.get_submodule("blocks.1")
    other.weight = first.weight
    loop.optimizer = torch.optim.AdamW(loop.model.parameters(), lr=1e-2)
    pruner = loop.attach("gradual")
    loop.train()
    masks = pruner.finish()
    assert set(masks) == {"blocks.0.weight", "wide.weight"}
    assert count_kept(masks) == round(0.3 * 1600)
    assert other.weight is first.weight
    assert not bool(other.weight[~masks["blocks.0.weight"]].any())


def test_frozen_weights_are_refused_and_may_be_left_out() -> None:
    loop = Loop()
    loop.model.get_submodule("blocks.0").requires_grad_(False)
    with pytest.raises(UserError, match=r"blocks.0.weight is to be pruned and frozen"):
        loop.attach("gradual")
    before = copy.deepcopy(loop.model.get_submodule("blocks.0").state_dict())
    pruner = loop.attach("gradual", prunable=lambda name, p: prunable(name, p) and p.requires_grad)
    loop.train()
    assert set(pruner.finish()) == {"blocks.1.weight", "wide.weight"}
    assert same(before, loop.model.get_submodule("blocks.0").state_dict())


def test_weights_that_are_frozen_later_keep_their_masks() -> None:
    loop = Loop()
    pruner = loop.attach("gradual")
    loop.train(0, 30)
    loop.model.get_submodule("blocks.0").requires_grad_(False)
    loop.train(30)
    assert count_kept(pruner.finish()) == KEPT
    assert zeros_hold(loop.model, pruner.masks)


class Normed(nn.Module):
    """Buffers that every forward pass in training mode changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 16), nn.ReLU())
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(x))


def test_look_aheads_leave_buffers_and_heads_beside_the_model_as_they_are() -> None:
    """The head is the loss's, trained by the same optimizer: weak runs change neither it nor its moments."""

    def train(method: Any) -> dict[str, Tensor]:
        model, head = Normed(), nn.Linear(3, 3)
        nn.init.eye_(head.weight), nn.init.zeros_(head.bias)
        optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-2)

        def loss(model: nn.Module, batch: Any) -> Tensor:
            return functional.cross_entropy(head(model(batch["x"])), batch["labels"])

        if method is not None:
            pruner = attach(model, optimizer, method, 0.0, steps=30, loss=loss, batches=BATCHES)
        for step in range(30):
            torch.manual_seed(step)
            loss(model, BATCHES[step]).backward()
            optimizer.step()
            optimizer.zero_grad()
        if method is not None:
            assert pruner.cost.steps == 3 * 2 * 2
            pruner.finish()
        moments = {f"{n}/{k}": v for n, p in head.named_parameters() for k, v in optimizer.state[p].items()}
        return {**model.state_dict(), **{f"head.{n}": p for n, p in head.state_dict().items()}, **moments}

    assert same(train(None), train(NO_CHANGE))


@pytest.mark.parametrize(
    "method", ["movement", SoftMovement(score_rate=0.5), "magnitude-ste", "power-propagation"], ids=str
)
def test_learned_masks_keep_plain_names_and_the_users_optimizer(method: str | Method) -> None:
    loop = Loop()
    names = list(loop.model.state_dict())
    trained = [[id(p) for p in group["params"]] for group in loop.optimizer.param_groups]
    pruner = loop.attach(method, 0.5)

    def check(step: int) -> None:
        assert list(loop.model.state_dict()) == names
        assert [[id(p) for p in group["params"]] for group in loop.optimizer.param_groups] == trained
        assert len(loop.optimizer.state) == len(names)
        assert zeros_hold(loop.model, pruner.masks)

    loop.train(after=check)
    loop.train(STEPS, STEPS + 5, check)
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)
    pruner.finish()
    twin = Loop()
    twin.model.load_state_dict(loop.model.state_dict())
    twin.optimizer.load_state_dict(loop.optimizer.state_dict())


def test_more_than_one_process_is_refused_before_anything_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="runs in one process, this is one of 2"):
        loop.attach("gradual")
    assert not loop.model._forward_pre_hooks


def test_a_loop_that_calls_a_part_of_the_model_is_pruned_too() -> None:
    """The first forward pass is on something inside: what the plan has is done before the step."""
    loop = Loop()
    pruner = loop.attach("gradual")
    outer = loop.model
    loop.model = nn.ModuleList([outer])  # type: ignore[assignment]
    loop.model.forward = outer.forward  # type: ignore[method-assign]
    loop.train()
    assert count_kept(pruner.finish()) == KEPT
    assert zeros_hold(outer, pruner.masks)
    assert loss_of(outer, BATCHES[0]).isfinite()
