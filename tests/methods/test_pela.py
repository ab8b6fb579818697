"""PELA: factors against the singular values, what is trained and priced, and the way back to stock shapes."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import same, tiny
from killed_runs import finish_killed_run
from sparsesoup.core.errors import UserError
from sparsesoup.core.low_rank import merge_layers_, product_of, rank_at, split_layers_, svd_factors
from sparsesoup.core.targets import Target
from sparsesoup.methods.pela import Pela
from sparsesoup.study.cost.flops_model import FlopsModel, plan_costs
from sparsesoup.training.config import TrainingConfig
from tiny_bert import bert
from tiny_vit import images


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_the_error_of_the_factors_is_the_root_of_the_dropped_squares(shape: tuple[int, int], rank: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    first, second = svd_factors(weight, rank)
    assert (first.shape, second.shape) == ((rank, shape[1]), (shape[0], rank))
    dropped = torch.linalg.svdvals(weight)[rank:].square().sum().sqrt()
    assert float((second @ first - weight).norm()) == pytest.approx(float(dropped), abs=1e-10)
    assert torch.allclose(first @ first.T, second.T @ second)  # each has the roots of the singular values


@pytest.mark.parametrize("compression", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (20, 60), (3, 2)])
def test_two_factors_have_at_most_their_share_of_the_weights(shape: tuple[int, int], compression: float) -> None:
    out, inside = shape
    rank = rank_at(shape, compression)
    assert rank == max(1, (out * inside) // (compression * (out + inside)))
    assert rank == 1 or rank * (out + inside) <= out * inside / compression < (rank + 1) * (out + inside)


@pytest.mark.parametrize("make", [bert, images])
def test_at_full_rank_the_split_model_answers_alike_and_merges_back(make: Any) -> None:
    problem = make()
    dense = problem.pretrained.eval()
    model, batch = copy.deepcopy(dense), problem.train.batch(range(6))
    names = {name.removesuffix(".weight"): min(target.shape) for name, target in problem.targets.items()}
    split_layers_(model, names)
    assert sum(isinstance(m, nn.Sequential) for m in model.modules()) == len(names)
    with torch.no_grad():
        wanted = problem.predict(dense, batch)
        torch.testing.assert_close(problem.predict(model, batch), wanted, rtol=1e-4, atol=1e-5)
        merge_layers_(model, names)
        torch.testing.assert_close(problem.predict(model, batch), wanted, rtol=1e-4, atol=1e-5)
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in dense.named_parameters()]


def test_a_plan_is_priced_without_a_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    def decompose(weight: Any, rank: int) -> Any:
        raise AssertionError("a decomposition takes longer than all the rest of a dry run")

    monkeypatch.setattr("sparsesoup.core.low_rank.svd_factors", decompose)
    problem = tiny()
    assert plan_costs(Pela().plan(problem.size, 0.0), problem, FlopsModel(problem))
    with pytest.raises(AssertionError, match="a decomposition"):
        Pela().run(problem, 0.0)


@pytest.mark.parametrize("make", [tiny, bert, images])
@pytest.mark.parametrize("intermediate", [0.0, 0.5, 1.0])
def test_every_matrix_ends_at_its_rank_and_plan_and_meter_agree(make: Any, intermediate: float) -> None:
    problem = make(training=TrainingConfig(learning_rate=1e-3, batch_size=8, eval_steps=5))
    method = Pela(compression=3.0, intermediate=intermediate)
    planned = plan_costs(method.plan(problem.size, 0.0), problem, FlopsModel(problem))
    ticket = method.run(problem, 0.0)
    assert {k: c.flops for k, c in planned.items()} == {k: c.flops for k, c in problem.meter.costs.items()}
    left = 0
    for name, target in problem.targets.items():
        rank = rank_at(target.shape, 3.0)
        values = torch.linalg.svdvals(ticket.weights[name].double())
        assert values[rank:].max() < 1e-5 * values[0] < values[rank - 1]
        left += rank * sum(target.shape)
        assert ticket.masks[name].all()
    facts = ticket.notes["low_rank"]
    assert facts["left"] == left
    assert facts["removed"] == pytest.approx(1 - left / facts["weights"])
    assert facts["removed"] >= 1 - 1 / facts["compression"]
    assert ticket.weights.keys() == problem.pretrained.state_dict().keys()


def test_the_intermediate_loss_is_that_of_the_formula() -> None:
    problem, method = bert(), Pela(compression=2.0, hidden=3.0, perturbation=5.0, bound=0.01)
    run = method.start_run(problem, 0.0)
    model, batch = run.state.model.eval(), problem.train.batch(range(6))
    assert run.with_teacher is not None
    loss = run.with_teacher.training_loss(model, batch).item()
    plain = replace(method, hidden=0.0, perturbation=0.0).start_run(problem, 0.0)
    features = replace(method, perturbation=0.0).start_run(problem, 0.0)
    assert plain.with_teacher is not None
    assert features.with_teacher is not None
    task = problem.training_loss(model, batch).item()
    assert plain.with_teacher.training_loss(model, batch).item() == pytest.approx(task)
    with torch.no_grad():
        found = [m(**batch, output_hidden_states=True).hidden_states[1:] for m in (model, problem.pretrained.eval())]
        real = batch["attention_mask"].bool()
        apart = [
            sum(float((a[i, r] - b[i, r]).square().mean()) for i, r in enumerate(real)) / len(real)
            for a, b in zip(*found, strict=True)
        ]
        change = [
            float((product_of(model.get_submodule(n.removesuffix(".weight"))) - problem.pretrained.get_parameter(n))
                  .abs().max()) for n in problem.targets
        ]  # fmt: skip
    hidden = 3.0 * sum(apart) / len(apart)
    assert features.with_teacher.training_loss(model, batch).item() == pytest.approx(task + hidden, rel=1e-5)
    bounded = 5.0 * sum(max(0.0, c - 0.01) ** 2 for c in change) / len(change)
    assert loss == pytest.approx(task + hidden + bounded, rel=1e-5)


def test_a_change_within_the_bound_costs_nothing() -> None:
    problem = bert()
    run = Pela(hidden=0.0, bound=100.0).start_run(problem, 0.0)
    assert run.with_teacher is not None
    batch, model = problem.train.batch(range(6)), run.state.model.eval()
    assert run.with_teacher.training_loss(model, batch).item() == pytest.approx(
        problem.training_loss(model, batch).item()
    )


def test_a_run_killed_in_each_phase_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Pela().run(bert(steps=14), 0.0)
    again = finish_killed_run(Pela(), partial(bert, steps=14), 0.0, tmp_path, monkeypatch, kills=2, steps=5)
    assert same(again.weights, whole.weights)
    assert again.metrics == whole.metrics
    assert again.notes == whole.notes


def test_a_share_is_refused_with_the_compression_that_removes_it() -> None:
    with pytest.raises(UserError, match=r"share of 0\.75 with method\.compression 4$"):
        Pela().run(tiny(), 0.75)


def test_what_is_no_linear_layer_is_refused() -> None:
    problem = tiny()
    problem.pretrained.wide = nn.Conv1d(20, 60, 1)
    targets = {**problem.targets, "wide.weight": Target("other", (60, 20, 1))}
    with pytest.raises(UserError, match=r"low rank is for linear layers, and wide\.weight is in a Conv1d"):
        Pela().run(replace(problem, targets=targets), 0.0)


@pytest.mark.parametrize("settings", [{"compression": 1.0}, {"intermediate": 1.5}, {"bound": -1.0}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError):
        Pela(**settings)  # type: ignore[arg-type]
