"""Golden numbers: what public reference code gives on small tensors, against ours. Each file names its origin."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from conftest import tiny
from sparsesoup.core.granularity import Block, CoupledGroups, Element
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import Masks
from sparsesoup.core.schedules import CubicSchedule
from sparsesoup.core.targets import Target, target_parameters
from sparsesoup.methods.early_bird import EarlyBird
from sparsesoup.methods.gates.attach import attach_gates, gates_of
from sparsesoup.methods.gates.density import set_thresholds_
from sparsesoup.methods.gates.hard_concrete import BETA, SHIFT, HardConcrete
from sparsesoup.methods.gates.penalty_controller import SparsityController
from sparsesoup.methods.gates.score_groups import mean_gate_probability
from sparsesoup.methods.gates.straight_through import StraightThroughGate
from sparsesoup.methods.hybrid import HybridMovement
from sparsesoup.methods.learned_masks import PhaseShares, straight_through_gates
from sparsesoup.methods.pins import Pins, answer_certainty
from sparsesoup.methods.platon import Platon
from sparsesoup.methods.pruning_at_init import Grasp, Snip
from sparsesoup.methods.scores.activation import input_norms
from sparsesoup.methods.scores.averages import ImportanceAverages, Sensitivity, after_step, first_order_sensitivity
from sparsesoup.methods.scores.calibration import calibration_batches
from sparsesoup.methods.scores.gradient import (
    gradient_flow_score,
    hessian_product,
    movement_sensitivity,
    snip_sensitivity,
    task_gradient,
)
from sparsesoup.methods.wanda import Wanda
from sparsesoup.training.batching import RowBatches
from sparsesoup.training.config import DistillConfig, TrainingConfig
from sparsesoup.training.distillation import distillation_objective
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState
from tiny_bert import bert

PLACE = Path(__file__).parents[1] / "golden"


def numbers(name: str) -> Any:
    """The numbers of a file, which says where they are from."""
    found = json.loads((PLACE / f"{name}.json").read_text(encoding="utf-8"))
    assert found["origin"]
    return found


def near(found: Tensor, wanted: list[Any], rel: float = 1e-5) -> bool:
    """Return True for numbers that agree to a share of the largest: float32 sums in another order."""
    table = torch.tensor(wanted, dtype=torch.float64).view(found.shape)
    return torch.allclose(found.detach().double(), table, rtol=rel, atol=rel * float(table.abs().max()))


def bits(mask: Tensor) -> str:
    return "".join(str(int(entry)) for entry in mask.flatten())


def sparsity_of(masks: str) -> float:
    """The sparsity that asks for as many weights as a reference kept; at its threshold some keep one more or less."""
    return 1 - masks.count("1") / len(masks)


def hybrid(**more: Any) -> tuple[TrainState, SparsityController]:
    """A state with the scores of the file, and its lead, after a pass in training."""
    settings: dict[str, Any] = {"tile": Block(4, 4), "penalty": 40.0, **more}
    phases = PhaseShares(warmup=0.1, cooldown=0.2, settle=0.1)
    problem = bert(steps=100)
    run = HybridMovement(phases=phases, **settings).start_run(problem, 0.5)
    state, table = run.state, numbers("hybrid")["scores"]
    with torch.no_grad():
        for name, gate in gates_of(state.model):
            if gate.score is not None and name.removesuffix(".weight") in table:
                gate.score.copy_(torch.tensor(table[name.removesuffix(".weight")]))
        for name, parameter in state.model.named_parameters():
            if name.endswith("bias.original"):
                parameter.fill_(1.0)
    return state, run.own.hook


def penalty(state: TrainState, lead: SparsityController, step: int) -> Tensor:
    state.step = step
    lead(state)
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    state.model.train()(**batch)
    return lead.penalty_term(state)


def test_hybrid_as_published_has_the_thresholds_the_penalty_and_its_gradient_of_nn_pruning() -> None:
    """To 1e-5 of the largest: float32, summed in another order."""
    found, (state, lead) = numbers("hybrid"), hybrid()
    for row in found["schedule"]:
        term = penalty(state, lead, row["step"])
        levels = [float(gate.level.sigmoid()) for _, gate in gates_of(state.model)]
        assert levels == pytest.approx([row["threshold"]] * len(levels), abs=1e-7)
        assert term.item() == pytest.approx(row["penalty"], rel=1e-5)
    term.backward()
    for name, gate in gates_of(state.model):
        wanted = found["gradients"].get(name.removesuffix(".weight"))
        if wanted is not None:
            assert gate.score is not None
            assert gate.score.grad is not None
            assert gate.score.grad.tolist() == pytest.approx(wanted, rel=1e-5)
    uneven = found["uneven"]
    state, lead = hybrid(**{key: uneven[key] for key in ("attention_weight", "feed_forward_weight")})
    assert penalty(state, lead, 100).item() == pytest.approx(uneven["penalty"], rel=1e-5)


def test_hybrid_masks_the_weights_and_the_biases_that_nn_pruning_masks() -> None:
    state, lead = hybrid()
    penalty(state, lead, 100)
    for name, wanted in numbers("hybrid")["kept"].items():
        layer = state.model.get_submodule(name)
        assert int((layer.weight != 0).sum()) == wanted["weights"]
        assert "".join(str(int(entry != 0)) for entry in layer.bias) == wanted["biases"]


def matrix(weight: Tensor) -> Problem:
    """A problem of one prunable matrix."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = Parameter(weight.clone())
    return tiny(pretrained=nn.Sequential(layer), targets={"0.weight": Target("other", tuple(weight.shape))})


def gated(problem: Problem, score: Parameter | None) -> tuple[TrainState, StraightThroughGate]:
    """A run at its beginning, with a gate on its one matrix."""
    ties = (CoupledGroups((("0.weight", Element),)),)
    state = problem.start_run(lambda model: (attach_gates(model, ties, straight_through_gates([score])), 1.0))
    return state, next(gate for _, gate in gates_of(state.model))


@pytest.mark.parametrize("number", range(12))
def test_the_top_of_movements_scores_is_the_references(number: int) -> None:
    """Exactly, at each of twelve shapes; its gradients, where the file has them, to the bit of float32."""
    found = numbers("movement")["top_k"][number]
    shape = tuple(found["shape"])
    score = Parameter(torch.tensor(found["scores"]).view(shape))
    weight = torch.tensor(found.get("weight", found["scores"])).view(shape)
    state, gate = gated(matrix(weight), score)
    set_thresholds_(state, [1], sparsity_of(found["mask"]), "tensor")
    assert found["mask"].count("1") == int(found["keep"] * len(found["mask"]))
    assert bits(gate.mean_gate(weight)) == found["mask"]
    assert bits(topk_masks({"w": score.detach()}, sparsity_of(found["mask"]), scope="tensor")["w"]) == found["mask"]
    if "upstream" in found:
        leaf = weight.clone().requires_grad_()
        (gate(leaf) * torch.tensor(found["upstream"]).view(shape)).sum().backward()
        assert leaf.grad is not None
        assert score.grad is not None
        assert near(leaf.grad, found["weight_grad"], 1e-7)
        assert near(score.grad, found["score_grad"], 1e-7)


def test_the_top_of_magnitude_through_a_gate_is_the_references() -> None:
    for found in numbers("movement")["magnitude"]:
        weight = torch.tensor(found["weight"]).view(found["shape"])
        state, gate = gated(matrix(weight), None)
        set_thresholds_(state, [1], sparsity_of(found["mask"]), "tensor")
        assert bits(gate.mean_gate(weight)) == found["mask"]


def test_a_threshold_of_the_sigmoid_opens_what_the_reference_opens() -> None:
    for found in numbers("movement")["threshold"]:
        score = torch.tensor(found["scores"]).view(found["shape"])
        gate, level = (
            StraightThroughGate(Parameter(score), Element, 0, 0),
            torch.logit(torch.tensor(found["threshold"])),
        )
        gate.level.copy_(gate.floored_threshold(level, found["floor"]) if found["floor"] else level)
        assert bits(gate.mean_gate(torch.ones(found["shape"]))) == found["mask"]


def test_the_published_threshold_schedules_are_one_cubic_curve() -> None:
    """Movement's share and threshold with the penalty's weight, PLATON's and PINS' share, oBERT's prunings: to 1e-9."""
    for found in numbers("movement")["schedule"]:
        plan = CubicSchedule(found["start"], found["stop"])
        for step, threshold, penalty in found["values"]:
            change = plan.sparsity_at(step, abs(found["final"] - found["initial"]))
            assert abs(threshold - found["initial"]) == pytest.approx(change, abs=1e-9)
            if found["penalty"]:
                assert penalty == pytest.approx(found["penalty"] * plan.sparsity_at(step, 0.5) / 0.5, abs=1e-6)
    for name in ("platon", "pins"):
        plan = CubicSchedule(20, 160, 10)
        for step, share, prunes in numbers("platon")[name]["schedule"]:
            assert 1 - plan.sparsity_at(step, 0.6) == pytest.approx(share, abs=1e-9)
            if 20 < step <= 160:
                assert plan.is_pruning_step(step) == prunes
    for found in numbers("schedules")["cubic"]:
        plan = CubicSchedule(found["start"], found["stop"], found["every"], initial=found["first"])
        assert all(plan.is_pruning_step(epoch) for epoch, _ in found["values"])
        assert [plan.sparsity_at(epoch, found["final"]) for epoch, _ in found["values"]] == pytest.approx(
            [share for _, share in found["values"]], abs=1e-9
        )


def test_the_penalties_of_soft_movement_and_l0_are_the_references() -> None:
    found = numbers("movement")["penalty"]
    scores = [torch.tensor(score) for score in found["scores"]]
    for name, shift in (("l1", 0.0), ("l0", SHIFT)):
        mean = sum(float(mean_gate_probability(score, shift)) for score in scores) / len(scores)
        assert mean == pytest.approx(found[name], rel=1e-6)


def test_l0_with_given_noise_is_the_references() -> None:
    """In training, in evaluation, and both gradients, to 1e-5."""
    found = numbers("l0")
    table = {name: torch.tensor(values).view(found["shape"]) for name, values in found.items()
             if isinstance(values, list) and name != "shape"}  # fmt: skip
    score, weight = Parameter(table["scores"]), table["weight"].clone().requires_grad_()
    gate = HardConcrete(score, (table["uniform"].logit() / BETA).flatten(), 0).train()
    product = gate(weight)
    assert near(product, (table["weight"] * table["training"]).flatten().tolist())
    (product * table["upstream"]).sum().backward()
    assert weight.grad is not None
    assert score.grad is not None
    assert near(weight.grad, found["weight_grad"])
    assert near(score.grad, found["score_grad"])
    assert near(gate.mean_gate(weight), found["evaluation"])


class Deep(nn.Module):
    """Linear maps with tanh between, and norms where the weights have some."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        super().__init__()
        for name, values in weights.items():
            owner, _, own = name.rpartition(".")
            if own == "weight":
                shape = torch.tensor(values).shape
                biased = f"{owner}.bias" in weights
                layer = nn.BatchNorm1d(*shape) if len(shape) == 1 else nn.Linear(shape[1], shape[0], bias=biased)
                self.add_module(owner, layer)
        self.load_state_dict({n: torch.tensor(values) for n, values in weights.items()}, strict=False)

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self.children())
        for layer, behind in zip(layers, [*layers[1:], None], strict=True):
            x = layer(x)
            x = x if behind is None or isinstance(behind, nn.BatchNorm1d) else x.tanh()
        return x


def deep(found: Mapping[str, Any], weights: Mapping[str, Any] | None = None, but: str = "") -> Problem:
    """The net and the batch of a file as a problem whose matrices may be pruned; `but` names one that may not."""
    model = Deep(found["weights"] if weights is None else weights)
    rows = list(zip(torch.tensor(found["x"]), torch.tensor(found["labels"]), strict=True))

    def collate(chosen: Any) -> dict[str, Tensor]:
        x, labels = zip(*chosen, strict=True)
        return {"x": torch.stack(x), "labels": torch.stack(labels)}

    targets = {n: Target("other", tuple(p.shape)) for n, p in model.named_parameters() if p.dim() == 2 and n != but}
    training = TrainingConfig(learning_rate=1e-3, batch_size=len(rows))
    return tiny(pretrained=model, targets=targets, train=RowBatches(rows, collate), validation=RowBatches(rows,
    collate),
                training=training, steps=1)  # fmt: skip


def joined(masks: Masks) -> list[str]:
    return [bits(mask) for mask in masks.values()]


def test_snip_keeps_what_the_reference_keeps() -> None:
    """Masks exactly, scores to 1e-5."""
    found = numbers("snip")
    problem = deep(found)
    params = target_parameters(problem.pretrained, problem.targets)
    scores = snip_sensitivity(params, task_gradient(problem, problem.pretrained, calibration_batches(problem, 1)))
    flat = torch.cat([score.flatten() for score in scores.values()])
    assert near(flat / flat.sum(), found["scores"])
    for row in found["masks"]:
        assert joined(Snip(batches=1).run(deep(found), sparsity_of("".join(row["masks"]))).masks) == row["masks"]


def test_grasp_as_published_keeps_what_the_reference_keeps() -> None:
    """Masks exactly, scores to 1e-4: a second derivative in float32. The reference's sign is turned: its highest go."""
    found = numbers("snip")
    for row in numbers("grasp")["results"]:
        problem, temperature = deep(found), row["temperature"]
        rows, params = calibration_batches(problem, 1), target_parameters(problem.pretrained, problem.targets)
        slopes = task_gradient(problem, problem.pretrained, rows, temperature)
        scores = gradient_flow_score(params, hessian_product(problem, problem.pretrained, rows, slopes, temperature))
        flat = torch.cat([score.flatten() for score in scores.values()])
        assert near(-flat / flat.sum().abs(), row["scores"], 1e-4)
        method = Grasp(batches=1, measure="increase", temperature=temperature)
        assert joined(method.run(problem, sparsity_of("".join(row["masks"]))).masks) == row["masks"]


def test_the_measures_of_gradient_flow_are_the_references() -> None:
    """To 1e-5, summed over rows as there."""
    found = numbers("flow")
    problem, start = deep(found, but="head.weight"), found["start"]
    params = target_parameters(problem.pretrained, problem.targets)
    slopes = task_gradient(problem, problem.pretrained, calibration_batches(problem, 1))
    origin = {name: torch.tensor(values) for name, values in start.items()}
    loss, change = snip_sensitivity(params, slopes), movement_sensitivity(params, origin, slopes)
    for name, rows, moved, alone in zip(
        params, found["rows"], found["rows_change"], found["weights_loss"], strict=True
    ):
        assert near(loss[name], alone)
        assert near(loss[name].sum(1), rows)
        assert near(change[name].sum(1), moved)


class Pair(nn.Module):
    def __init__(self, weights: Mapping[str, Any]) -> None:
        super().__init__()
        q, o = (torch.tensor(weights[f"{name}.weight"]) for name in ("q", "o"))
        self.q, self.o = nn.Linear(*q.mT.shape, bias=False), nn.Linear(*o.mT.shape, bias=False)
        self.load_state_dict({"q.weight": q, "o.weight": o})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.q(x).tanh()).mean(1)
        return out


def test_wanda_keeps_what_the_reference_keeps_by_row_and_two_of_four() -> None:
    """Masks exactly, norms of the inputs to 1e-5."""
    found = numbers("wanda")
    rows = [(x, torch.tensor(0)) for x in torch.tensor(found["x"])]

    def collate(chosen: Any) -> dict[str, Tensor]:
        return {"x": torch.stack([x for x, _ in chosen]), "labels": torch.stack([y for _, y in chosen])}

    for row in found["masks"]:
        model = Pair(found["weights"])
        targets = {n: Target("other", tuple(p.shape)) for n, p in model.named_parameters()}
        data = RowBatches(rows, collate)
        problem = tiny(pretrained=model, targets=targets, train=data, validation=data, steps=1,
                       training=TrainingConfig(batch_size=len(rows)))  # fmt: skip
        assert near(input_norms(problem, model, calibration_batches(problem, 1))["q.weight"], found["norms"])
        masks = Wanda(batches=1, scope=row["scope"]).run(problem, row["sparsity"]).masks
        assert {name: bits(mask) for name, mask in masks.items()} == row["masks"]


REMEMBERING: dict[str, tuple[Any, Sensitivity]] = {
    "platon": (Platon(), first_order_sensitivity),
    "pins": (Pins(), after_step),
}


@pytest.mark.parametrize("name", REMEMBERING)
def test_after_120_steps_the_averages_and_their_masks_are_the_references(name: str) -> None:
    """Masks exactly, averages to 1e-4: weights and gradients are made by sines on both sides."""
    table, (method, measure) = numbers("platon"), REMEMBERING[name]
    found = table[name]
    weight, slope = (torch.tensor(table[key], dtype=torch.float64) for key in ("weight", "gradient"))
    place = torch.arange(len(weight), dtype=torch.float64)
    state = matrix(weight.float().view(4, 6)).start_run()
    assert method.slow == found["slow"]
    averages = ImportanceAverages(
        sensitivity=measure, fast=method.fast, slow=method.slow, window=method.window, origin=0
    )
    parameter = state.prunable_parameters()["0.weight"]
    for step in range(120):
        state.step, state.optimizer.param_groups[0]["lr"] = step, 1e-2 * (1 - step / 200)
        parameter.data = (weight * (1 + 0.3 * torch.sin(0.05 * step + place))).float().view(4, 6)
        parameter.grad = (slope * torch.cos(0.31 * step + 0.7 * place) / (1 + 0.01 * step)).float().view(4, 6)
        averages.observe_gradients(state)
    assert near(state.memory["importance/0.weight"].flatten(), found["importance"], 1e-4)
    assert near(state.memory["uncertainty/0.weight"].flatten(), found["uncertainty"], 1e-4)
    for row in found["masks"]:
        assert bits(topk_masks(averages.current_scores(state), sparsity_of(row["mask"]))["0.weight"]) == row["mask"]


def test_the_early_bird_fires_when_the_references_does() -> None:
    """The same epoch, the same mask, distances to 1e-6."""
    found = numbers("early_bird")
    epochs = torch.tensor(found["epochs"])
    for row in found["results"]:
        method, state = EarlyBird(masks=row["masks"]), matrix(epochs[0].view(5, 8)).start_run()
        sparsity = sparsity_of(row["mask"])
        for state.step, weights in enumerate(epochs):
            state.prunable_parameters()["0.weight"].data = weights.view(5, 8).clone()
            masks = method.select_masks(state, sparsity)
            if method._mask_has_settled(state, masks):
                break
        notes = state.notes["early_bird"]
        assert notes["fired"] == row["fired"]
        assert bits(masks["0.weight"]) == row["mask"]
        assert notes["checks"][-1]["hamming"] == pytest.approx(row["distances"], abs=1e-6)


class Answers(nn.Module):
    """A model that gives the same answers to every batch."""

    def __init__(self, values: list[Any]) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.tensor(part) for part in values)

    def forward(self) -> Tensor:
        parts = list(self.parts)
        return torch.stack(parts, 1) if len(parts) > 1 else parts[0]


def test_distillation_at_a_temperature_is_the_references() -> None:
    """Loss and gradient to 1e-5, of one answer a row and of the two ends of a span."""
    for row in numbers("distillation")["results"]:
        student = Answers(row["student"])
        problem = tiny(predict=lambda model, batch: model(), criterion=lambda outputs, batch: torch.tensor(0.75))
        settings = DistillConfig(alpha=row["hardness"], temperature=row["temperature"])
        loss = distillation_objective(problem, Answers(row["teacher"]), settings)(student, {}).total
        loss.backward()
        assert row["criterion"] == 0.75
        assert loss.item() == pytest.approx(row["loss"], rel=1e-5)
        for part, wanted in zip(student.parts, row["gradient"], strict=True):
            assert part.grad is not None
            assert near(part.grad, wanted)


def test_the_certainty_of_pins_is_one_minus_the_references_entropy() -> None:
    found = numbers("distillation")["entropy"]
    wanted = [1 - entropy / math.log(4) for entropy in found["entropy"]]
    assert near(answer_certainty(torch.tensor(found["outputs"])), wanted)
