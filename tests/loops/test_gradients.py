"""Gradients of a loop of one's own: observed before they are clipped, and none of them moves a pruned weight."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from conftest import same
from sparsesoup.core.masks import count_kept
from sparsesoup.methods import METHODS, Method
from sparsesoup.methods.isp import InstantSoup
from sparsesoup.methods.platon import Platon
from sparsesoup.methods.wanda import Wanda
from tiny_loops import KEPT, STEPS, Loop, loss_of

PLATON = Platon(every_steps=5, window=5)
CLIP = 0.3  # below the norm of nearly every step
CLIPPED: dict[str, Method] = {
    "gradual": METHODS["gradual"],
    "wanda": Wanda(batches=4),
    "platon": PLATON,
    "isp": InstantSoup(stages=3, weak_masks=3, budget="extra"),
}


def scaler_of(scale: float = 2.0**12) -> Any:
    return torch.amp.GradScaler("cpu", init_scale=scale)


@pytest.mark.parametrize(
    ("name", "parts"), [*((name, 1) for name in CLIPPED), ("gradual", 2), ("wanda", 2), ("platon", 2)]
)
def test_clipped_and_accumulated_gradients_give_the_masks_of_our_loop_to_the_bit(name: str, parts: int) -> None:
    loop, method = Loop(clip=CLIP, parts=parts), CLIPPED[name]
    ticket = method.run(loop.reference, 0.7)
    pruner = loop.attach(method)
    loop.train()
    assert same(pruner.finish(), ticket.masks)
    assert same(loop.model.state_dict(), ticket.weights)


def test_clipping_matters_to_what_is_observed() -> None:
    """Otherwise the test above would prove nothing: gradients seen after clipping give other masks."""
    loop, late = Loop(clip=CLIP), Loop(clip=CLIP)
    early = loop.attach(PLATON)
    loop.train()
    pruner = late.attach(PLATON)
    pruner._gradients._observed = lambda name, grad, optimizer: grad  # type: ignore[method-assign]
    late.train()
    assert not same(early.finish(), pruner.finish())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [0.0, CLIP])
def test_a_gradient_scaler_is_divided_out_before_clipping(fused: bool, clip: float) -> None:
    plain = Loop(fused, clip)
    expected = plain.attach(PLATON)
    plain.train()
    scaled = Loop(fused, clip, scaler=scaler_of())
    pruner = scaled.attach(PLATON, scaler=scaled.scaler)
    scaled.train()
    assert same(pruner.finish(), expected.finish())
    assert same(scaled.model.state_dict(), plain.model.state_dict())


def test_in_float16_with_a_scaler_that_is_not_known_gradients_are_those_of_the_optimizer() -> None:
    """The scale must not be seen in them: a wrong factor of 4,096 at each second step would change most masks."""
    found = []
    for given in (False, True):
        loop = Loop(fused=False, scaler=scaler_of(2.0**8))
        pruner = loop.attach(PLATON, scaler=loop.scaler if given else None)
        seen: list[float] = []
        step = pruner._gradients._observed

        def spy(*args: Any, step: Any = step, seen: list[float] = seen) -> Any:
            seen.append(float(step(*args).norm()))
            return step(*args)

        pruner._gradients._observed = spy  # type: ignore[method-assign]
        with torch.autocast("cpu", dtype=torch.float16):
            loop.train()
        found.append(torch.tensor(seen))
        assert count_kept(pruner.finish()) == KEPT
    assert torch.allclose(*found, rtol=1e-3)


def test_steps_that_accelerate_skips_do_not_count() -> None:
    """Its scaler finds an overflow; it is found in the optimizer, so platon sees gradients without the scale."""
    loop = Loop(fused=False)
    accelerator = Accelerator(cpu=True)
    optimizer = AcceleratedOptimizer(loop.optimizer, device_placement=False, scaler=scaler_of())
    assert accelerator.sync_gradients
    inner, loop.optimizer = loop.optimizer, optimizer  # type: ignore[assignment]
    pruner = loop.attach(PLATON, steps=30)
    assert pruner._gradients.scaler is optimizer.scaler
    skipped = 0
    for step, batch in zip(range(33), loop.rows(), strict=False):
        for group in inner.param_groups:
            group["lr"] = 1e-2
        optimizer.scaler.scale(loss_of(loop.model, batch)).backward()
        if step in (4, 5, 17):
            next(iter(loop.model.parameters())).grad.fill_(float("inf"))  # type: ignore[union-attr]
        optimizer.step()
        skipped += optimizer.step_was_skipped
        optimizer.zero_grad()
    assert (skipped, pruner.step) == (3, 30)
    assert count_kept(pruner.finish()) == KEPT


def test_pruned_weights_do_not_count_towards_the_clipped_norm() -> None:
    loop = Loop()
    pruner = loop.attach("magnitude")
    loop.train(0, STEPS // 2)
    loss_of(loop.model, next(loop.rows())).backward()
    params = dict(loop.model.named_parameters())
    for name, mask in pruner.masks.items():
        grad = params[name].grad
        assert grad is not None
        assert not bool(grad[~mask].any())
        assert bool(grad[mask].any())
