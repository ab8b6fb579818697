"""Embeddings that are not trained: they stay to the bit, all else learns."""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config

from conftest import tiny
from sparsesoup.core.errors import UserError
from sparsesoup.methods import METHODS
from sparsesoup.methods.one_shot import DenseFinetuning
from sparsesoup.methods.pruning_at_init import Snip
from sparsesoup.training.config import TrainingConfig
from tiny_bert import bert

FROZEN = TrainingConfig(learning_rate=1e-2, batch_size=8, freeze_embeddings=True)
GPT2 = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, pad_token_id=0)
INSIDE = {"bert": ("bert.embeddings.", 5), "gpt2": ("transformer.w", 2)}
RUNS = {"dense": DenseFinetuning(), "movement": METHODS["movement"], "imp": METHODS["imp"], "snip": Snip(warmup=0.3)}


@pytest.mark.parametrize("family", INSIDE)
@pytest.mark.parametrize("name", RUNS)
def test_frozen_embeddings_stay_and_all_else_learns(name: str, family: str) -> None:
    problem = bert(family=GPT2 if family == "gpt2" else family, training=FROZEN, steps=12)
    heads = tuple(n for n, _ in problem.pretrained.named_parameters() if n.startswith(("score", "classifier")))
    ticket = RUNS[name].run(replace(problem, head=heads), 0.0 if name == "dense" else 0.5)
    before = dict(problem.pretrained.named_parameters())
    kept = {n for n, p in before.items() if torch.equal(ticket.weights[n], p)}
    prefix, count = INSIDE[family]
    assert {n for n in before if n.startswith(prefix)} <= kept
    assert sum(n.startswith(prefix) for n in before) == count
    assert not kept & {*problem.targets, *heads}
    assert all(p.requires_grad for p in before.values())


def test_a_model_without_embeddings_is_refused() -> None:
    with pytest.raises(UserError, match="no embeddings to freeze"):
        DenseFinetuning().run(tiny(training=FROZEN), 0.0)
