"""Powerpropagation, PLATON and PINS on real architectures: tiny transformers of random weights, in both precisions."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, XLNetConfig, XLNetModel

from sparsesoup.core.masks import count_kept, count_total
from sparsesoup.core.rng import cpu_generator
from sparsesoup.hub.build import ModelAndDataConfig, build_problem, open_task
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.hub.tasks.metrics import predict_logits
from sparsesoup.methods import METHODS
from sparsesoup.methods.gates.powerpropagation import attach_power, fold_power_
from sparsesoup.methods.soft_movement_and_l0 import SoftMovement
from sparsesoup.training.batching import RowBatches
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.problem import Problem
from tiny_hub import CONFIGS, FAMILIES, tokenizer

pytestmark = pytest.mark.integration


def rows(count: int, seed: int) -> RowBatches:
    draw = cpu_generator(seed, "rows")
    ids = torch.randint(5, 40, (count, 7), generator=draw)

    def collate(some: Any) -> dict[str, torch.Tensor]:
        batch = torch.stack(list(some))
        return {"input_ids": batch, "attention_mask": torch.ones_like(batch), "labels": batch[:, 1] % 2}

    return RowBatches(list(ids), collate)


def problem_of(family: str, precision: Any = "no") -> Problem:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS[family]())
    return Problem(
        pretrained=model,
        targets=find_prunable(model),
        train=rows(64, 1),
        validation=rows(32, 2),
        predict=predict_logits,
        criterion=lambda outputs, batch: torch.nn.functional.cross_entropy(outputs.float(), batch["labels"]),
        metric=lambda outputs, labels: {"accuracy": float((outputs.argmax(1) == labels).float().mean())},
        steps=20,
        training=TrainingConfig(learning_rate=1e-3, batch_size=8, precision=precision),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gate_goes_on_and_off_every_architecture(family: str) -> None:
    problem = problem_of(family)
    model, batch = copy.deepcopy(problem.pretrained).eval(), problem.train.batch(range(8))
    with torch.no_grad():
        before = predict_logits(model, batch)
        attach_power(model, problem.targets, 2.0)
        gated = predict_logits(model, batch)
        fold_power_(model, problem.targets)
        after = predict_logits(model, batch)
    assert gated.allclose(before, atol=1e-5)
    assert after.equal(gated)
    assert model.state_dict().keys() == problem.pretrained.state_dict().keys()


@pytest.mark.parametrize(("family", "precision"), [*((f, "no") for f in FAMILIES), ("bert", "bf16")])
@pytest.mark.parametrize("name", ["power-propagation", "platon", "pins"])
def test_every_architecture_is_pruned_to_the_asked_sparsity(name: str, family: str, precision: str) -> None:
    problem = problem_of(family, precision)
    ticket = METHODS[name].run(problem, 0.6)
    assert count_kept(ticket.masks) == round(0.4 * count_total(ticket.masks))
    fresh = copy.deepcopy(problem.pretrained)
    fresh.load_state_dict(ticket.weights)
    assert all(t.dtype == problem.pretrained.state_dict()[n].dtype for n, t in ticket.weights.items())
    assert not any(fresh.get_parameter(n)[~m].any() for n, m in ticket.masks.items())
    assert problem.validate(fresh.eval())["accuracy"] == pytest.approx(ticket.metrics["accuracy"], abs=0.1)


def test_xlnet_which_knows_no_longest_row_and_keeps_stacks_of_matrices_is_masked_weight_by_weight(
    place: Path, tmp_path: Path
) -> None:
    XLNetModel(XLNetConfig(vocab_size=64, d_model=16, d_inner=32, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    tokenizer(False).save_pretrained(tmp_path)
    where = ModelAndDataConfig(model=str(tmp_path), dataset=str(place / "reviews"))
    problem = build_problem(where, open_task(where), steps=8, training=TrainingConfig(batch_size=8))
    assert {len(target.shape) for target in problem.targets.values()} == {2, 3}
    ticket = SoftMovement(score_rate=2.0).run(problem, 0.6)
    assert count_kept(ticket.masks) == round(0.4 * count_total(ticket.masks))
