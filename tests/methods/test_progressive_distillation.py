"""Sparse progressive distillation: what is grafted and when, what is trained, and what the student ends as."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import Watch, same, tiny
from killed_runs import finish_killed_run
from sparsesoup.core.errors import UserError
from sparsesoup.core.masks import apply_masks_
from sparsesoup.core.targets import names_in_blocks, target_parameters
from sparsesoup.methods import METHODS
from sparsesoup.methods.gradual import pruning_hook
from sparsesoup.methods.progressive_distillation import SparseProgressiveDistillation
from sparsesoup.study.cost.flops_model import FlopsModel, plan_costs
from sparsesoup.training.config import DistillConfig, TrainingConfig
from sparsesoup.training.distillation import distillation_objective
from sparsesoup.training.loop import train
from sparsesoup.training.overrides import only_trained
from tiny_bert import bert
from tiny_vit import images

METHOD = SparseProgressiveDistillation()


def dense(make: Any) -> dict[str, Tensor]:
    return METHODS["dense"].run(make(), 0.0).weights


@pytest.mark.parametrize("make", [tiny, bert, images])
def test_without_grafts_it_is_plain_distillation_with_pruning_to_the_bit(make: Any) -> None:
    method, problem = replace(METHOD, graft=0.0), make()
    ticket = method.run(problem, 0.6)
    other = make()
    teacher = copy.deepcopy(other.pretrained)
    teacher.load_state_dict(dense(make))
    state = other.start_run()
    state.model.load_state_dict(teacher.state_dict())
    blocks = 2.0
    layers = 0.0 if make is tiny else 2.0
    settings = DistillConfig(teacher="x", alpha=1.0, temperature=1.0, hidden=blocks, attention=layers)
    with_teacher = replace(other, objective=distillation_objective(other, teacher, settings))
    schedule = method.plan(other.size, 0.6)[1].masks_final
    assert schedule == round(0.5 * other.steps)
    hook = pruning_hook(method, _schedule(other.steps), 0.6)
    hook(state)
    names = [name for name, _ in state.model.named_parameters()]
    with only_trained(state.model, names_in_blocks(names, state.targets)):
        train(state, with_teacher, other.steps, hooks=[hook])
    assert same(ticket.masks, state.masks)
    assert same(ticket.weights, {n: t.detach() for n, t in state.model.state_dict().items()})


def _schedule(total: int) -> Any:
    from sparsesoup.core.schedules import CubicSchedule

    return CubicSchedule(0, round(0.5 * total), max(1, round(0.05 * total)))


@pytest.mark.parametrize("make", [bert, images])
def test_with_every_block_grafted_the_answers_are_the_teachers_and_no_gradient_is_left(make: Any) -> None:
    problem = make()
    method = replace(METHOD, graft=1.0)
    run = method.start_run(problem, 0.5)
    with torch.no_grad():
        for p in run.own.parameters():
            p.mul_(1.1)
    for name, p in run.state.model.named_parameters():  # embeddings and head are the teacher's
        if not names_in_blocks([name], problem.targets):
            p.data.copy_(run.own.get_parameter(name))
    run.state.model.eval()
    batch = problem.train.batch(range(6))
    with only_trained(run.state.model, names_in_blocks(dict(run.state.model.named_parameters()), problem.targets)):
        loss = run.with_teacher.training_loss(run.state.model, batch)
        loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert all(p.grad is None for p in run.state.model.parameters())


def test_a_run_with_every_block_grafted_at_every_step_is_its_masked_teacher() -> None:
    """So it is never trained; and the scores are of the student alone, which the teacher does not answer for."""
    method, problem = replace(METHOD, graft=1.0, constant=1.0, alone=1.0), bert()
    ticket, teacher = method.run(problem, 0.9), dense(bert)
    for name, t in ticket.weights.items():
        assert t.equal(teacher[name] * ticket.masks[name] if name in ticket.masks else teacher[name]), name
    model = copy.deepcopy(problem.pretrained)
    model.load_state_dict(teacher)
    apply_masks_(target_parameters(model, problem.targets), ticket.masks)
    assert ticket.metrics == bert().validate(model)
    assert ticket.weights.keys() == problem.pretrained.state_dict().keys()


def test_only_the_blocks_are_trained_after_the_teacher() -> None:
    ticket, teacher, problem = METHOD.run(bert(), 0.5), dense(bert), bert()
    inside = {*names_in_blocks(ticket.weights, problem.targets)}
    for name, t in ticket.weights.items():
        assert t.equal(teacher[name]) == (name not in inside), name


def test_blocks_are_drawn_with_the_probability_of_the_step() -> None:
    problem = bert(steps=3000)
    run = METHOD.start_run(problem, 0.5)
    found = []
    for step in range(1000):
        run.state.step = step
        found.append(METHOD._draw_grafts(problem, run.state))
        assert found[-1] == METHOD._draw_grafts(problem, run.state)
    for block in ("bert.encoder.layer.0", "bert.encoder.layer.1"):
        share = sum(block in names for names in found) / 1000
        assert abs(share - 0.2) < 3 * (0.2 * 0.8 / 1000) ** 0.5
    both = sum(len(names) == 2 for names in found) / 1000
    assert abs(both - 0.04) < 3 * (0.04 * 0.96 / 1000) ** 0.5
    shares = [METHOD.teacher_share(step, 3000) for step in (0, 1499, 1500, 1750, 1999, 2000, 2999)]
    assert shares == pytest.approx([0.2, 0.2, 0.2, 0.1, 0.2 / 500, 0.0, 0.0])
    assert replace(METHOD, constant=1.0, alone=1.0).teacher_share(2999, 3000) == 0.2


def test_grafting_changes_what_is_learnt_and_not_what_it_costs() -> None:
    runs = []
    for graft in (0.0, 0.5):
        problem, method = bert(), replace(METHOD, graft=graft)
        planned = plan_costs(method.plan(problem.size, 0.5), problem, FlopsModel(problem))
        ticket = method.run(problem, 0.5)
        assert {k: c.flops for k, c in planned.items()} == {k: c.flops for k, c in problem.meter.costs.items()}
        runs.append((ticket, {k: c.flops for k, c in planned.items()}))
    assert runs[0][1] == runs[1][1]
    assert not same(runs[0][0].weights, runs[1][0].weights)


def test_a_plan_costs_to_the_flop_what_a_run_on_images_does() -> None:
    problem = images()
    planned = plan_costs(METHOD.plan(problem.size, 0.5), problem, FlopsModel(problem))
    METHOD.run(problem, 0.5)
    assert {k: c.flops for k, c in planned.items()} == {k: c.flops for k, c in problem.meter.costs.items()}


@pytest.mark.parametrize(("kills", "steps"), [(4, 6), (2, 11)])  # 22 steps are 8 of the student, while grafts decline
def test_a_run_killed_in_each_stage_ends_with_the_same_bits(
    kills: int, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0.0 < METHOD.teacher_share(8, 14) < METHOD.graft
    whole = METHOD.run(bert(steps=14), 0.6)
    again = finish_killed_run(METHOD, partial(bert, steps=14), 0.6, tmp_path, monkeypatch, kills=kills, steps=steps)
    assert same(again.masks, whole.masks)
    assert same(again.weights, whole.weights)


def test_a_teacher_that_is_given_costs_no_training_and_teaches_as_the_runs_own() -> None:
    own = METHOD.run(bert(), 0.6)
    teacher = copy.deepcopy(bert().pretrained)
    teacher.load_state_dict(dense(bert))
    training = replace(bert().training, distill=DistillConfig(teacher="it"))
    given = METHOD.run(bert(training=training, teacher=teacher), 0.6)
    assert same(own.weights, given.weights)
    assert own.cost["teacher"]["steps"] == own.cost["main"]["steps"] == 8
    assert "teacher" not in given.cost


def test_the_rate_may_start_again_after_the_last_pruning() -> None:
    watch = Watch()
    replace(METHOD, restart=True).run(tiny(observer=watch, steps=20), 0.5)
    rates = watch.curve("rate")
    assert rates[0] == rates[10] == 1e-2
    assert rates[:10] == sorted(rates[:10], reverse=True)
    assert rates[9] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"training": TrainingConfig(distill=DistillConfig(teacher="it", alpha=0.9))}, "its own weights and temper"),
        (
            {"teacher": nn.Linear(2, 2), "training": TrainingConfig(distill=DistillConfig(teacher="it"))},
            "another shape",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_in_one_line(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        METHOD.run(tiny(**changes), 0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings", [{"graft": 1.1}, {"constant": 0.8}, {"alone": 1.5}, {"hidden": -1.0}, {"temperature": 0.0}]
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        replace(METHOD, **settings)
