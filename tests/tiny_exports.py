"""Pruned tiny models on the disk, exports by the command line, and what several tests of exports say of them."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from sparsesoup.cli.main import main
from sparsesoup.core.ticket import Ticket, save_masks
from sparsesoup.exports import graphs
from sparsesoup.exports.compact import fold_and_prune_layer_
from sparsesoup.exports.source import masks_from_zeros
from sparsesoup.hub.models.cut_layers import live_parts
from sparsesoup.hub.models.dummy_inputs import dummy_inputs, forward_outputs
from sparsesoup.hub.models.layer_layouts import prunable_layers
from sparsesoup.hub.quiet import quiet_libraries
from sparsesoup.training.problem import Problem
from tiny_models import HEADS, LAYERS, UNITS, killed, model_of

SOME = {"heads": [["stays", "out", "in", "mixed"], ["in"] * HEADS], "units": [["in"] * UNITS, ["stays", "out"] * 3]}
EVEN = {"units": [["stays", "stays", "in", "out", "in", "stays"]] * LAYERS}
NONE = {"heads": [["both"] * HEADS] * LAYERS, "units": [["both"] * UNITS] * LAYERS}
FEWER = {"heads": [["stays", "in", "out", "stays"]] * LAYERS} | EVEN


def saved(folder: Path, model: Any, /, **facts: Any) -> Path:
    """The folder of a model with the masks of its zeros, as a run leaves it."""
    with quiet_libraries():
        model.save_pretrained(folder)
    save_masks(folder / "pruning", masks_from_zeros(model), facts)
    return folder


def pruned(folder: Path, name: str, plan: Any = SOME, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a pruned model of that family."""
    model = killed(model_of(name, dtype=dtype), plan)
    with torch.no_grad():  # zeros strewn over what stays
        for layer in prunable_layers(model):
            layer.module_of("query").weight[1::2, ::3] = 0
    return saved(folder, model, method="magnitude", model=name, seed=0, origin="a hash of the base model's weights")


def narrow_model(problem: Problem, ticket: Ticket) -> Any:
    """The model of a ticket, cut down to its live parts; its answers are those of the masked model to 1e-10."""
    model = copy.deepcopy(problem.pretrained)
    model.load_state_dict(ticket.weights)
    narrow = copy.deepcopy(model.eval())
    for layer in prunable_layers(narrow):
        fold_and_prune_layer_(layer, live_parts(layer))
    batch = dummy_inputs(model)
    pairs = zip(forward_outputs(model, batch), forward_outputs(narrow, batch), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-10
    return narrow


def export_command(*words: object) -> int:
    return main(["export", *map(str, words)])


def stock(folder: Path) -> Any:
    """The model of a folder, by transformers alone."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    with quiet_libraries():
        return getattr(transformers, name).from_pretrained(folder).eval()


def close(one: Any, other: Any, tolerance: float) -> bool:
    return len(one) == len(other) and all(
        np.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(one, other, strict=True)
    )


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: object) -> str:
    """What an export that must be refused says: one line, with exit code 2 and nothing written."""
    before, _ = sorted(tmp_path.rglob("*")), capsys.readouterr()
    assert export_command(*words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    return error


def trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace a folder once, however many of its graphs are exported: a trace takes seconds."""
    plain, found = graphs.trace_source, {}

    def trace(source: Any, opset: int = 0) -> Any:
        key = (source.folder, opset)
        found[key] = found.get(key) or plain(source, opset)
        return found[key]

    monkeypatch.setattr(graphs, "trace_source", trace)
