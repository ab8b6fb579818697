"""What a mask that is drawn before the training leaves of the pre-trained model: MiniLM on CoLA, half of the weights.

    python benchmarks/kept.py

Of each score: the share of the squared weights that stays, the cosine between the masked and the dense model's last
[CLS] vectors, how far those of 256 training rows lie apart (norm around their mean, over norm), and the density of
its thinnest and densest matrix.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import apply_masks_
from sparsesoup.hub.build import ModelAndDataConfig, build_problem, open_task
from sparsesoup.methods.scores.calibration import calibration_batches
from sparsesoup.methods.scores.gradient import hessian_product, task_gradient
from sparsesoup.training.problem import Problem

RESULT = Path(__file__).parent / "results" / "kept.json"
SPARSITY, BATCHES, ROWS = 0.5, 8, 256


def scores(problem: Problem) -> dict[str, dict[str, Tensor]]:
    """Score -> its tables, of the pre-trained model."""
    rows = calibration_batches(problem, BATCHES)
    slopes = task_gradient(problem, problem.pretrained, rows)
    products = hessian_product(problem, problem.pretrained, rows, slopes)
    weights = {n: p.detach() for n, p in problem.pretrained.named_parameters() if n in problem.targets}
    return {
        "magnitude": {n: w.abs() for n, w in weights.items()},
        "random": {n: torch.rand_like(w) for n, w in weights.items()},
        "snip": {n: (w * slopes[n]).abs() for n, w in weights.items()},
        "snip without its absolute value": {n: w * slopes[n] for n, w in weights.items()},
        "grasp": {n: w * products[n] for n, w in weights.items()},
        "absolute value of grasp": {n: (w * products[n]).abs() for n, w in weights.items()},
    }


def vectors(problem: Problem, model: Any) -> Tensor:
    """[rows, hidden size], the last vectors of the first token."""
    batch = problem.train.batch(list(range(ROWS)))
    inputs = {name: t for name, t in batch.items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**inputs, output_hidden_states=True).hidden_states[-1][:, 0]


def apart(found: Tensor) -> float:
    return float((found - found.mean(0)).norm() / found.norm())


def left(problem: Problem, tables: dict[str, Tensor], dense: Tensor) -> dict[str, float]:
    """What is left of the model where these scores choose."""
    model, masks = copy.deepcopy(problem.pretrained), topk_masks(tables, SPARSITY)
    params = {n: p for n, p in model.named_parameters() if n in masks}
    whole = sum(float(p.detach().square().sum()) for p in params.values())
    apply_masks_(params, masks)
    found = vectors(problem, model)
    density = [float(mask.float().mean()) for mask in masks.values()]
    return {
        "squared weights": sum(float(p.detach().square().sum()) for p in params.values()) / whole,
        "cosine": float(torch.nn.functional.cosine_similarity(found, dense).mean()),
        "apart": apart(found),
        "density": [min(density), max(density)],
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    place = ModelAndDataConfig(dataset="glue/cola")
    problem = build_problem(place, open_task(place), steps=1)
    dense = vectors(problem, problem.pretrained)
    found: dict[str, Any] = {"command": "python benchmarks/kept.py", "dense": {"apart": apart(dense)}}
    found |= {name: left(problem, tables, dense) for name, tables in scores(problem).items()}
    for name, row in found.items():
        print(f"{name:34} {row}")
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
