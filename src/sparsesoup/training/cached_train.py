"""Training that is reused from the training cache if another run has done the same."""

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, cast

from sparsesoup.training.cost import Cost
from sparsesoup.training.evaluation import MAIN, EarlyStopping
from sparsesoup.training.loop import train
from sparsesoup.training.observer import Observer, ObserverGroup
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState
from sparsesoup.training.train_cache import CachedTraining


def train_cached(
    state: TrainState,
    problem: Problem,
    steps: int,
    stream: tuple[object, ...] = (),
    label: str = MAIN,
    stopping: EarlyStopping | None = None,
    moments: bool = True,
) -> None:
    """`train` at the problem's own rate, or restore its result from the cache; the full cost is counted either way.

    Without `moments` the cache holds the weights alone.

    A training resumed after a kill is not shared, nor one that is validated, nor one with a teacher that the cache's
    identity does not include.
    """
    cache, validated = problem.cache, label == MAIN and problem.training.eval_steps is not None
    unknown = problem.objective is not None and "teacher" not in cache.identity
    if cache.folder is None or unknown or validated or problem.checkpointer.is_mid_stage:
        train(state, problem, steps, stream=stream, label=label, stopping=stopping)
        return
    training = replace(problem.training, eval_steps=None, early_stopping_patience=None)
    training = replace(training, precision=training.mixed_precision, dataloader_num_workers=0)
    key = cache.content_key(state.tensors(), state.step, steps, stream, problem.rate_schedule(), training, problem.seed)
    found = cache.get_training(key)
    if found is not None:
        _restore_from_cache(state, problem, found, label)
        return
    before, records = problem.meter.costs.get(label, Cost()), RecordingObserver(problem.observer)
    train(state, replace(problem, observer=records), steps, stream=stream, label=label)
    cost = _cost_difference(problem.meter.costs[label], before)
    kinds = ("model/", "optimizer/") if moments else ("model/",)
    tensors = {name: t for name, t in state.tensors().items() if name.startswith(kinds)}
    cache.put_training(key, CachedTraining(tensors, state.facts() | {"notes": {}}, cost, records.kept))


def _restore_from_cache(state: TrainState, problem: Problem, product: CachedTraining, label: str) -> None:
    """Restore the state at the end of the training, and replay its steps in the costs and the log."""
    start, own = state.step, state.tensors()
    rest = {name: t for name, t in own.items() if name.startswith(("masks/", "memory/"))}  # as before the training
    state.load_state_(ChainMap(rest, cast(Any, product.tensors)), product.facts | {"notes": state.notes})
    problem.meter.add_cost(label, replace(product.cost, shared=product.cost.steps))
    problem.observer.begin(label, start, state.step)
    for record in product.records:
        problem.observer.step({**record, "label": label})
    problem.observer.end()


def _cost_difference(after: Cost, before: Cost) -> Cost:
    return Cost(**{f.name: getattr(after, f.name) - getattr(before, f.name) for f in fields(Cost)})


class RecordingObserver(ObserverGroup):
    """Observers that also keep the record of each step."""

    def __init__(self, *members: Observer) -> None:
        super().__init__(*members)
        self.kept: list[dict[str, Any]] = []

    def step(self, record: Mapping[str, Any]) -> None:
        """Keep it, and pass it on."""
        self.kept.append(dict(record))
        super().step(record)
