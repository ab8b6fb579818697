"""Golden numbers: what public reference code gives on small tensors, against ours. Each file names its origin."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsesoup.gates.base import gates
from sparsesoup.gates.lead import Lead
from sparsesoup.methods.hybrid import HybridMovement
from sparsesoup.methods.learnt import Phases, begin
from sparsesoup.patterns import Block
from sparsesoup.state import TrainState
from tiny_bert import bert

PLACE = Path(__file__).parent / "golden"


def numbers(name: str) -> Any:
    """The numbers of a file, which says where they are from."""
    found = json.loads((PLACE / f"{name}.json").read_text(encoding="utf-8"))
    assert found["origin"]
    return found


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
