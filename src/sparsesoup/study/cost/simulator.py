"""A twin of a problem: the same T, rows and batches, a model of one small block. Methods run on it in no time.

Its meter tells what they cost on the real one, since schedules are functions of T and of the number of rows, and what
a batch costs is a function of its rows and width.
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

WIDTH = 32  # the smallest that a tile of block pruning fits
FORK = 3  # a snapshot midway holds the weights and two moments
OFTEN = 7  # steps from one look at what a run holds to the next
SHAPES = {
    "query": (WIDTH, WIDTH), "key": (WIDTH, WIDTH), "value": (WIDTH, WIDTH), "output": (WIDTH, WIDTH),
    "feed-forward in": (2 * WIDTH, WIDTH), "feed-forward out": (WIDTH, 2 * WIDTH),
}  # fmt: skip


class SimulatedBlock(nn.Module):
    """A matrix for each role of a transformer's block. What it answers means nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleDict(
            {"0": nn.ModuleDict({_plain_role(r): nn.Linear(i, o) for r, (o, i) in SHAPES.items()})}
        )
        self.idle = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Tensor) -> Tensor:
        """[rows, 2]; a training looks into the matrices only where gates wait for their gradients."""
        if self.training and not any(map(is_parametrized, self.modules())):
            return self.idle.expand(len(batch), 2)
        layers = [module for module in self.modules() if isinstance(module, nn.Linear)]
        answers = [layer(self.idle.new_ones(1, layer.in_features)).mean() for layer in layers]
        return (self.idle + torch.stack(answers).sum()).expand(len(batch), 2)


@dataclass(kw_only=True)
class WatchedState(TrainState):
    """A state that knows how much it has been copied."""

    copies: float = 0.0

    def take_snapshot(self) -> Snapshot:
        """A copy to return to."""
        self.copies = max(self.copies, FORK if self.step else 1.0)
        return super().take_snapshot()


@dataclass(frozen=True, kw_only=True)
class SimulatedProblem(Problem):
    """A problem whose states are watched.

    Args:
        watch: sees the state of each run that begins.
    """

    watch: "StateWatcher"

    def start_run(self, attach: Callable[[nn.Module], GateParameters] | None = None) -> TrainState:
        """A run at its beginning."""
        state = super().start_run(attach)
        self.watch.state = WatchedState(**{f.name: getattr(state, f.name) for f in fields(state)})
        return self.watch.state


class StateWatcher(NullObserver):
    """Lets no training end before its time, since nobody knows when masks settle; notes what states hold.

    Args:
        held: copies of the prunable weights that a method held beside those of plain training, at most.
    """

    def __init__(self) -> None:
        self.state: WatchedState | None = None
        self.held = 0.0

    def begin(self, label: str, step: int, until: int) -> None:
        """Look at what the run holds."""
        if self.state is not None:
            self.held = max(self.held, self.state.copies + _copies_beside(self.state))

    def step(self, record: Mapping[str, Any]) -> None:
        """Go on, and look now and then."""
        if self.state is not None:
            self.state.halt = False
            if self.state.step % OFTEN == 0:
                self.begin("", 0, 0)


class InMemoryCache(TrainingCache):
    """A cache in memory, for twins."""

    def __init__(self, products: dict[str, CachedTraining], identity: Mapping[str, Any]) -> None:
        super().__init__(None, identity)
        self.folder = "memory"  # type: ignore[assignment]  # what trainings ask is whether there is one
        self.products = products

    def get_training(self, key: str) -> CachedTraining | None:
        """The product under that key."""
        return self.products.get(key)

    def put_training(self, key: str, product: CachedTraining) -> None:
        """Keep a copy of a product, but not its log."""
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
    """The twin of a problem.

    Args:
        prices: of the real problem's passes.
        steps: T of the twin.
        products: trainings that other twins have done; this one takes and adds.
        share: of the training rows that it has, so that an epoch can be shorter as T is.
        seed: of the real problem.
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
    """A twin of whatever has such rows, settings and T."""
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
    """A share of the rows, evenly taken: what their lengths are on average stays."""
    count = max(1, round(share * len(data)))
    return data.select_rows([i * len(data) // count for i in range(count)])


def empty_rows(data: RowBatches) -> RowBatches:
    """Rows of the same lengths with nothing in them."""

    def collate(rows: Sequence[int]) -> Batch:
        shape = (len(rows), max(rows))
        return {"rows": torch.empty(shape, dtype=torch.int8), "labels": torch.zeros(len(rows))}

    return RowBatches(list(data.lengths or [1] * len(data)), collate, data.lengths)


def _copies_beside(state: TrainState) -> float:
    """Copies of the prunable weights that gates, with gradients and moments, and memory take."""
    weights = {id(p) for p in state.prunable_parameters().values()}
    total = sum(p.numel() for p in state.prunable_parameters().values())
    gates = sum(p.numel() for n, p in state.model.named_parameters() if id(p) not in weights and "parametri" in n)
    memory = sum(t.numel() * t.element_size() / 4 for t in state.memory.values())
    return (4 * gates + memory) / total


def _plain_role(role: str) -> str:
    return role.replace(" ", "-")
