"""Pruning inside a loop of one's own: the masks of our loop to the bit, and nothing else of the loop changes."""

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import sparsesoup.loops.pruner as pruner_module
from conftest import Net, same
from sparsesoup import prune, prune_once
from sparsesoup.core.errors import UserError
from sparsesoup.core.masks import count_kept
from sparsesoup.loops.attach import attach
from sparsesoup.loops.pruner import Pruner
from sparsesoup.methods import METHODS, Method
from sparsesoup.methods.gradual_obs import GradualOBS
from sparsesoup.methods.grain import Grain
from sparsesoup.methods.isp import InstantSoup
from sparsesoup.methods.isp_code import InstantSoupCode
from sparsesoup.methods.movement import MovementPruning
from sparsesoup.methods.platon import Platon
from sparsesoup.methods.soft_movement_and_l0 import SoftMovement
from sparsesoup.methods.wanda import Wanda
from sparsesoup.training.plan import LoopHooks
from sparsesoup.training.state import TrainState
from tiny_loops import BATCHES, KEPT, STEPS, Loop, loss_of, make_optimizer, own_problem, prunable

pytestmark = pytest.mark.filterwarnings("ignore:before the first weights are masked a weight can travel")

COMPARED: dict[str, Method] = {
    "gradual": METHODS["gradual"],
    "magnitude": METHODS["magnitude"],
    "wanda": Wanda(batches=4),
    "platon": Platon(every_steps=5, window=5),
    "gradual-obs": GradualOBS(prunings=3, batches=4),
    "grain": Grain(structure="rows"),
    "isp": InstantSoup(stages=3, weak_masks=3, budget="extra"),
    "isp-fresh": InstantSoup(stages=2, weak_masks=2, budget="extra", moments="fresh", merge="union"),
    "isp-code": InstantSoupCode(stage=0.1, weak=0.1, weak_masks=2),  # in epochs, of 32 steps
    "gradient-flow": replace(METHODS["gradient-flow"], batches=2),
    "movement": METHODS["movement"],
    "movement-from-magnitude": MovementPruning(start="magnitude"),
    "magnitude-ste": METHODS["magnitude-ste"],
    "power-propagation": METHODS["power-propagation"],
}


@pytest.mark.parametrize("name", COMPARED)
def test_masks_and_weights_are_those_of_our_loop_to_the_bit(name: str) -> None:
    loop, method = Loop(), COMPARED[name]
    ticket = method.run(own_problem(), 0.7)
    pruner = loop.attach(method)
    loop.train()
    masks = pruner.finish()
    assert count_kept(masks) == KEPT
    assert same(masks, ticket.masks)
    assert same(loop.model.state_dict(), ticket.weights)
    weak = {"isp": 9, "isp-fresh": 4, "isp-code": ticket.cost.get("weak", {}).get("steps")}.get(name, 0)
    assert pruner.cost.steps == weak


def test_look_aheads_that_are_not_used_leave_no_trace() -> None:
    """With votes that change nothing the loop ends bit-equal to one without look-aheads, random states included."""
    plain, looked = Loop(), Loop()
    method = InstantSoup(stages=3, weak_masks=3, budget="extra", look_ahead=0.05)
    first = plain.attach(replace(METHODS["isp-no-soup"], stages=3))  # type: ignore[call-arg]
    plain.train()
    second = looked.attach(method)
    second.phases = [replace(p, end=q.end) for p, q in _paired(second, first)]
    looked.train()
    assert same(first.finish(), second.finish())
    assert same(plain.model.state_dict(), looked.model.state_dict())
    assert second.cost.steps == 3 * 3 * 3 > first.cost.steps == 0


def _paired(second: Pruner, first: Pruner) -> list[Any]:
    """Each phase with the one that has its name in the plan without look-aheads; forks with themselves."""
    known = {p.name: p for p in first.phases}
    return [(p, known.get(p.name, p)) for p in second.phases]


def test_random_states_modes_and_gradients_stay_as_they_are() -> None:
    loop = Loop()
    loop.attach("isp", sparsity=0.5)
    loop.model.eval()
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    for p in loop.model.parameters():
        p.grad = torch.ones_like(p)
    loop.optimizer.param_groups[0]["lr"] = 0.5
    with torch.no_grad():
        loop.model(BATCHES[0]["x"])  # the first forward pass begins the plan
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert not any(module.training for module in loop.model.modules())
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in loop.model.parameters())
    assert loop.optimizer.param_groups[0]["lr"] == 0.5
    assert set(loop.optimizer.param_groups[0]) == set(make_optimizer(Net()).param_groups[0])


def test_only_steps_that_happened_count() -> None:
    """With accumulation over two batches T is the number of optimizer steps, not of batches."""
    loop = Loop()
    pruner = loop.attach("gradual", steps=10)
    for step, batch in zip(range(20), loop.rows(), strict=False):
        loss_of(loop.model, batch).backward()
        if step % 2:
            loop.optimizer.param_groups[0]["lr"] = 1e-2
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        assert pruner.step == (step + 1) // 2
    assert count_kept(pruner.finish()) == KEPT


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_overflows_does_not_count(fused: bool) -> None:
    loop = Loop(fused)
    pruner = loop.attach(Platon(every_steps=5, window=5), steps=30)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, batch in zip(range(34), loop.rows(), strict=False):
        for group in loop.optimizer.param_groups:
            group["lr"] = 1e-2
        scaler.scale(loss_of(loop.model, batch)).backward()
        if step in (3, 9, 10, 20):  # forced overflows
            next(iter(loop.model.parameters())).grad.fill_(float("inf"))  # type: ignore[union-attr]
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.zero_grad()
    assert pruner.step == 30
    assert count_kept(pruner.finish()) == KEPT
    assert all(bool(p.isfinite().all()) for p in loop.model.parameters())


def test_a_scaled_gradient_is_observed_without_its_scale() -> None:
    """The masks of platon do not depend on a scaler whose factor is a power of two, fused or not."""
    found = []
    for fused, scale in ((True, 1.0), (True, 2.0**12), (False, 2.0**12)):
        loop = Loop(fused)
        loop.model.dropout.p = 0.0
        pruner = loop.attach(Platon(every_steps=5, window=5), steps=30)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        for batch, _ in zip(loop.rows(), range(30), strict=False):
            for group in loop.optimizer.param_groups:
                group["lr"] = 1e-2
            scaler.scale(loss_of(loop.model, batch)).backward()
            scaler.step(loop.optimizer)
            scaler.update()
            loop.optimizer.zero_grad()
        found.append(pruner.finish())
    assert same(found[0], found[1])
    agree = sum(int((found[0][n] == found[2][n]).sum()) for n in found[0]) / 2000
    assert agree > 0.99  # another implementation of the same step


def test_a_loop_goes_on_from_its_state() -> None:
    for name in ("platon", "isp", "magnitude", "movement", "soft-movement", "power-propagation"):
        method = COMPARED.get(name, SoftMovement(score_rate=0.5))  # whose controller does not know the loop's schedule
        whole = Loop()
        pruner = whole.attach(method)
        whole.train()
        expected = pruner.finish()
        first, saved = Loop(), dict[str, Any]()
        pruner = first.attach(method)
        first.train(0, 33)
        saved |= copy.deepcopy(
            {"m": first.model.state_dict(), "o": first.optimizer.state_dict(), "p": pruner.state_dict()}
        )
        second = Loop()
        second.model.load_state_dict(saved["m"])
        second.optimizer.load_state_dict(saved["o"])
        again = second.attach(method)
        again.load_state_dict(saved["p"])
        second.train(33)
        assert same(again.finish(), expected)
        assert same(second.model.state_dict(), whole.model.state_dict())
    with pytest.raises(UserError, match="attach as before"):
        Loop().attach("gradual").load_state_dict(saved["p"])


def test_masks_hold_after_every_step_and_beyond_the_end() -> None:
    loop = Loop()
    pruner = loop.attach("gradual")
    seen: list[float] = []

    def check(step: int) -> None:
        params = dict(loop.model.named_parameters())
        assert not any(bool(params[n][~m].any()) for n, m in pruner.masks.items())
        seen.append(pruner.sparsity)

    loop.train(after=check)
    assert seen == sorted(seen)
    loop.train(STEPS, STEPS + 5, check)
    assert seen[-1] == pytest.approx(0.7)
    pruner.finish()
    hooks = [loop.model._forward_pre_hooks, *(p._post_accumulate_grad_hooks or {} for p in loop.model.parameters())]
    assert not any(hooks)


def test_weights_are_masked_again_only_after_something_has_written_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every masking is a pass over all prunable weights, in each step of the user's loop."""
    masked: list[int] = []
    plain = pruner_module.apply_masks_
    monkeypatch.setattr(pruner_module, "apply_masks_", lambda *given: masked.append(1) or plain(*given))
    loop = Loop()
    pruner = loop.attach("gradual")
    loop.train()
    assert count_kept(pruner.finish()) == KEPT
    assert not masked


def test_a_hook_that_writes_weights_cannot_revive_pruned_ones() -> None:
    loop = Loop()
    pruner = loop.attach("gradual")
    own = pruner.phases[0].loop
    assert own is not None
    pruner.phases = [replace(pruner.phases[0], loop=lambda run: LoopHooks([*own(run).hooks, _revive]))]
    loop.train()
    params = dict(loop.model.named_parameters())
    assert not any(bool(params[n][~m].any()) for n, m in pruner.finish().items())


def _revive(state: TrainState) -> None:
    with torch.no_grad():
        for parameter in state.prunable_parameters().values():
            parameter.add_(1.0)


def test_a_loop_that_ends_early_is_told_what_it_has() -> None:
    loop = Loop()
    pruner = loop.attach("gradual")
    loop.train(0, 20)
    with pytest.raises(UserError, match=r"ended at step 20 of 60, at sparsity 0\.\d+ of 0.7"):
        pruner.finish()
    assert 0 < 1 - count_kept(pruner.finish(early=True)) / 2000 < 0.7


def test_a_learning_rate_of_the_methods_own_is_a_factor_that_is_taken_off_again() -> None:
    loop = Loop()
    pruner = loop.attach("gmp-star")
    used: list[float] = []
    loop.optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    loop.model.train()
    for batch, _ in zip(loop.rows(), range(STEPS), strict=False):
        loop.optimizer.param_groups[0]["lr"] = 0.01
        loss_of(loop.model, batch).backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        assert loop.optimizer.param_groups[0]["lr"] == 0.01
    phase = METHODS["gmp-star"].plan(own_problem().size, 0.7)[0]
    assert phase.rate is not None
    assert used == pytest.approx([phase.rate(step) for step in range(STEPS)])
    assert count_kept(pruner.finish()) == KEPT


def test_an_optimizer_that_we_do_not_know_keeps_its_plain_values_and_the_zeros() -> None:
    class Odd(torch.optim.Optimizer):
        """Sign descent that counts its steps as a plain number, and moves every weight."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    slot = self.state[p]
                    slot["count"] = slot.get("count", 0) + 1
                    if p.grad is not None:
                        p.data.add_(p.grad.sign() + 0.01, alpha=-group["lr"])

    loop = Loop()
    loop.optimizer = Odd(loop.model.parameters(), {"lr": 1e-3})
    pruner = loop.attach("isp", batches=BATCHES, sparsity=0.5)
    loop.rate = lambda step: 1e-3  # type: ignore[assignment]
    loop.train()
    masks = pruner.finish()
    assert all(loop.optimizer.state[p]["count"] == STEPS for p in loop.model.parameters())
    params = dict(loop.model.named_parameters())
    assert count_kept(masks) == 1000
    assert not any(bool(params[n][~m].any()) for n, m in masks.items())


def test_wrapped_models_are_pruned_inside() -> None:
    loop = Loop()
    wrapped = nn.DataParallel(loop.model)
    pruner = attach(wrapped, loop.optimizer, "gradual", 0.7, steps=STEPS, prunable=prunable)
    loop.train()  # the loop calls the model inside
    assert set(pruner.finish()) == {"blocks.0.weight", "blocks.1.weight", "wide.weight"}
    assert pruner.sparsity == pytest.approx(0.7)


def test_a_module_of_that_name_is_a_part_of_the_model() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 2)

    model = Owner()
    pruner = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), "magnitude", 0.5, steps=1)
    assert set(pruner.masks) == {"module.0.weight", "module.1.weight"}


def test_by_default_all_linear_layers_but_the_last_are_pruned() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    pruner = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), "magnitude", 0.5, steps=1)
    assert set(pruner.masks) == {"0.weight", "2.weight"}
    model = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 1))  # two with a side of 1
    pruner = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), "magnitude", 0.5, steps=1)
    assert set(pruner.masks) == {"2.weight"}


@pytest.mark.parametrize(
    ("method", "given", "says"),
    [
        ("imp", {}, "goes back to an earlier step"),
        ("pins", {}, "has a teacher in its loss"),
        ("model-soup", {}, "goes back to an earlier step"),
        ("l0", {}, "masks biases or samples gates"),
        ("hybrid-movement", {}, "masks biases or samples gates"),
        ("isp", {"batches": None}, "needs batches of its own"),
        ("wanda", {"loss": None}, "needs batches of its own"),
        ("snip", {"batches": []}, "is empty"),
        ("gradual", {"prunable": lambda name, p: "bias" in name}, "is no matrix"),
        ("gradual", {"prunable": lambda name, p: False}, "found nothing to prune in Net"),
        ("gradual", {"steps": 3}, "3 steps are too few"),
        ("gradual", {"steps": "10"}, "steps: must be the optimizer steps of the loop, got '10'"),
        ("gradual", {"steps": 2.5}, r"steps: must be the optimizer steps of the loop, got 2\.5"),
        (
            "gradual",
            {"sparsity": 90},
            r"sparsity: the share .* is in \[0, 1\), got 90; for 90 % set 0.9",
        ),
        ("gradual", {"sparsity": 1.5}, "got 1.5"),
        ("gradual", {"sparsity": 1.0}, "got 1; for 90 % set 0.9"),
        ("gradual", {"sparsity": float("nan")}, "got nan"),
        ("gradual", {"sparsity": "2:4"}, "is a number in .* got '2:4'"),
        ("ISP", {}, "unknown method 'ISP'; did you mean isp"),
        (None, {}, "a method is a name such as 'isp', or an object such as InstantSoup.., got None"),
        (InstantSoup, {}, "a method is a name such as 'isp'"),
        ("nonsense", {}, "unknown method 'nonsense'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(method: Any, given: dict[str, Any], says: str) -> None:
    loop = Loop()
    before = copy.deepcopy(loop.model.state_dict())
    given = {"sparsity": 0.0 if method == "model-soup" else 0.7, **given}
    with pytest.raises(UserError, match=says) as caught:
        loop.attach(method, **given).step  # noqa: B018
    assert not loop.model._forward_pre_hooks
    assert "\n" not in str(caught.value)
    assert same(before, loop.model.state_dict())


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    loop = Loop()
    loop.optimizer = make_optimizer(copy.deepcopy(loop.model))
    with pytest.raises(UserError, match="not trained by this optimizer"):
        loop.attach("gradual")
    with pytest.raises(UserError, match="is no torch optimizer"):
        attach(loop.model, object(), steps=10)


def test_a_model_that_a_pruner_holds_is_refused_until_that_has_finished() -> None:
    loop = Loop()
    pruner = loop.attach("gradual")
    before = copy.deepcopy(loop.model.state_dict())
    says = "another pruner .gradual. has hooks on this Net; end it first with finish"
    for again in (
        lambda: loop.attach("magnitude"),
        lambda: prune_once(loop.model, [], "magnitude"),
        lambda: prune("magnitude", model=loop.model, train_dataset=[1], steps=1, loss=lambda model, batch: batch[0]),
    ):
        with pytest.raises(UserError, match=says):
            again()
    assert same(before, loop.model.state_dict())
    assert len(loop.model._forward_pre_hooks) == 1
    pruner.finish(early=True)
    loop.attach("magnitude")


def test_a_loss_for_look_aheads_that_is_none_is_named() -> None:
    loop = Loop()
    loop.attach(InstantSoup(stages=2, weak_masks=2, budget="extra"), loss=lambda model, batch: None)
    with pytest.raises(UserError, match=r"loss: the loss of a batch must be a tensor of one number.* got None"):
        loop.train()


def test_a_plan_in_epochs_is_one_of_the_loops_batches_and_ends_at_the_target() -> None:
    """Plan and run once had different epochs: isp-code ended before its last pruning, at 0.652, in silence."""
    loop = Loop()
    with pytest.raises(UserError, match=r"30 steps are too few: isp-code with 11 or more stages of 16 steps"):
        loop.attach("isp-code", steps=30)
    with pytest.warns(UserWarning, match="have one step, at a rate of 0, and move nothing"):
        loop.attach(InstantSoupCode(stage=0.1, weak=0.01, weak_masks=1)).remove_hooks()


def test_masks_that_miss_the_target_are_named() -> None:
    loop = Loop()
    pruner = loop.attach("gradual")
    pruner.phases = [replace(phase, loop=None) for phase in pruner.phases]  # a plan that prunes nothing
    loop.train()
    with pytest.warns(UserWarning, match=r"gradual to 0.7 in 60 steps> ended at sparsity 0.000: its plan has not"):
        pruner.finish()
