"""Runs of every method on the tiny problem, done once a process, with all that was seen of each."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from conftest import Watch, tiny, watched
from sparsesoup.core.granularity import Block
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.targets import target_parameters
from sparsesoup.core.ticket import Ticket, save_masks
from sparsesoup.methods import METHODS, FromTicket, Method
from sparsesoup.methods.scores import magnitude
from sparsesoup.training.batching import Batch
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.problem import Problem

SHORT: dict[str, dict[str, Any]] = {  # settings for the rows whose defaults need more than the tiny problem's 60 steps
    "imp": {"cut": 0.5},
    "imp-rewind": {"cut": 0.5},
    "lr-rewind": {"cut": 0.5},
    "lottery-pools": {"cut": 0.5, "neighbours": 2},
    "isp": {"stages": 3, "weak_masks": 3},
    "isp-paper": {"stage": 0.05, "cut": 0.3, "weak_masks": 2, "weak_steps": 3},
    "soft-movement": {"score_rate": 0.5},
    "l0": {"score_rate": 1.0},
    "block-movement": {"score_rate": 0.5, "pattern": Block(5, 4)},
    "hybrid-movement": {"score_rate": 0.5, "tile": Block(5, 4)},
    "hybrid-filled": {"score_rate": 0.5, "tile": Block(5, 4)},
    "mlpruning": {"tile": Block(1, 4)},
    "one-shot-structured": {"structure": "rows"},  # the tiny net has neither heads nor units
    "grain": {"structure": "rows"},
    "isp-code": {"stage": 0.2, "weak": 0.2, "cut": 0.3, "weak_masks": 3, "warmup": 5},
    "platon": {"every_steps": 5, "window": 5},
    "pins": {"every_steps": 5, "window": 5},
    "snip": {"batches": 4},  # by default it scores by all of the tiny problem's rows, whatever the seed
    "grasp": {"batches": 4},
    "wanda": {"batches": 4},
    "sparsegpt": {"batches": 4},
}


@dataclass(frozen=True)
class Run:
    ticket: Ticket
    problem: Problem
    watch: Watch
    before: dict[str, Tensor]  # the pre-trained weights before the run
    losses: int  # forward passes in train mode
    seen: int  # rows that went through a model to be validated, to score, or to teach


def method(name: str, folder: Path) -> Method:
    if name != "ticket":
        return replace(METHODS[name], **SHORT.get(name, {}))
    problem, where = tiny(), folder / "half"
    masks = topk_masks(magnitude(target_parameters(problem.pretrained, problem.targets)), 0.2)
    if not where.exists():
        save_masks(where, masks, {"origin": problem.base_fingerprint()})
    return FromTicket(ticket=str(where))


@functools.cache
def run(name: str, sparsity: float, folder: Path, seed: int = 0, copy: int = 0, optimizer: str = "adamw") -> Run:
    losses, seen = 0, 0

    def predict(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal seen, losses
        seen += len(batch["x"])
        losses += model.training and next(model.parameters(), None) is not None  # a loss of the method's own
        return model(batch["x"])

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal losses
        losses += model.training
        return functional.cross_entropy(model(batch["x"]), batch["labels"])

    rate = {"adamw": 1e-2, "adam": 1e-2, "sgd": 5e-2, "rmsprop": 1e-3}[optimizer]
    with watched() as watch:
        settings = TrainingConfig(learning_rate=rate, batch_size=16, weight_decay=0.1, optimizer=optimizer)
        problem = tiny(training=settings, seed=seed, observer=watch, objective=loss, predict=predict)
        before = {n: t.clone() for n, t in problem.pretrained.state_dict().items()}
        ticket = method(name, folder).run(problem, sparsity)
    return Run(ticket, problem, watch, before, losses, seen)
