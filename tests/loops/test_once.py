"""Pruning without training: SparseGPT against closed forms, wanda behind pruned blocks, exact counts, N:M."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config

from conftest import same
from sparsesoup import SparseGpt, UserError, attach, prune_once
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.rng import cpu_generator
from sparsesoup.methods.scores.sparsegpt import sparsegpt
from tiny_hub import CONFIGS


def layer(seed: int, rows: int = 24, columns: int = 40, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """Weights and correlated inputs."""
    draw = cpu_generator(seed, "layer")
    mix = torch.randn(columns, columns, generator=draw) / columns**0.5 + 0.5 * torch.eye(columns)
    scale = torch.rand(columns, generator=draw) * 3
    return torch.randn(rows, columns, generator=draw), torch.randn(tokens, columns, generator=draw) @ mix * scale


def error(new: Tensor, old: Tensor, x: Tensor) -> float:
    return float(((new - old) @ x.T).square().sum())


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_the_layer_error_is_below_that_of_masks_without_update(sparsity: float | str) -> None:
    for seed in range(20):
        w, x = layer(seed)
        share = 0.5
        nm = "2:4" if sparsity == "2:4" else None
        new, mask = sparsegpt(w, x.T @ x, share, nm or "global", block=16)
        norms = x.square().sum(0).sqrt()
        scope = nm or "tensor"
        by_size = w * topk_masks({"w": w.abs()}, share, scope=scope)["w"]
        by_input = w * topk_masks({"w": w.abs() * norms}, share, scope=nm or "row")["w"]
        assert error(new, w, x) < min(error(by_size, w, x), error(by_input, w, x))
        assert int((~mask).sum()) == w.numel() // 2
        assert not bool(new[~mask].any())


@pytest.mark.parametrize("sparsity", [0.1, 0.33, 0.5, 0.771])
def test_exactly_as_many_weights_go_as_asked(sparsity: float) -> None:
    w, x = layer(3, rows=7, columns=45)
    _, mask = sparsegpt(w, x.T @ x, sparsity, block=16)
    assert int((~mask).sum()) == round(sparsity * w.numel())


def test_the_first_removal_is_that_of_the_optimal_brain_surgeon() -> None:
    """One row, one block, one weight removed: w - w_q H^-1[:, q] / H^-1[q, q] for the columns at and after q."""
    for seed in range(5):
        w, x = layer(seed, rows=1, columns=8)
        w[0, 0] = 1e-6  # the one that goes: all other columns lie to its right
        hessian = x.T @ x
        new, mask = sparsegpt(w, hessian, 1 / 8, damp=0.0)
        assert mask.tolist() == [[False] + 7 * [True]]
        inverse = torch.linalg.inv(hessian.double())
        closed = w.double() - w[0, 0].double() * inverse[0] / inverse[0, 0]
        assert torch.allclose(new.double(), closed * mask, atol=1e-6)


def test_uncorrelated_inputs_give_magnitude_pruning() -> None:
    w, _ = layer(1, columns=32)
    new, mask = sparsegpt(w, torch.eye(32), 0.5)
    assert torch.equal(mask, topk_masks({"w": w.abs()}, 0.5, scope="tensor")["w"])
    assert torch.allclose(new, w * mask)


def test_dead_inputs_lose_their_weights_and_do_no_harm() -> None:
    w, x = layer(2)
    x[:, [3, 17]] = 0.0
    new, _ = sparsegpt(w, x.T @ x, 0.5)
    assert bool(new.isfinite().all())
    assert not bool(new[:, [3, 17]].any())


def slow_wanda(model: nn.Module, batch: dict[str, Tensor], names: list[str]) -> None:
    """Block by block with plain hooks: each block's inputs behind the pruned ones before it."""
    for block in ("bert.encoder.layer.0.", "bert.encoder.layer.1."):
        norms: dict[str, Tensor] = {}
        inside = [name for name in names if name.startswith(block)]
        handles = [
            model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                lambda module, given, name=name, norms=norms: norms.__setitem__(
                    name, given[0][batch["attention_mask"].bool()].square().sum(0).sqrt()
                )
            )
            for name in inside
        ]
        with torch.no_grad():
            model(**batch)
            for handle in handles:
                handle.remove()
            for name in inside:
                weight = dict(model.named_parameters())[name]
                score = weight.abs() * norms[name]
                for row in range(len(weight)):
                    worst = score[row].argsort(stable=True)[: weight.shape[1] // 2]
                    weight[row, worst] = 0.0


def test_wanda_goes_from_block_to_block_and_leaves_padding_out() -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS["bert"]()).eval()
    slow = copy.deepcopy(model)
    ids = torch.randint(5, 60, (6, 10))
    batch = {
        "input_ids": ids,
        "attention_mask": (torch.arange(10) < torch.tensor([[4], [10], [7], [5], [9], [10]])).long(),
    }
    masks = prune_once(model, [batch], "wanda", 0.5)
    slow_wanda(slow, batch, list(masks))
    assert same(model.state_dict(), slow.state_dict())
    assert all(2 * int(mask.sum()) == mask.numel() for mask in masks.values())


@pytest.mark.parametrize("method", ["magnitude", "random", "wanda", "sparsegpt"])
def test_a_decoder_is_pruned_two_to_four_along_its_inputs(method: str) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=32)
    model = AutoModelForCausalLM.from_config(config)
    batches = [{"input_ids": torch.randint(0, 64, (4, 12))} for _ in range(3)]
    masks = prune_once(model, batches, method, "2:4")  # type: ignore[arg-type]
    assert len(masks) == 8
    for name, mask in masks.items():
        turned = mask.T  # Conv1D is stored [in, out]
        assert bool((turned.reshape(len(turned), -1, 4).sum(-1) == 2).all())
        assert not bool(dict(model.named_parameters())[name][~mask].any())
    assert model.training
    torch.manual_seed(0)
    again = AutoModelForCausalLM.from_config(config)
    chosen = prune_once(again, batches, method, "2:4", prunable=lambda name, parameter: name in masks)
    assert same(chosen, masks)


def test_sparsegpt_prunes_in_a_foreign_loop_and_snip_takes_a_loss() -> None:
    """The loop's masks are those of its first step; snip and grasp score by the model's own loss, or one given."""
    x, y = torch.randn(32, 8, generator=cpu_generator(0, "x")), torch.arange(32) % 2
    rows = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))

    looped, once = network(), network()
    optimizer = torch.optim.SGD(looped.parameters(), lr=0.0)
    chosen = SparseGpt(batches=4)
    pruner = attach(looped, optimizer, chosen, sparsity=0.5, steps=2, loss=loss, batches=rows)
    for batch in rows[:2]:
        loss(looped, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    masks = pruner.finish()
    assert same(masks, prune_once(once, rows, chosen, 0.5, forward=lambda model, batch: model(batch[0])))
    assert same(looped.state_dict(), once.state_dict())
    for name in ("snip", "grasp"):
        assert sum(int(m.sum()) for m in prune_once(network(), rows, name, 0.5, loss=loss).values()) == 192


def test_what_cannot_be_is_refused_in_one_line() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    for given, says in (
        ({"method": "wanda"}, "wanda needs batches"),
        ({"batches": None}, "batches: must be batches of tensors, such as a DataLoader, got None"),
        ({"batches": ["a text"]}, "a batch is 'a text'; give mappings, tuples or lists of tensors"),
        ({"batches": [1]}, "a batch is 1; give mappings"),
        ({"batches": [torch.ones(2, 6)]}, "a batch is a Tensor; show how the model reads it, with forward=lambda"),
        ({"batches": [torch.ones(2, 6)], "method": "snip", "loss": lambda m, x: m(x)}, r"got a tensor of shape .2, 2."),
        ({"method": "imp"}, "imp does not prune without training .0 steps are too few"),
        ({"method": 3}, "a method is a name such as"),
        ({"prunable": lambda name: True, "method": "magnitude"}, "prunable: it is called with .name, parameter."),
        ({"method": "magnitude", "sparsity": "3:4"}, "a share in .0, 1. or one of 1:4, 2:4, 4:8, got 3:4"),
        ({"method": "magnitude", "sparsity": 1.0}, "got 1; for 90 % set 0.9"),
        ({"method": "magnitude", "sparsity": "2:4"}, "0.weight"),
    ):
        with pytest.raises(UserError, match=says):
            prune_once(model, **given)  # type: ignore[arg-type]
