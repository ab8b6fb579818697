"""Simulate a problem: the same T, rows and batches with a model of one small block, on which methods run fast.

Costs are looked up for the real model, since schedules are functions of T and of the number of rows, and the cost of
a batch is a function of its rows and width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from sparsesoup.core.targets import Target
from sparsesoup.study.cost.flops_model import FlopsModel, SimulatedCostTracker
from sparsesoup.training.batching import Batch, RowBatches
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.problem import GateParameters, NullObserver, Problem
from sparsesoup.training.state import Snapshot, TrainState
from sparsesoup.training.train_cache import CachedTraining, TrainingCache

WIDTH = 32  # the smallest width that fits a tile of block pruning
FORK = 3  # a snapshot during training holds the weights and two moments
OFTEN = 7  # steps between measurements of the memory of a run
SHAPES = {
    "query": (WIDTH, WIDTH), "key": (WIDTH, WIDTH), "value": (WIDTH, WIDTH), "output": (WIDTH, WIDTH),
    "feed-forward in": (2 * WIDTH, WIDTH), "feed-forward out": (WIDTH, 2 * WIDTH),
}  # fmt: skip


class SimulatedBlock(nn.Module):
    """A matrix for each role in a transformer block. Its outputs are meaningless."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleDict(
            {"0": nn.ModuleDict({_plain_role(r): nn.Linear(i, o) for r, (o, i) in SHAPES.items()})}
        )
        self.idle = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Tensor) -> Tensor:
        """Return [rows, 2]; training uses the matrices only if gates need their gradients."""
        if self.training and not any(map(is_parametrized, self.modules())):
            return self.idle.expand(len(batch), 2)
        layers = [module for module in self.modules() if isinstance(module, nn.Linear)]
        answers = [layer(self.idle.new_ones(1, layer.in_features)).mean() for layer in layers]
        return (self.idle + torch.stack(answers).sum()).expand(len(batch), 2)


@dataclass(kw_only=True)
class WatchedState(TrainState):
    """A state that tracks its copies."""

    copies: float = 0.0

    def take_snapshot(self) -> Snapshot:
        """Return a copy for restoring."""
        self.copies = max(self.copies, FORK if self.step else 1.0)
        return super().take_snapshot()


@dataclass(frozen=True, kw_only=True)
class SimulatedProblem(Problem):
    """A problem whose states are watched.

    Args:
        watch: receives the state of each run.
    """

    watch: "StateWatcher"

    def start_run(self, attach: Callable[[nn.Module], GateParameters] | None = None) -> TrainState:
        """Start a run."""
        state = super().start_run(attach)
        self.watch.state = WatchedState(**{f.name: getattr(state, f.name) for f in fields(state)})
        return self.watch.state


class StateWatcher(NullObserver):
    """Prevent early stopping of trainings, since it cannot be predicted; record the memory of states.

    Args:
        held: largest number of copies of the prunable weights held by a method besides plain training.
    """

    def __init__(self) -> None:
        self.state: WatchedState | None = None
        self.held = 0.0

    def begin(self, label: str, step: int, until: int) -> None:
        """Measure the memory of the run."""
        if self.state is not None:
            self.held = max(self.held, self.state.copies + _copies_beside(self.state))

    def step(self, record: Mapping[str, Any]) -> None:
        """Disable halting, and measure at intervals."""
        if self.state is not None:
            self.state.halt = False
            if self.state.step % OFTEN == 0:
                self.begin("", 0, 0)


class InMemoryCache(TrainingCache):
    """An in-memory training cache for simulations."""

    def __init__(self, products: dict[str, CachedTraining], identity: Mapping[str, Any]) -> None:
        super().__init__(None, identity)
        self.folder = "memory"  # type: ignore[assignment]  # trainings only check that it is set
        self.products = products

    def get_training(self, key: str) -> CachedTraining | None:
        """Return the training of that key."""
        return self.products.get(key)

    def put_training(self, key: str, product: CachedTraining) -> None:
        """Store a copy of a training, without its log."""
        tensors = {name: t.detach().clone() for name, t in product.tensors.items()}
        self.products[key] = replace(product, tensors=tensors, records=[])


def twin_of(
    problem: Problem,
    prices: FlopsModel,
    steps: int,
    products: dict[str, CachedTraining],
    share: float = 1.0,
    seed: int = 0,
) -> SimulatedProblem:
    """Return the simulation of a problem.

    Args:
        prices: FLOPs of the real problem's passes.
        steps: T of the simulation.
        products: training cache shared with other simulations.
        share: share of the training rows, so that an epoch shrinks with T.
        seed: seed of the real problem.
    """
    identity = {"rows": len(problem.train), "steps": steps, "share": share, "seed": seed, "teacher": "any"}
    return make_simulated_problem(
        even_subset(empty_rows(problem.train), share), empty_rows(problem.validation), problem.training, steps, seed,
        meter=SimulatedCostTracker(prices), watch=StateWatcher(), cache=InMemoryCache(products, identity),
    )  # fmt: skip


def make_simulated_problem(
    train: RowBatches, validation: RowBatches, training: TrainingConfig, steps: int, seed: int, *,
    meter: CostTracker, watch: StateWatcher,
    cache: TrainingCache,
) -> SimulatedProblem:  # fmt: skip
    """Return a simulated problem with these rows, settings and T."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SimulatedBlock()
    targets = {
        f"layer.0.{_plain_role(role)}.weight": Target(role, shape, head=0 if "feed" in role else WIDTH // 2)
        for role, shape in SHAPES.items()
    }
    return SimulatedProblem(
        pretrained=model, targets=targets, train=train, validation=validation,
        predict=lambda model, batch: model(batch["rows"]), criterion=lambda outputs, batch: outputs.square().mean(),
        metric=lambda outputs, labels: {"nothing": 0.0}, steps=steps, seed=seed, meter=meter,
        journal=Checkpointer(meter),
        training=replace(training, max_grad_norm=0.0, precision="no"), observer=watch, watch=watch, cache=cache,
        head=("idle",),
    )  # fmt: skip


def even_subset(data: RowBatches, share: float) -> RowBatches:
    """Return an evenly spaced share of the rows, which keeps their mean length."""
    count = max(1, round(share * len(data)))
    return data.select_rows([i * len(data) // count for i in range(count)])


def empty_rows(data: RowBatches) -> RowBatches:
    """Return empty rows of the same lengths."""

    def collate(rows: Sequence[int]) -> Batch:
        shape = (len(rows), max(rows))
        return {"rows": torch.empty(shape, dtype=torch.int8), "labels": torch.zeros(len(rows))}

    return RowBatches(list(data.lengths or [1] * len(data)), collate, data.lengths)


def _copies_beside(state: TrainState) -> float:
    """Return the copies of the prunable weights in gates, with gradients and moments, and in memory."""
    weights = {id(p) for p in state.prunable_parameters().values()}
    total = sum(p.numel() for p in state.prunable_parameters().values())
    gates = sum(p.numel() for n, p in state.model.named_parameters() if id(p) not in weights and "parametri" in n)
    memory = sum(t.numel() * t.element_size() / 4 for t in state.memory.values())
    return (4 * gates + memory) / total


def _plain_role(role: str) -> str:
    return role.replace(" ", "-")
