"""A training loop as users write it, on the rows and with the noise of our own."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from conftest import tiny
from sparsesoup.core.rng import cpu_generator, derive_seed
from sparsesoup.loops.attach import attach
from sparsesoup.loops.pruner import Pruner
from sparsesoup.methods import Method
from sparsesoup.training.batching import RowBatches
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.problem import Problem

STEPS, SIZE, KEPT = 60, 8, 600  # kept of 2,000 weights
TRAINING = TrainingConfig(learning_rate=1e-2, batch_size=1, weight_decay=0.01, max_grad_norm=0.0)


def make_batches() -> list[dict[str, Tensor]]:
    draw = cpu_generator(5, "batches")
    x = torch.randn(32 * SIZE, 8, generator=draw)
    y = (x[:, :3] + 0.5 * x[:, 3:6] * x[:, 5:8]).argmax(1)
    return [{"x": x[i : i + SIZE], "labels": y[i : i + SIZE]} for i in range(0, len(x), SIZE)]


BATCHES = make_batches()


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["labels"])


def prunable(name: str, parameter: Tensor) -> bool:
    return name in ("blocks.0.weight", "blocks.1.weight", "wide.weight")


def own_problem(**changes: Any) -> Problem:
    training = replace(TRAINING, **changes)
    return tiny(steps=STEPS, train=RowBatches(BATCHES, lambda rows: rows[0]), training=training)


def make_optimizer(model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=TRAINING.learning_rate, fused=fused)


class Loop:
    """A loop as users write it, on the rows and with the noise of our own."""

    def __init__(self, fused: bool = True, clip: float = 0.0, parts: int = 1, scaler: Any = None) -> None:
        self.clip, self.parts, self.scaler = clip, parts, scaler or torch.amp.GradScaler("cpu", enabled=False)
        self.reference = own_problem(max_grad_norm=clip, gradient_accumulation_steps=parts)
        self.model = copy.deepcopy(self.reference.pretrained)
        self.optimizer = make_optimizer(self.model, fused)
        self.rate = self.reference.rate_schedule()

    def rows(self, start: int = 0) -> Iterator[Any]:
        order = self.reference.train.train_batches(self.parts, start, self.reference.seed)
        return (BATCHES[i] for indices in order for i in indices)

    def train(self, start: int = 0, stop: int = STEPS, after: Callable[[int], object] = lambda step: None) -> None:
        self.model.train()
        rows = self.rows(start)
        for step in range(start, stop):
            torch.manual_seed(derive_seed(self.reference.seed, "noise", step))
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step)
            for batch in islice(rows, self.parts):
                self.scaler.scale(loss_of(self.model, batch) / self.parts).backward()
            if self.clip:
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            after(step)

    def attach(self, method: str | Method, sparsity: float = 0.7, **more: Any) -> Pruner:
        given: dict[str, Any] = {"steps": STEPS, "loss": loss_of, "batches": BATCHES, "prunable": prunable}
        given |= {"max_grad_norm": self.clip} | more
        return attach(self.model, self.optimizer, method, sparsity, **given)
