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
from sparsesoup.core.granularity import Block, Element, Tie
from sparsesoup.core.masking import keep
from sparsesoup.core.masks import Masks
from sparsesoup.core.schedules import Cubic
from sparsesoup.core.targets import Target, parameters
from sparsesoup.methods.early_bird import EarlyBird
from sparsesoup.methods.gates.attach import attach, gates
from sparsesoup.methods.gates.density import set_levels_
from sparsesoup.methods.gates.hard_concrete import BETA, SHIFT, HardConcrete
from sparsesoup.methods.gates.penalty_controller import Lead
from sparsesoup.methods.gates.straight_through import Gate, mean_open
from sparsesoup.methods.hybrid import HybridMovement
from sparsesoup.methods.learned_masks import Phases, begin, straight
from sparsesoup.methods.pins import Pins, certainty
from sparsesoup.methods.platon import Platon
from sparsesoup.methods.pruning_at_init import Grasp, Snip, Wanda
from sparsesoup.methods.scores.activation import input_norms
from sparsesoup.methods.scores.averages import Averages, Sensitivity, after_step, first_order
from sparsesoup.methods.scores.calibration import calibration
from sparsesoup.methods.scores.gradient import flow, gradient, hessian_product, sensitivity, travelled
from sparsesoup.training.batching import Data
from sparsesoup.training.config import Distill, Training
from sparsesoup.training.distillation import distilled
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState
from tiny_bert import bert

PLACE = Path(__file__).parent / "golden"


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


def hybrid(**more: Any) -> tuple[TrainState, Lead]:
    """A state with the scores of the file, and its lead, after a pass in training."""
    settings: dict[str, Any] = {"tile": Block(4, 4), "penalty": 40.0, **more}
    phases = Phases(warmup=0.1, cooldown=0.2, settle=0.1)
    problem = bert(steps=100)
    gated, lead = HybridMovement(phases=phases, **settings).gated(problem, 0.5)
    state, table = begin(problem, gated), numbers("hybrid")["scores"]
    with torch.no_grad():
        for name, gate in gates(state.model):
            if gate.score is not None and name.removesuffix(".weight") in table:
                gate.score.copy_(torch.tensor(table[name.removesuffix(".weight")]))
        for name, parameter in state.model.named_parameters():
            if name.endswith("bias.original"):
                parameter.fill_(1.0)
    return state, lead


def penalty(state: TrainState, lead: Lead, step: int) -> Tensor:
    state.step = step
    lead(state)
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    state.model.train()(**batch)
    return lead.term(state)


def test_hybrid_as_published_has_the_thresholds_the_penalty_and_its_gradient_of_nn_pruning() -> None:
    """To 1e-5 of the largest: float32, summed in another order."""
    found, (state, lead) = numbers("hybrid"), hybrid()
    for row in found["schedule"]:
        term = penalty(state, lead, row["step"])
        levels = [float(gate.level.sigmoid()) for _, gate in gates(state.model)]
        assert levels == pytest.approx([row["threshold"]] * len(levels), abs=1e-7)
        assert term.item() == pytest.approx(row["penalty"], rel=1e-5)
    term.backward()
    for name, gate in gates(state.model):
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


def gated(problem: Problem, score: Parameter | None) -> tuple[TrainState, Gate]:
    """A run at its beginning, with a gate on its one matrix."""
    ties = (Tie((("0.weight", Element),)),)
    state = problem.start(lambda model: (attach(model, ties, straight([score])), 1.0))
    return state, next(gate for _, gate in gates(state.model))


@pytest.mark.parametrize("number", range(12))
def test_the_top_of_movements_scores_is_the_references(number: int) -> None:
    """Exactly, at each of twelve shapes; its gradients, where the file has them, to the bit of float32."""
    found = numbers("movement")["top_k"][number]
    shape = tuple(found["shape"])
    score = Parameter(torch.tensor(found["scores"]).view(shape))
    weight = torch.tensor(found.get("weight", found["scores"])).view(shape)
    state, gate = gated(matrix(weight), score)
    set_levels_(state, [1], sparsity_of(found["mask"]), "tensor")
    assert found["mask"].count("1") == int(found["keep"] * len(found["mask"]))
    assert bits(gate.scale(weight)) == found["mask"]
    assert bits(keep({"w": score.detach()}, sparsity_of(found["mask"]), scope="tensor")["w"]) == found["mask"]
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
        set_levels_(state, [1], sparsity_of(found["mask"]), "tensor")
        assert bits(gate.scale(weight)) == found["mask"]


def test_a_threshold_of_the_sigmoid_opens_what_the_reference_opens() -> None:
    for found in numbers("movement")["threshold"]:
        score = torch.tensor(found["scores"]).view(found["shape"])
        gate, level = Gate(Parameter(score), Element, 0, 0), torch.logit(torch.tensor(found["threshold"]))
        gate.level.copy_(gate.floored(level, found["floor"]) if found["floor"] else level)
        assert bits(gate.scale(torch.ones(found["shape"]))) == found["mask"]


def test_the_published_threshold_schedules_are_one_cubic_curve() -> None:
    """Movement's share and threshold with the penalty's weight, PLATON's and PINS' share, oBERT's prunings: to 1e-9."""
    for found in numbers("movement")["schedule"]:
        plan = Cubic(found["start"], found["stop"])
        for step, threshold, penalty in found["values"]:
            change = plan.at(step, abs(found["final"] - found["initial"]))
            assert abs(threshold - found["initial"]) == pytest.approx(change, abs=1e-9)
            if found["penalty"]:
                assert penalty == pytest.approx(found["penalty"] * plan.at(step, 0.5) / 0.5, abs=1e-6)
    for name in ("platon", "pins"):
        plan = Cubic(20, 160, 10)
        for step, share, prunes in numbers("platon")[name]["schedule"]:
            assert 1 - plan.at(step, 0.6) == pytest.approx(share, abs=1e-9)
            if 20 < step <= 160:
                assert plan.due(step) == prunes
    for found in numbers("schedules")["cubic"]:
        plan = Cubic(found["start"], found["stop"], found["every"], initial=found["first"])
        assert all(plan.due(epoch) for epoch, _ in found["values"])
        assert [plan.at(epoch, found["final"]) for epoch, _ in found["values"]] == pytest.approx(
            [share for _, share in found["values"]], abs=1e-9
        )


def test_the_penalties_of_soft_movement_and_l0_are_the_references() -> None:
    found = numbers("movement")["penalty"]
    scores = [torch.tensor(score) for score in found["scores"]]
    for name, shift in (("l1", 0.0), ("l0", SHIFT)):
        mean = sum(float(mean_open(score, shift)) for score in scores) / len(scores)
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
    assert near(gate.scale(weight), found["evaluation"])


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
    training = Training(learning_rate=1e-3, batch_size=len(rows))
    return tiny(pretrained=model, targets=targets, train=Data(rows, collate), validation=Data(rows, collate),
                training=training, steps=1)  # fmt: skip


def joined(masks: Masks) -> list[str]:
    return [bits(mask) for mask in masks.values()]


def test_snip_keeps_what_the_reference_keeps() -> None:
    """Masks exactly, scores to 1e-5."""
    found = numbers("snip")
    problem = deep(found)
    params = parameters(problem.pretrained, problem.targets)
    scores = sensitivity(params, gradient(problem, problem.pretrained, calibration(problem, 1)))
    flat = torch.cat([score.flatten() for score in scores.values()])
    assert near(flat / flat.sum(), found["scores"])
    for row in found["masks"]:
        assert joined(Snip(batches=1).run(deep(found), sparsity_of("".join(row["masks"]))).masks) == row["masks"]


def test_grasp_as_published_keeps_what_the_reference_keeps() -> None:
    """Masks exactly, scores to 1e-4: a second derivative in float32. The reference's sign is turned: its highest go."""
    found = numbers("snip")
    for row in numbers("grasp")["results"]:
        problem, temperature = deep(found), row["temperature"]
        rows, params = calibration(problem, 1), parameters(problem.pretrained, problem.targets)
        slopes = gradient(problem, problem.pretrained, rows, temperature)
        scores = flow(params, hessian_product(problem, problem.pretrained, rows, slopes, temperature))
        flat = torch.cat([score.flatten() for score in scores.values()])
        assert near(-flat / flat.sum().abs(), row["scores"], 1e-4)
        method = Grasp(batches=1, measure="increase", temperature=temperature)
        assert joined(method.run(problem, sparsity_of("".join(row["masks"]))).masks) == row["masks"]


def test_the_measures_of_gradient_flow_are_the_references() -> None:
    """To 1e-5, summed over rows as there."""
    found = numbers("flow")
    problem, start = deep(found, but="head.weight"), found["start"]
    params = parameters(problem.pretrained, problem.targets)
    slopes = gradient(problem, problem.pretrained, calibration(problem, 1))
    origin = {name: torch.tensor(values) for name, values in start.items()}
    loss, change = sensitivity(params, slopes), travelled(params, origin, slopes)
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
        data = Data(rows, collate)
        problem = tiny(pretrained=model, targets=targets, train=data, validation=data, steps=1,
                       training=Training(batch_size=len(rows)))  # fmt: skip
        assert near(input_norms(problem, model, calibration(problem, 1))["q.weight"], found["norms"])
        masks = Wanda(batches=1, scope=row["scope"]).run(problem, row["sparsity"]).masks
        assert {name: bits(mask) for name, mask in masks.items()} == row["masks"]


REMEMBERING: dict[str, tuple[Any, Sensitivity]] = {"platon": (Platon(), first_order), "pins": (Pins(), after_step)}


@pytest.mark.parametrize("name", REMEMBERING)
def test_after_120_steps_the_averages_and_their_masks_are_the_references(name: str) -> None:
    """Masks exactly, averages to 1e-4: weights and gradients are made by sines on both sides."""
    table, (method, measure) = numbers("platon"), REMEMBERING[name]
    found = table[name]
    weight, slope = (torch.tensor(table[key], dtype=torch.float64) for key in ("weight", "gradient"))
    place = torch.arange(len(weight), dtype=torch.float64)
    state = matrix(weight.float().view(4, 6)).start()
    assert method.slow == found["slow"]
    averages = Averages(sensitivity=measure, fast=method.fast, slow=method.slow, window=method.window, origin=0)
    parameter = state.params()["0.weight"]
    for step in range(120):
        state.step, state.optimizer.param_groups[0]["lr"] = step, 1e-2 * (1 - step / 200)
        parameter.data = (weight * (1 + 0.3 * torch.sin(0.05 * step + place))).float().view(4, 6)
        parameter.grad = (slope * torch.cos(0.31 * step + 0.7 * place) / (1 + 0.01 * step)).float().view(4, 6)
        averages.observe(state)
    assert near(state.memory["importance/0.weight"].flatten(), found["importance"], 1e-4)
    assert near(state.memory["uncertainty/0.weight"].flatten(), found["uncertainty"], 1e-4)
    for row in found["masks"]:
        assert bits(keep(averages.scores(state), sparsity_of(row["mask"]))["0.weight"]) == row["mask"]


def test_the_early_bird_fires_when_the_references_does() -> None:
    """The same epoch, the same mask, distances to 1e-6."""
    found = numbers("early_bird")
    epochs = torch.tensor(found["epochs"])
    for row in found["results"]:
        method, state = EarlyBird(masks=row["masks"]), matrix(epochs[0].view(5, 8)).start()
        sparsity = sparsity_of(row["mask"])
        for state.step, weights in enumerate(epochs):
            state.params()["0.weight"].data = weights.view(5, 8).clone()
            masks = method._draw(state, sparsity)
            if method._settled(state, masks):
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
        settings = Distill(hardness=row["hardness"], temperature=row["temperature"])
        loss = distilled(problem, Answers(row["teacher"]), settings)(student, {})
        loss.backward()
        assert row["criterion"] == 0.75
        assert loss.item() == pytest.approx(row["loss"], rel=1e-5)
        for part, wanted in zip(student.parts, row["gradient"], strict=True):
            assert part.grad is not None
            assert near(part.grad, wanted)


def test_the_certainty_of_pins_is_one_minus_the_references_entropy() -> None:
    found = numbers("distillation")["entropy"]
    wanted = [1 - entropy / math.log(4) for entropy in found["entropy"]]
    assert near(certainty(torch.tensor(found["outputs"])), wanted)
