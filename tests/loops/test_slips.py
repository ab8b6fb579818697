"""Slips in a loop of one's own: copies of the model, states of another, losses of another, odd optimizers."""

import copy
import io
from typing import Any

import pytest
import torch
from transformers import Adafactor

from conftest import Net, same
from sparsesoup import attach
from sparsesoup.core.errors import UserError
from tiny_loops import BATCHES, STEPS, Loop, loss_of, prunable


@pytest.mark.parametrize("road", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_is_not_pruned_with_it(road: str) -> None:
    """A teacher or a moving average is a copy; the copied hook once pruned it at its first forward pass."""
    loop = Loop()
    pruner = loop.attach("magnitude", sparsity=0.7)
    if road == "deepcopy":
        teacher = copy.deepcopy(loop.model)
    else:
        file = io.BytesIO()
        torch.save(loop.model, file)
        file.seek(0)
        teacher = torch.load(file, weights_only=False)
    before = copy.deepcopy(teacher.state_dict())
    teacher(BATCHES[0]["x"])
    assert same(teacher.state_dict(), before)
    loop.train()
    assert pruner.sparsity == pytest.approx(0.7)
    assert pruner.finish()
    again = attach(teacher, torch.optim.SGD(teacher.parameters(), lr=0.1), "gradual", steps=STEPS, prunable=prunable)
    again.remove_hooks()


def test_states_of_something_else_are_refused_in_one_line() -> None:
    pruner = Loop().attach("gradual")
    with pytest.raises(UserError, match=r"no state of a pruner; give what pruner\.state_dict\(\) returned"):
        pruner.load_state_dict(Loop().model.state_dict())
    saved = pruner.state_dict()
    name = "masks/wide.weight"
    saved["tensors"][name] = torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(UserError, match=r"of another model, which differs in wide\.weight; load that"):
        Loop().attach("gradual").load_state_dict(saved)


def test_a_loss_of_another_model_is_refused_at_the_first_look_ahead() -> None:
    """Its look-aheads would train nothing, and their votes would be those of the weights as they are."""
    other, loop = Net(), Loop()
    loop.attach("isp", loss=lambda model, batch: loss_of(other, batch))
    with pytest.raises(UserError, match="loss: it does not use the model that it is given"):
        loop.train()


def test_a_loss_may_come_with_outputs_as_for_prune() -> None:
    found = []
    for loss in (loss_of, lambda model, batch: (loss_of(model, batch), "outputs")):
        loop = Loop()
        pruner = loop.attach("isp", loss=loss)
        loop.train()
        found.append(pruner.finish())
    assert same(*found)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model": "bert"}, "model: must be the module that is trained, got 'bert'"),
        ({"steps": True}, "steps: must be the optimizer steps of the loop, got True"),
        ({"method": "isp", "batches": BATCHES[0]}, r"batches: is one batch; give a list of batches, \[batch\]"),
        ({"method": "early-bird"}, "^early-bird goes back to an earlier step"),
        ({"method": "gradual", "steps": 2}, r"^2 steps are too few: .*; raise steps or epochs$"),
    ],
)
def test_slips_are_refused_in_one_line(given: dict[str, Any], says: str) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    own: dict[str, Any] = {"model": model, "optimizer": optimizer, "steps": STEPS, "loss": loss_of, "batches": BATCHES}
    with pytest.raises(UserError, match=says):
        attach(**{**own, "prunable": prunable, **given})


def test_an_optimizer_with_rates_of_its_own_is_refused_and_not_with_a_given_one() -> None:
    model = Net()
    with pytest.raises(UserError, match=r"^Adafactor has lr=None; give it a learning rate"):
        attach(model, Adafactor(model.parameters()), steps=STEPS, prunable=prunable)
    given = Adafactor(model.parameters(), lr=1e-3, relative_step=False)
    attach(model, given, steps=STEPS, prunable=prunable).remove_hooks()


def test_a_loss_that_is_no_number_is_said_in_one_line() -> None:
    loop = Loop()
    loop.attach("isp", loss=lambda model, batch: {"first": model(batch["x"]), "second": 0})
    with pytest.raises(UserError, match=r"a mean over rows, got a dict of 2$"):
        loop.train()
