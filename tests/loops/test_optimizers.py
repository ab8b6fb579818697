"""Optimizers of a loop of one's own: closures, kinds that move zeros, and a model that is left in eval mode."""

import warnings
from itertools import cycle, islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import same
from sparsesoup.core.errors import UserError
from sparsesoup.core.masks import Masks, count_kept
from sparsesoup.loops.attach import attach
from tiny_loops import BATCHES, KEPT, STEPS, Loop, loss_of, make_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:before the first weights are masked a weight can travel")


class Drifting(torch.optim.AdamW):
    """A subclass of AdamW that moves every weight, those without a gradient too."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(0.01)


@pytest.mark.parametrize("method", ["gradual", "movement", "magnitude-ste", "power-propagation", "platon"])
def test_zeros_hold_with_an_optimizer_that_moves_them(method: str) -> None:
    loop = Loop()
    loop.optimizer = Drifting(loop.model.parameters(), lr=1e-3)
    pruner = loop.attach(method)
    loop.train()
    loop.train(0, 5)  # beyond T
    assert pruner.step == STEPS + 5  # its step calls that of its parent, which has the same hooks
    masks, params = pruner.finish(), dict(loop.model.named_parameters())
    assert count_kept(masks) == KEPT
    assert not any(bool(params[name][~mask].any()) for name, mask in masks.items())


@pytest.mark.parametrize("method", ["gradual", "platon", "movement", "gmp-star", "isp", "gradual-obs"])
def test_a_step_with_a_closure_is_that_of_a_backward_pass_before_it(method: str) -> None:
    def train(how: str) -> tuple[Masks, dict[str, Tensor]]:
        loop = Loop()
        pruner = loop.attach(method)
        for batch in islice(cycle(BATCHES), STEPS):

            def closure(batch: Any = batch) -> Tensor:  # as Lightning has it
                loop.optimizer.zero_grad()
                loss = loss_of(loop.model, batch)
                loss.backward()
                return loss

            if how == "before":
                closure()
                loop.optimizer.step()
            elif how == "named":
                loop.optimizer.step(closure=closure)
            else:
                assert isinstance(loop.optimizer.step(closure), Tensor)
        return pruner.finish(), loop.model.state_dict()

    masks, weights = train("before")
    assert count_kept(masks) == KEPT
    for how in ("named", "by place"):
        found = train(how)
        assert same(found[0], masks)
        assert same(found[1], weights)


def test_a_step_that_ends_in_an_error_does_not_count() -> None:
    class Failing(Drifting):
        fail = False

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            if self.fail:
                raise RuntimeError("out of memory")

    loop = Loop()
    loop.optimizer = optimizer = Failing(loop.model.parameters(), lr=1e-3)
    pruner = loop.attach("gmp-star")
    loop.train(0, 10)
    optimizer.fail = True
    with pytest.raises(RuntimeError):
        loop.train(10, 11)
    optimizer.fail = False
    loop.train(10)
    assert pruner.step == STEPS
    assert count_kept(pruner.finish()) == KEPT


def test_an_optimizer_with_several_losses_a_step_is_refused() -> None:
    loop = Loop()
    with pytest.raises(UserError, match="LBFGS computes several losses a step"):
        attach(loop.model, torch.optim.LBFGS(loop.model.parameters()), "gradual", 0.7, steps=STEPS)


def test_a_model_in_eval_mode_is_named_once_if_that_changes_its_training() -> None:
    def train(*extra: nn.Module, mode: bool) -> list[str]:
        model = nn.Sequential(nn.Linear(8, 8), *extra, nn.Linear(8, 8), nn.Linear(8, 3)).train(mode)
        optimizer = make_optimizer(model)
        pruner = attach(model, optimizer, "gradual", 0.5, steps=8)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for batch in BATCHES[:8]:
                loss_of(model, batch).backward()
                optimizer.step()
                model.eval()
                model(batch["x"])  # a validation
                model.train(mode)
        pruner.finish()
        return [str(one.message) for one in said]

    for extra in (nn.Dropout(0.1), nn.BatchNorm1d(8)):
        (line,) = train(extra, mode=False)
        assert "Sequential is trained in eval mode" in line
        assert "call model.train()" in line
        assert not train(extra, mode=True)
    assert not train(nn.Dropout(0.0), mode=False)  # nothing differs
    assert not train(nn.BatchNorm1d(8).eval(), mode=True)  # one's own wish
