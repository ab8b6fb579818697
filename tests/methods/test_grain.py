"""GRAIN: importance by loops, gradients apart, whole groups in one ranking, heads of their own widths cut out."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import same, tiny, watched
from sparsesoup.core.errors import UserError
from sparsesoup.core.groups import structured_groups
from sparsesoup.core.masks import count_kept, count_total, sparsity
from sparsesoup.core.targets import target_parameters
from sparsesoup.hub.models.cut_layers import layer_widths
from sparsesoup.loops.attach import attach
from sparsesoup.methods.grain import Grain, best_masks
from sparsesoup.methods.live_features import head_densities, sparsity_with_biases
from sparsesoup.methods.scores.group_importance import GroupImportance
from sparsesoup.study.cost.flops_model import FlopsModel, plan_costs
from sparsesoup.training.config import DistillConfig, TrainingConfig
from sparsesoup.training.distillation import distillation_objective
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState
from tiny_bert import bert
from tiny_exports import narrow_model

LAYER = "bert.encoder.layer.{}."
PARTS = {"query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
         "output": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}  # fmt: skip
SIZE = 8  # of the two heads in each of two layers; 32 units


def averages(problem: Problem, regularization: float = 0.0, decay: float = 0.0) -> GroupImportance:
    groups = structured_groups("features-and-units", problem.targets)
    return GroupImportance(groups=groups, decay=decay, regularization=regularization)


def one_gradient(problem: Problem, seed: int = 0) -> TrainState:
    """A state whose parameters have the gradients of a batch."""
    state = problem.start_run()
    state.model.eval()
    problem.criterion(problem.predict(state.model, batch := problem.train.batch([0, 1, 2, 3])), batch).backward()
    return state


def by_loops(state: TrainState, layer: int, kind: str, side: str) -> list[float]:
    """|sum g w| of each group over one side, one product after the other."""
    owner = state.model.get_submodule(LAYER.format(layer) + PARTS[side])
    weight, gradient = owner.weight.tolist(), owner.weight.grad.tolist()
    bias, slope = owner.bias.tolist(), owner.bias.grad.tolist()
    found = []
    for group in range(32 if kind == "units" else 16):
        if side in ("output", "down"):
            total = sum(weight[row][group] * gradient[row][group] for row in range(16))
        else:
            total = sum(w * g for w, g in zip(weight[group], gradient[group], strict=True))
            total += bias[group] * slope[group]
        found.append(abs(total))
    return found


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("kind", "number", "sides"),
    [("query-key", 0, ("query", "key")), ("value-output", 1, ("output", "value")), ("units", 4, ("down",))],
)
def test_importance_is_that_of_loops_and_the_same_from_both_sides_of_a_product(layer, kind, number, sides) -> None:
    """A query feature times c and its key over c compute the same, so their sums are equal; as with value, output."""
    problem = bert(torch.float64)
    state, average = one_gradient(problem), averages(problem)
    average.observe_gradients(state)
    found = state.memory[f"importance/{2 * layer + number if kind != 'units' else 4 + layer}"]
    for side in sides:
        # The bias of a key adds the same to all logits of a query: its product is no part of the features' effect.
        assert found.tolist() == pytest.approx(by_loops(state, layer, kind, side), rel=1e-8, abs=1e-12)


def test_the_average_starts_at_zero_and_forgets_by_its_decay() -> None:
    problem = bert(torch.float64)
    state, average = one_gradient(problem), averages(problem, decay=0.75)
    now = averages(problem)
    now.observe_gradients(state)
    each = {key: value.clone() for key, value in state.memory.items()}
    state.memory.clear()
    for _ in range(2):
        average.observe_gradients(state)
    assert all(torch.allclose(state.memory[key], 0.4375 * value) for key, value in each.items())


def test_a_feature_counts_by_the_density_of_its_head() -> None:
    problem = bert(torch.float64)
    state = one_gradient(problem)
    value, output = (LAYER.format(0) + PARTS[part] + ".weight" for part in ("value", "output"))
    masks = dict(state.masks)
    masks[value] = masks[value].clone()
    masks[value][2:8] = False  # two of eight features of the first head are left
    state.masks = masks
    assert head_densities(value, output, masks, state.targets).tolist() == [0.25, 1.0]
    plain, regular = ({}, {})
    for found, average in ((plain, averages(problem)), (regular, averages(problem, 0.3))):
        state.memory.clear()
        average.observe_gradients(state)
        found |= {key: value.clone() for key, value in state.memory.items()}
    factor = torch.tensor([0.25] * 8 + [1.0] * 8).div(0.3).tanh()
    assert torch.allclose(regular["importance/1"], plain["importance/1"] * factor)
    whole = plain["importance/3"] * torch.tensor(1 / 0.3).tanh()
    assert torch.allclose(regular["importance/3"], whole)
    assert all(regular[f"importance/{n}"].equal(plain[f"importance/{n}"]) for n in (0, 2, 4, 5))
    state.memory.clear()
    averages(problem, 1e-6).observe_gradients(state)  # towards 0 it is the rule without
    assert same(state.memory, plain)


def with_teacher(hidden: float, **changes: Any) -> Problem:
    problem = bert(torch.float64, **changes)
    teacher = copy.deepcopy(problem.pretrained)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    settings = DistillConfig(teacher="there", alpha=1.0, temperature=8.0, hidden=hidden)
    return replace(problem, objective=distillation_objective(problem, teacher, settings))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_gradient_of_hidden_states_moves_the_weights_and_scores_nothing(accumulate: int) -> None:
    training = TrainingConfig(
        learning_rate=1e-3, batch_size=4, gradient_accumulation_steps=accumulate, max_grad_norm=0.0
    )
    scored, moved = [], []
    for hidden, split in ((0.0, True), (5.0, True), (5.0, False)):
        problem = with_teacher(hidden, training=training, steps=8)
        state, average = problem.start_run(), averages(problem)
        train(state, problem, 1, observe=average.observe_gradients, split=split, rate=lambda step: 1e-3)
        scored.append({key: value.clone() for key, value in state.memory.items()})
        moved.append({name: p.detach().clone() for name, p in state.prunable_parameters().items()})
    assert all(torch.allclose(scored[0][key], scored[1][key], rtol=1e-9) for key in scored[0])
    assert not any(torch.allclose(scored[1][key], scored[2][key], rtol=1e-2) for key in scored[0])
    assert all(torch.allclose(moved[1][name], moved[2][name], rtol=0, atol=1e-9) for name in moved[0])
    assert not any(torch.allclose(moved[0][name], moved[1][name], rtol=0, atol=1e-5) for name in moved[0])


def test_the_second_backward_pass_is_on_the_meter_as_in_the_plan() -> None:
    flops = {}
    for hidden in (0.0, 5.0):
        problem = with_teacher(hidden, steps=10)
        Grain().run(problem, 0.4)
        planned = plan_costs(Grain().plan(problem.size, 0.4), problem, FlopsModel(problem))
        found = problem.meter.costs["main"]
        assert found.steps == planned["main"].steps == 10
        assert found.flops == planned["main"].flops
        flops[hidden] = found.flops
    assert flops[5.0] > flops[0.0]


def grained(sparsity: float = 0.45, **more: Any) -> tuple[Any, Problem, Any]:
    with watched() as watch:
        training = TrainingConfig(learning_rate=3e-3, batch_size=8)
        problem = bert(torch.float64, steps=40, training=training, observer=watch)
        return Grain(**{"decay": 0.9, **more}).run(problem, sparsity), problem, watch


@pytest.mark.parametrize("share", [0.2, 0.45, 0.8, 0.95])
def test_the_sparsity_is_that_of_whole_groups_in_both_units(share: float) -> None:
    ticket, _, watch = grained(share)
    goal = round((1 - share) * 4096)
    assert goal - 32 < count_kept(ticket.masks) <= goal
    for early, late in zip(watch.pruned, watch.pruned[1:], strict=False):
        assert all(not (late[n] & ~early[n]).any() for n in early)
    kept, total = 0, 0
    for layer in range(2):
        w = {part: ticket.masks[LAYER.format(layer) + path + ".weight"] for part, path in PARTS.items()}
        for asks, keys in zip(w["query"], w["key"], strict=True):
            assert bool(asks.all()) == bool(asks.any()) == bool(keys.all()) == bool(keys.any())
            kept, total = kept + 34 * bool(asks.any()), total + 34
        for into, out in ((w["value"], w["output"]), (w["up"], w["down"])):
            for row, column in zip(into, out.T, strict=True):
                assert bool(row.all()) == bool(row.any()) == bool(column.all()) == bool(column.any())
                kept, total = kept + 33 * bool(row.any()), total + 33
        for head in range(2):
            band = slice(SIZE * head, SIZE * head + SIZE)
            assert w["value"][band].any() or not w["query"][band].any()
    assert ticket.notes["sparsity_with_biases"] == pytest.approx(1 - kept / total)
    assert abs(ticket.notes["sparsity_with_biases"] - sparsity(ticket.masks)) < 0.01


@pytest.mark.parametrize("share", [0.45, 0.9])
def test_the_compact_model_has_ragged_heads_and_answers_alike(share: float) -> None:
    ticket, problem, _ = grained(share)
    narrow = narrow_model(problem, ticket)
    rows = layer_widths(narrow).values()
    widths = [w for row in rows for key in ("query_key", "value_output") for w in row.get("narrow", {}).get(key, [])]
    assert len(set(widths)) > 2
    left = 32 * (sum(widths) + sum(row["units"] for row in rows))
    assert left == count_kept(ticket.masks)


def test_a_head_that_gives_nothing_asks_nothing_and_its_room_goes_to_the_next_best() -> None:
    problem = bert(torch.float64)
    state, average = problem.start_run(), averages(problem)
    for number, count in enumerate((16, 16, 16, 16, 32, 32)):
        state.memory[f"importance/{number}"] = torch.arange(1.0, count + 1) + 100.0 * number
    state.memory["importance/0"] += 1e4  # the first layer's query-key features are the best of all
    state.memory["importance/1"][:8] = 0.0  # its first head's value-output ones are the worst
    masks = best_masks(state, average, 8 * 32 / 4096)
    name = {part: LAYER.format(0) + path + ".weight" for part, path in PARTS.items()}
    assert not masks[name["query"]][:8].any()
    assert not masks[name["value"]][:8].any()
    assert masks[name["query"]][8:].all()
    assert count_kept(masks) == 4096 - 16 * 32  # sixteen groups of one head, where eight would have been enough
    # With half of the weights gone there is room for others again, up to the target.
    assert count_kept(best_masks(state, average, 0.5)) == count_total(masks) // 2


def test_biases_of_rows_count_and_those_of_outputs_do_not() -> None:
    problem = bert()
    state = problem.start_run()
    biases = dict(state.model.named_parameters())
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in target_parameters(state.model, state.targets).items()}
    name = LAYER.format(0) + PARTS["query"] + ".weight"
    masks[name] = masks[name].clone()
    masks[name][:3] = False
    # 4,096 weights; 16 biases in each of query, key, value and 32 of the units, in two layers.
    assert sparsity_with_biases(masks, state.targets, biases) == pytest.approx(3 * 17 / (4096 + 2 * 80))


def test_settings_that_make_no_sense_and_models_without_features_are_refused() -> None:
    for settings, said in (
        ({"decay": 1.0}, "decay"),
        ({"regularization": -1.0}, "regularization"),
        ({"stop": 0.1}, r"^start: must be below stop, got 0\.2, with stop at 0\.1; lower start or raise stop$"),
        ({"start": -0.1}, r"^start: must be a share of T, at least 0, got -0\.1$"),
    ):
        with pytest.raises(UserError, match=said):
            Grain(**settings)
    with pytest.raises(UserError, match="has no features and no units to prune"):
        Grain().run(tiny(), 0.5)
    with pytest.raises(UserError, match=r"steps are too few: the ramp of grain needs at least \d+"):
        Grain().run(bert(steps=2), 0.3)
    assert isinstance(Grain(structure="rows").run(tiny(), 0.5).masks["wide.weight"], Tensor)


def test_in_a_loop_of_ones_own_weights_and_biases_are_both_seen_before_clipping() -> None:
    problem = bert(torch.float64)
    state, average, model = one_gradient(problem), averages(problem), copy.deepcopy(problem.pretrained).eval()
    average.observe_gradients(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = attach(model, optimizer, Grain(decay=0.0, regularization=0.0), steps=10, sparsity=0.4)
    batch = problem.train.batch([0, 1, 2, 3])
    problem.criterion(problem.predict(model, batch), batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.warns(UserWarning, match="trained in eval mode"):  # so that no dropout makes another gradient
        optimizer.step()
    found = {k.removeprefix("memory/"): t for k, t in pruner.state_dict()["tensors"].items() if k.startswith("memory/")}
    assert found.keys() == state.memory.keys()
    assert all(torch.allclose(found[key], value, rtol=1e-9) for key, value in state.memory.items())
