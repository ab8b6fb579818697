"""The training loop: what holds after every step."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsesoup.training.loop
from conftest import Watch, same, tiny
from sparsesoup.core.errors import UserError
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import Masks
from sparsesoup.methods.scores import magnitude
from sparsesoup.training.batching import Batch
from sparsesoup.training.config import TrainingConfig, TrainingOverrides
from sparsesoup.training.loop import train
from sparsesoup.training.overrides import find_dropouts
from sparsesoup.training.state import TrainState

OPTIMIZERS = ("adamw", "adam", "sgd", "rmsprop")
BASE = TrainingConfig(learning_rate=1e-2, batch_size=16)


def weights(state: TrainState) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in state.model.named_parameters()}


def half(state: TrainState, sparsity: float = 0.5) -> Masks:
    return topk_masks(magnitude(state.prunable_parameters()), sparsity, within=state.masks)


@pytest.mark.parametrize("protocol", [None, TrainingOverrides(share=0.5, dropout=0.3)])
@pytest.mark.parametrize("stream", [(), ("weak", 1, 2)])
def test_training_in_two_halves_is_training_at_once(
    stream: tuple[object, ...], protocol: TrainingOverrides | None
) -> None:
    once, twice = tiny(), tiny()
    one = train(once.start_run(), once, 30, stream=stream, protocol=protocol)
    other = twice.start_run()
    for steps in (17, 0, 13):
        train(other, twice, steps, stream=stream, protocol=protocol)
    assert same({**one.tensors()}, {**other.tensors()})
    assert one.step == other.step == 30


def test_streams_differ_in_rows_and_noise() -> None:
    problem = tiny()
    found = [weights(train(problem.start_run(), problem, 3, stream=s)) for s in ((), ("weak", 0), ("weak", 1))]
    assert not same(found[0], found[1])
    assert not same(found[1], found[2])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masks_hold_at_every_forward_while_a_hook_changes_them(optimizer: str) -> None:
    seen = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if model.training:
            params = state.prunable_parameters()
            assert all(not params[n][~m].any() for n, m in state.masks.items())
            seen.append(sum(int(m.sum()) for m in state.masks.values()))
        return functional.cross_entropy(model(batch["x"]), batch["labels"])

    settings = replace(BASE, learning_rate=2e-3, weight_decay=0.1, optimizer=optimizer)
    problem = tiny(training=settings, objective=loss)
    state = problem.start_run()

    def hook(state: TrainState) -> None:
        if state.step in (6, 12):
            state.set_masks_(half(state, state.step / 15))

    train(state, problem, 20, hooks=[hook])
    assert seen == [2000] * 6 + [1200] * 6 + [400] * 8
    assert all(not p[~state.masks[n]].any() for n, p in state.prunable_parameters().items())


def test_masks_hold_even_where_a_hook_writes_into_dead_weights_or_sets_the_masks_itself() -> None:
    problem = tiny()
    state = problem.start_run()

    def average(state: TrainState) -> None:
        if state.step == 2:
            state.masks = half(state)
        with torch.no_grad():
            for p in state.prunable_parameters().values():
                p += 0.01

    train(state, problem, 4, hooks=[average])
    assert sum(int((p == 0).sum()) for p in state.prunable_parameters().values()) == 1000
    assert all(not p[~state.masks[n]].any() for n, p in state.prunable_parameters().items())


@pytest.mark.parametrize("how", ["reads", "writes", "replaces"])
def test_the_masks_are_applied_after_a_hook_only_if_it_wrote_weights(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tiny()
    state = problem.start_run()
    state.set_masks_(half(state))
    applied: list[int] = []
    real = sparsesoup.training.loop.apply_masks_

    def count(params: dict[str, Tensor], masks: Masks) -> None:
        applied.append(state.step)
        real(params, masks)

    def hook(state: TrainState) -> None:
        weight = state.prunable_parameters()["blocks.0.weight"]
        if how == "writes" and state.step == 2:
            with torch.no_grad():
                weight.add_(0.01)
        if how == "replaces" and state.step == 2:
            weight.data = weight.data + 0.01

    monkeypatch.setattr(sparsesoup.training.loop, "apply_masks_", count)
    train(state, problem, 4, hooks=[hook])
    assert applied == ([4] if how == "reads" else [2, 4])  # the last one is that at the end
    assert all(not p[~state.masks[n]].any() for n, p in state.prunable_parameters().items())


def test_a_training_on_the_cpu_touches_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    forked = []
    real = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda **given: forked.append(given["devices"]) or real(**given))
    problem = tiny()
    train(problem.start_run(), problem, 1)
    assert forked == [set()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masks_that_a_hook_sets_itself_clear_the_moments_too(optimizer: str) -> None:
    problem = tiny(training=replace(BASE, learning_rate=2e-3, optimizer=optimizer))
    state = problem.start_run()

    def cut(state: TrainState) -> None:
        if state.step == 3:
            state.masks = half(state)

    train(state, problem, 3, hooks=[cut])
    for name, p in state.prunable_parameters().items():
        dead = ~state.masks[name]
        moments = [t for t in state.optimizer.state[p].values() if t.shape == p.shape]
        assert moments
        assert not any(t[dead].any() for t in (p, *moments))


def test_after_a_run_the_gradients_are_the_users_own_again() -> None:
    problem = tiny()
    state = problem.start_run()
    state.set_masks_(half(state))
    train(state, problem, 2)
    problem.training_loss(state.model, problem.train.batch(range(16))).backward()
    for name, p in state.prunable_parameters().items():
        assert p.grad is not None
        assert p.grad[~state.masks[name]].any()


def test_masks_hold_from_the_first_forward_on() -> None:
    seen = []
    problem = tiny(
        objective=lambda model, batch: seen.append(int((model.wide.weight == 0).sum())) or model(batch["x"]).sum()
    )
    state = problem.start_run()
    state.masks = half(state)
    train(state, problem, 1)
    assert seen == [int((~state.masks["wide.weight"]).sum())]


def test_dead_gradients_do_not_spend_the_clip_norm() -> None:
    """Against steps written out by hand, with a loss that pulls dead weights a million times as hard."""
    mask = half(tiny().start_run())
    dead = {n: ~m for n, m in mask.items()}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        pull = sum((p * dead[n]).sum() for n, p in model.named_parameters() if n in dead)
        return functional.cross_entropy(model(batch["x"]), batch["labels"]) + 1e6 * pull

    settings = replace(BASE, optimizer="sgd", max_grad_norm=0.05, weight_decay=0.0)
    problem = tiny(training=settings, objective=loss)
    state = problem.start_run()
    state.set_masks_(mask)
    drops(state.model, 0.0)
    train(state, problem, 3)

    hand = problem.start_run()
    hand.set_masks_(mask)
    drops(hand.model, 0.0)
    optimizer = torch.optim.SGD(hand.model.parameters(), momentum=0.9)
    order = problem.train.train_batches(16, 0, 0)
    for step in range(3):
        batch = problem.train.batch(next(order))
        functional.cross_entropy(hand.model(batch["x"]), batch["labels"]).backward()
        for n, p in hand.prunable_parameters().items():
            assert p.grad is not None
            p.grad[dead[n]] = 0.0
        norm = torch.cat([p.grad.flatten() for p in hand.model.parameters() if p.grad is not None]).norm()
        assert norm > 0.05  # or the clip would not be seen
        for p in hand.model.parameters():
            assert p.grad is not None
            p.grad *= 0.05 / norm
        optimizer.param_groups[0]["lr"] = problem.rate_schedule()(step)
        optimizer.step()
        optimizer.zero_grad()
    start = dict(problem.pretrained.named_parameters())
    for n, p in hand.model.named_parameters():
        assert not p.equal(start[n])
        torch.testing.assert_close(dict(state.model.named_parameters())[n], p, rtol=1e-4, atol=1e-8)


def drops(model: nn.Module, value: float) -> None:
    for owner, name, _ in find_dropouts(model):
        setattr(owner, name, value)


def test_no_dropout_of_an_encoder_and_decoder_is_left_out() -> None:
    """BART keeps three of its dropouts as plain numbers."""
    from transformers import BartConfig, BartModel

    sides = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 50}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "max_position_embeddings": 16}
    model = BartModel(BartConfig(**sides, **heads, dropout=0.3, attention_dropout=0.3, activation_dropout=0.3)).train()
    words = torch.arange(3, 11)[None]

    def said() -> Tensor:
        return model(input_ids=words).last_hidden_state.detach()

    assert not said().equal(said())
    drops(model, 0.0)
    assert said().equal(said())


def test_no_clip_means_no_clip() -> None:
    def first_move(clip: float) -> float:
        problem = tiny(training=replace(BASE, optimizer="sgd", max_grad_norm=clip, weight_decay=0.0, warmup_ratio=0.0))
        state = train(problem.start_run(), problem, 1)
        start = dict(problem.pretrained.named_parameters())
        return float(torch.cat([(p - start[n].detach()).flatten() for n, p in weights(state).items()]).norm())

    assert first_move(0.01) == pytest.approx(0.01 * 1e-2, rel=1e-3)
    assert first_move(0.0) == pytest.approx(first_move(1e9), rel=1e-5)
    assert first_move(0.0) > 2 * first_move(0.01)


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_accumulated_gradients_are_those_of_one_batch_of_all_their_rows(parts: int) -> None:
    def run(steps: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        size = BASE.batch_size // steps
        problem = tiny(training=replace(BASE, optimizer="sgd", batch_size=size, gradient_accumulation_steps=steps))
        assert problem.training.rows_per_step == BASE.batch_size
        state = problem.start_run()
        drops(state.model, 0.0)
        train(state, problem, 5)
        return weights(state), problem.meter.to_json()["main"]

    (whole, cost), (cut, same_cost) = run(1), run(parts)
    for n, p in whole.items():
        torch.testing.assert_close(cut[n], p, rtol=1e-4, atol=1e-6)
    assert {k: v for k, v in cost.items() if k != "seconds"} == {k: v for k, v in same_cost.items() if k != "seconds"}


def test_bf16_trains_float32_weights() -> None:
    low = tiny(training=replace(BASE, precision="bf16"))
    inner = []
    state = low.start_run()
    handle = state.model.wide.register_forward_hook(lambda module, args, out: inner.append(out.dtype))
    train(state, low, 10)
    handle.remove()
    assert set(inner) == {torch.bfloat16}
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
    assert {t.dtype for s in state.optimizer.state.values() for t in s.values()} == {torch.float32}
    full = tiny()
    assert not same(weights(state), weights(train(full.start_run(), full, 10)))
    assert low.validate(state.model)["accuracy"] > 0.4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_with_the_step_and_the_state_before_it(bad: float) -> None:
    count = 0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal count
        count += 1
        return model(batch["x"]).sum() * (bad if count == 8 else 1e-3)

    problem = tiny(objective=loss)
    state = train(problem.start_run(), problem, 7)
    before = {n: t.detach().clone() for n, t in state.tensors().items()}
    with pytest.raises(
        UserError, match=rf"^the loss is -?{bad} at step 8 of the main training; .* \(now 0\.01\)"
    ) as caught:
        train(state, problem, 7)
    assert "\n" not in str(caught.value)
    assert state.step == 7
    assert same(dict(state.tensors()), before)
    assert all(p.grad is None for p in state.model.parameters())
    assert problem.meter.to_json()["main"]["steps"] == 7


def test_the_learning_rate_is_a_function_of_the_step() -> None:
    watch = Watch()
    problem = tiny(observer=watch)
    state = problem.start_run()
    train(state, problem, 25)
    train(state, problem, 35)
    assert watch.curve("rate") == [problem.rate_schedule()(step) for step in range(60)]
    assert watch.curve("step") == list(range(1, 61))
    train(state, problem, 2, rate=lambda step: step / 100)
    assert watch.curve("rate")[-2:] == [0.6, 0.61]


def test_the_rate_moves_the_weights_and_zero_moves_none() -> None:
    problem = tiny(training=replace(BASE, weight_decay=0.1))
    state = problem.start_run()
    before = weights(state)
    train(state, problem, 3, rate=lambda step: 0.0)
    assert same(weights(state), before)


def test_dropout_of_the_training_holds_in_it_and_an_override_goes_first() -> None:
    problem = tiny(training=replace(BASE, dropout=0.3))
    state = problem.start_run()
    own = [value for *_, value in find_dropouts(state.model)]
    seen: list[set[float]] = []

    def look(state: TrainState) -> None:
        seen.append({value for *_, value in find_dropouts(state.model)})

    train(state, problem, 1, hooks=[look])
    train(state, problem, 1, hooks=[look], protocol=TrainingOverrides(weight_decay=0.1))
    train(state, problem, 1, hooks=[look], protocol=TrainingOverrides(dropout=0.0))
    assert seen == [{0.3}, {0.3}, {0.0}]
    assert [value for *_, value in find_dropouts(state.model)] == own
    for value in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match=r"a probability in \[0, 1\)"):
            TrainingConfig(dropout=value)


def test_a_protocols_settings_hold_during_its_run_and_are_put_back() -> None:
    problem = tiny(training=replace(BASE, weight_decay=0.03))
    state = problem.start_run()
    seen = []

    def look(state: TrainState) -> None:
        seen.append(
            ([g["weight_decay"] for g in state.optimizer.param_groups], [v for *_, v in find_dropouts(state.model)])
        )

    protocol = TrainingOverrides(weight_decay=0.4, dropout=0.25)
    train(state, problem, 1, hooks=[look])
    train(state, problem, 2, hooks=[look], protocol=protocol)
    train(state, problem, 1, hooks=[look], protocol=TrainingOverrides())
    assert seen == [([0.03, 0.0], [0.1]), *[([0.4, 0.0], [0.25])] * 2, ([0.03, 0.0], [0.1])]

    def fail(state: TrainState) -> None:
        raise RuntimeError("in the midst")

    with pytest.raises(RuntimeError):
        train(state, problem, 1, hooks=[fail], protocol=protocol)
    look(state)
    assert seen[-1] == ([0.03, 0.0], [0.1])


def test_each_setting_of_a_protocol_changes_what_is_learnt() -> None:
    problem = tiny()

    def run(protocol: TrainingOverrides | None) -> dict[str, Tensor]:
        return weights(train(problem.start_run(), problem, 3, protocol=protocol))

    plain = run(None)
    assert same(plain, run(TrainingOverrides()))
    for change in ({"weight_decay": 0.3}, {"dropout": 0.0}, {"dropout": 0.4}, {"share": 0.5}):
        assert not same(plain, run(TrainingOverrides(**change))), change


def test_a_share_of_the_rows_is_all_that_a_run_sees() -> None:
    seen: set[float] = set()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        seen.update(batch["x"][:, 0].tolist())
        return model(batch["x"]).sum()

    problem = tiny(objective=loss)
    train(problem.start_run(), problem, 60, protocol=TrainingOverrides(share=0.25))
    assert len(seen) == 64


def test_impossible_protocols_are_refused() -> None:
    for change in ({"rate": -1.0}, {"share": 0.0}, {"share": 1.5}, {"dropout": 1.0}, {"dropout": -0.1}):
        with pytest.raises(UserError, match="protocol"):
            TrainingOverrides(**change)


def test_the_users_random_numbers_are_left_alone() -> None:
    problem = tiny()
    state = problem.start_run()
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    train(state, problem, 3)
    assert torch.rand(4).equal(expected)


def test_hooks_come_in_order_after_the_step_and_before_the_masks() -> None:
    problem, calls = tiny(), []
    state = problem.start_run()
    state.set_masks_(half(state))

    def first(state: TrainState) -> None:
        calls.append(("first", state.step))
        with torch.no_grad():
            state.prunable_parameters()["wide.weight"].fill_(1.0)

    def second(state: TrainState) -> None:
        calls.append(("second", state.step))
        assert state.prunable_parameters()["wide.weight"].all()

    train(state, problem, 2, hooks=iter([first, second]))
    assert calls == [("first", 1), ("second", 1), ("first", 2), ("second", 2)]
    assert (state.prunable_parameters()["wide.weight"] != 0).equal(state.masks["wide.weight"])


def test_a_hook_may_halt() -> None:
    watch = Watch()
    problem = tiny(observer=watch)

    def stop(state: TrainState) -> None:
        state.halt = state.step == 4

    state = train(problem.start_run(), problem, 20, hooks=[stop])
    assert (state.step, len(watch.records)) == (4, 4)
    assert problem.meter.to_json()["main"]["steps"] == 4


def test_a_penalty_is_learnt_from_and_the_log_tells_the_loss_without_it() -> None:
    watch = Watch()
    problem = tiny(observer=watch)
    plain = train(problem.start_run(), problem, 1)
    pulled = train(
        problem.start_run(),
        problem,
        1,
        penalty=lambda state: 1e3 + state.prunable_parameters()["wide.weight"].pow(2).sum(),
    )
    assert watch.records[1]["loss"] == watch.records[0]["loss"]
    assert not same(weights(plain), weights(pulled))
    with pytest.raises(UserError, match=r"^the loss is nan at step 1 of the main training; what"):
        train(
            problem.start_run(),
            problem,
            1,
            penalty=lambda state: state.prunable_parameters()["wide.weight"].sum() * torch.nan,
        )


def test_gradients_are_observed_before_they_are_clipped_and_after_the_dead_are_zeroed() -> None:
    seen = []
    problem = tiny(training=replace(BASE, max_grad_norm=1e-3))
    state = problem.start_run()
    state.set_masks_(half(state))

    def observe(state: TrainState) -> None:
        for name, parameter in state.prunable_parameters().items():
            assert parameter.grad is not None
            assert not parameter.grad[~state.masks[name]].any()
        seen.append(sum(float(p.grad.square().sum()) for p in state.model.parameters() if p.grad is not None) ** 0.5)

    train(state, problem, 3, observe=observe)
    assert len(seen) == 3
    assert min(seen) > 1e-2


def test_decay_is_for_matrices_alone() -> None:
    groups = tiny(training=replace(BASE, weight_decay=0.3)).start_run().optimizer.param_groups
    assert [(g["weight_decay"], {p.dim() for p in g["params"]}) for g in groups] == [(0.3, {2}), (0.0, {1})]


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"weight_decay": float("inf")},
        {"max_grad_norm": -0.5},
        {"warmup_ratio": 1.0},
        {"batch_size": 0},
        {"gradient_accumulation_steps": 0},
    ],
)
def test_impossible_settings_are_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(change))}: "):
        TrainingConfig(**change)
