"""GRAIN, MLPruning, sparse progressive distillation and PELA on a tiny ViT and on the image tower of a tiny CLIP."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import same
from killed_runs import finish_killed_run
from sparsesoup.core.granularity import Block
from sparsesoup.core.low_rank import rank_at, split_layers_
from sparsesoup.core.masks import count_kept
from sparsesoup.hub.models.dummy_inputs import dummy_inputs, forward_outputs
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.hub.tasks.zero_shot import vision_tower
from sparsesoup.methods import METHODS
from sparsesoup.training.batching import Batch, RowBatches
from sparsesoup.training.problem import Problem
from tiny_clip import SIDE, clip
from tiny_exports import narrow_model
from tiny_vit import images

STEPS = 16
PROGRESSIVE = METHODS["sparse-progressive-distillation"]
ROWS: dict[str, Any] = {  # method, weights of its largest group, with what reads it
    "grain": (replace(METHODS["grain"], decay=0.9), 32),
    "mlpruning": (replace(METHODS["mlpruning"], structured=1.0), 512),
    "mlpruning-blocks": (replace(METHODS["mlpruning"], tile=Block(4, 4)), 16),
    "progressive": (PROGRESSIVE, 1),
    "progressive-heads": (replace(PROGRESSIVE, structure="heads-and-units", scope="global"), 512),
    "pela": (METHODS["pela"], 0),
}
CUT = ("grain", "mlpruning", "progressive-heads")


def vit(**changes: Any) -> Problem:
    """The pictures of tiny_vit in float64."""
    problem = images(steps=STEPS)
    predict = lambda model, batch: model(pixel_values=batch["pixel_values"].double()).logits  # noqa: E731
    return replace(problem, pretrained=problem.pretrained.double(), predict=predict, **changes)


def clip_tower(**changes: Any) -> Problem:
    """Random pictures, told apart by two directions of their embeddings."""
    model, draw = vision_tower(clip()).double(), torch.Generator().manual_seed(0)
    pictures = torch.randn(24, 3, SIDE, SIDE, generator=draw, dtype=torch.float64)
    rows = [(picture, int(picture.mean() > 0)) for picture in pictures]
    words = torch.randn(model.config.projection_dim, 2, generator=draw, dtype=torch.float64)

    def collate(chosen: Any) -> Batch:
        x, y = zip(*chosen, strict=True)
        return {"pixel_values": torch.stack(x), "labels": torch.tensor(y)}

    return images(**({
        "pretrained": model, "targets": find_prunable(model), "steps": STEPS, "train": RowBatches(rows, collate),
        "validation": RowBatches(rows[:8], collate),
        "predict": lambda model, batch: model(pixel_values=batch["pixel_values"]).image_embeds @ words,
    } | changes))  # fmt: skip


@pytest.mark.parametrize("make", [vit, clip_tower])
@pytest.mark.parametrize("name", ROWS)
def test_a_run_on_images_is_exact_is_cut_and_survives_kills(
    name: str, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, largest = ROWS[name]
    sparsity = 0.0 if name == "pela" else 0.6
    ticket, problem = method.run(make(), sparsity), make()
    total = sum(mask.numel() for mask in ticket.masks.values())
    budget = round((1 - sparsity) * total)
    assert budget - max(largest, 1) < count_kept(ticket.masks) <= budget
    for target, mask in ticket.masks.items():
        assert not ticket.weights[target][~mask].any()
    if name in CUT:
        narrow_model(problem, ticket)  # answers alike to 1e-10
    if name == "pela":
        split_alike(problem, ticket)
    kills, steps = (3, 9) if name in ("mlpruning-blocks", "progressive", "progressive-heads") else (2, 6)
    again = finish_killed_run(method, make, sparsity, tmp_path, monkeypatch, kills=kills, steps=steps)
    assert same(again.masks, ticket.masks)
    assert same(again.weights, ticket.weights)
    assert again.notes == ticket.notes


def split_alike(problem: Problem, ticket: Any) -> None:
    """The thin layers of what PELA leaves answer as the stock model."""
    model = copy.deepcopy(problem.pretrained)
    model.load_state_dict(ticket.weights)
    thin = copy.deepcopy(model.eval())
    split_layers_(thin, {n.removesuffix(".weight"): rank_at(t.shape, 2.0) for n, t in problem.targets.items()})
    batch = dummy_inputs(model)
    pairs = zip(forward_outputs(model, batch), forward_outputs(thin, batch), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-10
