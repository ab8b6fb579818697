"""Parallel branches of a run: `Problem.map` over several processes of this machine."""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import remove_path
from sparsesoup.core.process_pool import MAX_ATTEMPTS, ProcessPool, run_with_retries
from sparsesoup.core.tensor_files import load_tensors, save_tensors
from sparsesoup.training.cached_train import RecordingObserver
from sparsesoup.training.cost import Cost
from sparsesoup.training.forks import ForkFunction, ParallelMap, serial_map
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState
from sparsesoup.training.train_cache import CachedTraining, TrainingCache

FORK = "fork.safetensors"

Make = Callable[..., Problem]


@dataclass(frozen=True)
class ForkTask:
    """A function call on a copy of the training state, which any process of this machine can run.

    Args:
        make, of: a function and its plain arguments, which rebuild the problem.
        folder: folder of the state and of the result.
        key: file name of the result.
        work, task: the function to call and its arguments.
        threads: torch threads, as many as the run itself has.
    """

    make: Make
    of: tuple[Any, ...]
    folder: Path
    key: str
    work: ForkFunction
    task: tuple[Any, ...]
    threads: int


@contextmanager
def parallel_forks(workers: int, folder: Path, make: Make, *of: Any) -> Iterator[ParallelMap]:
    """Provide `Problem.map` over `workers` processes within the block; results are bit-identical to one process.

    States and results are saved in `folder` as safetensors, each under a hash of the state and of the work: a task
    whose process dies is retried, and a restarted run reuses finished results. One worker is this process.

    Args:
        make, of: a function and its plain arguments, which rebuild the problem; all hashable.
    """
    if workers == 1:
        yield serial_map
        return
    with closing(ProcessPool(workers, run_fork_task, [make.__module__])) as pool:
        yield ProcessMap(pool, folder, make, of)


class ProcessMap:
    """`Problem.map` over a pool of processes."""

    def __init__(self, pool: ProcessPool[ForkTask], folder: Path, make: Make, of: tuple[Any, ...]) -> None:
        self.pool, self.folder, self.make, self.of = pool, folder, make, of

    def __call__(
        self, problem: Problem, state: TrainState, work: ForkFunction, tasks: Sequence[tuple[Any, ...]]
    ) -> Callable[[int], dict[str, Tensor]]:
        """Return a getter for each result. The first one requested also runs those after it."""
        cache, forks = TrainingCache(self.folder), dict[int, ForkTask]()

        def get_result(number: int) -> dict[str, Tensor]:
            if not forks:
                forks.update(self._fork_tasks(cache, state, work, tasks, number))
            product = cache.get_training(forks[number].key)
            if product is None:
                self._run_missing_tasks(
                    problem, state, [fork for fork in forks.values() if cache.get_training(fork.key) is None]
                )
                product = cache.get_training(forks[number].key)
            if product is None:
                raise UserError(f"what {forks[number].key} in {self.folder} holds cannot be read; repeat the command")
            _add_fork_cost(problem, state, product)
            return dict(product.tensors)

        return get_result

    def _fork_tasks(
        self, cache: TrainingCache, state: TrainState, work: ForkFunction, tasks: Sequence[tuple[Any, ...]], first: int
    ) -> dict[int, ForkTask]:
        """Return index -> task, for the first one requested and those after it; remove results of other states."""
        base = cache.content_key(_start_tensors(state), state.step, work.__qualname__, getattr(work, "__self__", None))
        keys = {i: cache.content_key({}, base, tasks[i]) for i in range(first, len(tasks))}
        for file in self.folder.glob("*.safetensors"):
            if re.fullmatch("[0-9a-f]{32}", file.stem) and file.stem not in keys.values():
                remove_path(file)
        rest = (torch.get_num_threads(),)
        return {i: ForkTask(self.make, self.of, self.folder, keys[i], work, tasks[i], *rest) for i in keys}

    def _run_missing_tasks(self, problem: Problem, state: TrainState, forks: Sequence[ForkTask]) -> None:
        save_tensors(self.folder / FORK, _start_tensors(state), state.facts())
        problem.observer.begin("masks of workers", 0, len(forks))
        for event in run_with_retries(self.pool, forks):
            if event is not None and event.kind == "lost":
                raise UserError(
                    f"the process of a weak mask died {MAX_ATTEMPTS} times, last it {event.why}; lower --workers, and "
                    f"the same command resumes the run"
                )
            if event is not None and event.kind == "done":
                problem.observer.step({})
        problem.observer.end()


def run_fork_task(fork: ForkTask) -> None:
    """Run a task and save its result, with cost and log records, for the run."""
    torch.set_num_threads(fork.threads)
    problem, state, records = _cached_problem(fork.make, fork.of)
    state.load_state_(*load_tensors(fork.folder / FORK))
    problem.meter.restore({})
    records.kept.clear()
    found = fork.work(problem, state, *fork.task)
    costs = {"costs": problem.meter.to_json()}
    TrainingCache(fork.folder).put_training(
        fork.key, CachedTraining(found, costs, problem.meter.total_cost(), records.kept)
    )


@functools.lru_cache(maxsize=1)
def _cached_problem(make: Make, of: tuple[Any, ...]) -> tuple[Problem, TrainState, RecordingObserver]:
    """Return a problem, built once per process, a state to fill, and an observer of the steps."""
    records = RecordingObserver()
    problem = replace(make(*of), observer=records)
    return problem, problem.start_run(), records


def _start_tensors(state: TrainState) -> dict[str, Tensor]:
    """Return all tensors that a training depends on; a method's memory (the votes so far) is not among them."""
    return {name: t for name, t in state.tensors().items() if not name.startswith("memory/")}


def _add_fork_cost(problem: Problem, state: TrainState, product: CachedTraining) -> None:
    """Add the cost and the log of a task as if it had run here."""
    for label, cost in product.facts["costs"].items():
        problem.meter.add_cost(label, Cost(**cost))
        problem.observer.begin(label, state.step, state.step + int(cost["steps"]))
    for record in product.records:
        problem.observer.step(record)
    problem.observer.end()
