"""A tiny real problem that every method can be run on in a second."""

import gc
import json
import math
import multiprocessing.forkserver
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsesoup.core.masks import Masks
from sparsesoup.core.rng import cpu_generator
from sparsesoup.core.schedules import CubicSchedule
from sparsesoup.core.targets import Target
from sparsesoup.methods.gates.attach import gates_of, underlying_weight
from sparsesoup.methods.platon import Platon, ramp_hooks
from sparsesoup.methods.scores.averages import ImportanceAverages
from sparsesoup.methods.weak_masks import Moments, weak_mask, weak_mask_phase
from sparsesoup.training.batching import Batch, RowBatches
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.driver import run_forks, run_phase
from sparsesoup.training.loop import Rate, TrainingOverrides
from sparsesoup.training.observer import Observer
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState

torch.set_num_threads(1)
gc.disable()  # a million objects are made until all tests are known, and none of them goes
# The same examples on every machine; to hunt for new ones: --hypothesis-profile=default.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")


# One server forks all processes of a session, whichever test starts it: each would import these for seconds otherwise.
PRELOADED = ("sparsesoup.runs.run", "sparsesoup.study.execute.jobs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that none of them is still at work when all others are done.

    One that was never measured may be long too.
    """
    measured = Path(__file__).parents[1] / "benchmarks" / "results" / "tests" / "cpu.json"
    seconds = json.loads(measured.read_text(encoding="utf-8"))["files"]
    items.sort(key=lambda item: -seconds.get(item.nodeid.partition("::")[0], math.inf))


def pytest_collection_finish() -> None:
    gc.freeze()  # a collection takes half a second otherwise
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _alone() -> Iterator[None]:
    """No test asks the Hub or a data root unless it says so, and none waits for a disk: no power is cut here."""
    preload = multiprocessing.forkserver.set_forkserver_preload
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(multiprocessing.forkserver, "set_forkserver_preload", lambda names: preload([*names, *PRELOADED]))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("RAY_worker_niceness", "0")  # by default 15: its workers would wait for all tests beside them
        patch.delenv("SPARSESOUP_DATA", raising=False)
        yield


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoints of five families, a classification and a question set; no test writes to it."""
    from tiny_hub import FAMILIES, checkpoint, reviews, squad  # transformers takes seconds to import

    folder = tmp_path_factory.mktemp("place")
    for family in FAMILIES:
        checkpoint(folder / family, family)
    reviews(folder / "reviews")
    squad(folder / "questions")
    return folder


class Net(nn.Module):
    """Two square hidden layers with dropout between an input layer and a head that stay dense."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.wide = nn.Linear(width, 3 * width)
        self.head = nn.Linear(3 * width, 3)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).relu()
        for block in self.blocks:
            x = self.dropout(block(x).relu()) + x
        return self.head(self.wide(x).relu())


# Settings of isp-code that fit the tiny problem.
ISP_CODE: dict[str, Any] = {"stage": 0.2, "weak": 0.4, "cut": 0.2, "warmup": 4, "schedule": 40}


def collate(rows: Any) -> Batch:
    x, y = zip(*rows, strict=True)
    return {"x": torch.stack(x), "labels": torch.stack(y)}


def rows(count: int, seed: int) -> RowBatches:
    draw = cpu_generator(seed, "rows")
    x = torch.randn(count, 8, generator=draw)
    y = (x[:, :3] + 0.5 * x[:, 3:6] * x[:, 5:8]).argmax(1)
    return RowBatches(list(zip(x, y, strict=True)), collate)


def tiny(**changes: Any) -> Problem:
    """A problem with 1,600 prunable weights that is learnt in a second."""
    seed = changes.pop("seed", 0)
    torch.manual_seed(1)
    net = Net()
    names = ["blocks.0.weight", "blocks.1.weight", "wide.weight"]
    targets = {n: Target("other", tuple(p.shape)) for n, p in net.named_parameters() if n in names}
    meter = changes.pop("meter", CostTracker())
    plain: dict[str, Any] = {
        "pretrained": net,
        "targets": targets,
        "train": rows(256, 2),
        "validation": rows(96, 3),
        "predict": lambda model, batch: model(batch["x"]),
        "criterion": lambda outputs, batch: functional.cross_entropy(outputs, batch["labels"]),
        "metric": lambda outputs, labels: {"accuracy": float((outputs.argmax(1) == labels).float().mean())},
        "steps": 60,
        "head": ("head.weight", "head.bias"),
        "training": TrainingConfig(learning_rate=1e-2, batch_size=16),
        "seed": seed,
        "meter": meter,
        "checkpointer": Checkpointer(meter),
    }
    return Problem(**(plain | changes))


def still() -> Problem:
    """The tiny problem without dropout, whose noise the twin does not draw."""
    problem = tiny(training=TrainingConfig(learning_rate=1e-2, batch_size=16, weight_decay=0.1))
    problem.pretrained.dropout.p = 0.0
    return problem


def tiny_double(width: int = 5, **changes: Any) -> Problem:
    """The tiny problem in float64, small enough for a Hessian to be written down."""
    torch.manual_seed(3)
    net = Net(width).double()
    names = ["blocks.0.weight", "blocks.1.weight", "wide.weight"]
    targets = {n: Target("other", tuple(p.shape)) for n, p in net.named_parameters() if n in names}
    predict = changes.pop("predict", lambda model, batch: model(batch["x"].double()))
    return tiny(pretrained=net, targets=targets, predict=predict, **changes)


@pytest.fixture
def problem() -> Callable[..., Problem]:
    return tiny


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two tables of tensors are equal to the bit, signs of zeros included."""
    return one.keys() == other.keys() and all(
        t.dtype == other[n].dtype
        and t.shape == other[n].shape
        and t.contiguous().reshape(-1).view(torch.uint8).equal(other[n].contiguous().reshape(-1).view(torch.uint8))
        for n, t in one.items()
    )


class Watch(Observer):
    """An observer that keeps the records of all steps and validations, and the masks of the run with what they cut."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.pruned: list[Masks] = []
        self.state: TrainState | None = None
        self.before: list[dict[str, Tensor]] = []  # the weights just before each pruning

    def step(self, record: Mapping[str, Any]) -> None:
        if record:  # a batch of the validation has none
            self.records.append(dict(record))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self.evaluations.append(dict(record))

    def curve(self, name: str, label: str = "main") -> list[Any]:
        return [r[name] for r in self.records if r["label"] == label]


class Searched(Checkpointer):
    """A Checkpointer that remembers what the gates had learnt of each weight or group, just before they are trimmed."""

    def run_stage(self, name: str, state: Any, work: Callable[..., object], *args: Any, hold: bool = False) -> None:
        super().run_stage(name, state, work, *args, hold=hold)
        if name == "search":
            found = {
                n: underlying_weight(state.model, n).abs() if g.score is None else g.score
                for n, g in gates_of(state.model)
            }
            self.scores = {n: score.detach().clone() for n, score in found.items()}


def add_weak_mask(
    problem: Problem,
    state: TrainState,
    steps: int,
    target: float,
    protocol: TrainingOverrides,
    rate: Rate,
    path: tuple[int, int],
    moments: Moments = "inherited",
) -> None:
    """Add a weak mask of a copy of the state to its memory, as a run does."""
    phase = weak_mask_phase("stage", steps, protocol, rate, path, lambda run: weak_mask(run.state, target), moments)
    run_forks(ActiveRun(problem, state, phases=[phase]), [phase])


def climb(
    problem: Problem,
    state: TrainState,
    ramp: CubicSchedule,
    until: int,
    sparsity: float,
    averages: ImportanceAverages,
    end: Callable[[ActiveRun], object] | None = None,
) -> None:
    """Train to a step of platon's ramp, as a run does, and then call the end of the phase."""
    loop = partial(ramp_hooks, Platon(), ramp, sparsity, averages)
    run_phase(ActiveRun(problem, state), Phase(name="ramp", steps=until - state.step, loop=loop, end=end))


@contextmanager
def watched() -> Iterator[Watch]:
    """A Watch that also sees every call of `TrainState.set_masks_`, which goes on to do its work."""
    watch, plain = Watch(), TrainState.set_masks_

    def prune_(state: TrainState, masks: Masks) -> None:
        watch.before.append({n: p.detach().clone() for n, p in state.prunable_parameters().items()})
        plain(state, masks)
        watch.pruned.append({n: m.clone() for n, m in masks.items()})
        watch.state = state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainState, "set_masks_", prune_)
        yield watch


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Work in a folder with models and data by short names, as a user has them."""
    for name in ("bert", "distilbert", "reviews", "questions"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def undisturbed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of the small study, trained in one process that nobody disturbed."""
    from sparsesoup.cli.main import main
    from tiny_studies import RECIPE, write_recipe

    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("bert", "reviews"):
            (folder / name).symlink_to(place / name)
        assert main(["compare", "--config", write_recipe(RECIPE), "--threads", "1"]) == 0
    return folder / "runs"
