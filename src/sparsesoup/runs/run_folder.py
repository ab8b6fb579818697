"""The directory of a run: begun, resumed, written and read, whatever model and data come from."""

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rich.text import Text

from sparsesoup.core.errors import UserError, mark_saved
from sparsesoup.core.files import DIGESTS, atomic_write, file_lock, remove_path, write_table, write_text
from sparsesoup.core.manifest import digests_of_run
from sparsesoup.core.ticket import Ticket, save_masks
from sparsesoup.hub.models.layer_layouts import why_not_shrinkable
from sparsesoup.hub.tasks.overview import DataOverview
from sparsesoup.methods.hybrid import HybridMovement
from sparsesoup.methods.mlpruning import MlPruning
from sparsesoup.report.run_page import LOG, degenerate_notes, write_report
from sparsesoup.report.terminal import read_report
from sparsesoup.runs.config import RunConfig, dump_config, flatten_table
from sparsesoup.runs.options import RuntimeOptions, unused_settings
from sparsesoup.runs.progress import ProgressLogger, opening_lines
from sparsesoup.runs.results import RunFacts, make_report
from sparsesoup.runs.resume_checks import check_base, check_run_or_model, check_same, training_environment
from sparsesoup.runs.trackers import TrackerObserver
from sparsesoup.training.checkpoint import CHECKPOINT, Checkpointer
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.forks import ParallelMap
from sparsesoup.training.observer import ObserverGroup
from sparsesoup.training.problem import Problem
from sparsesoup.training.snapshots import SnapshotStore
from sparsesoup.training.train_cache import TrainingCache


@dataclass(frozen=True)
class Run:
    """The directory of a run and its report."""

    path: Path
    report: dict[str, Any]


class RunSource(Protocol):
    """Model and data of a run, found by their names or given as objects."""

    def overview(self) -> DataOverview:
        """Return what is read of the data, and possible mistakes."""

    def make_problem(self, meter: CostTracker, checkpointer: Checkpointer, watch: ProgressLogger) -> Problem:
        """Return the problem, with its teacher."""

    def fingerprints(self, problem: Problem) -> dict[str, Any]:
        """Return what a run must begin from again to be resumed."""

    def parallel_map(self, path: Path | None) -> contextlib.AbstractContextManager[ParallelMap]:
        """Provide the map over the copies of a state."""

    def run_facts(self, problem: Problem, ticket: Ticket) -> RunFacts:
        """Return what the report says of model and data."""

    def save_model(self, folder: Path, problem: Problem, ticket: Ticket, brief: Mapping[str, Any]) -> None:
        """Write the folder of the pruned model, without its masks."""

    def check_unchanged(self, path: Path, report: Mapping[str, Any]) -> None:
        """Raise a UserError if a finished run is one of another model or of other data."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended, before it is written.

    Args:
        settings, source: what was run.
        problem, ticket: what was pruned, and the result.
        report: content of report.json.
        log: lines of log.jsonl.
    """

    settings: RunConfig
    source: RunSource
    problem: Problem
    ticket: Ticket
    report: dict[str, Any]
    log: Sequence[str]


def run_in_folder(settings: RunConfig, path: Path, source: RunSource, outside: RuntimeOptions) -> Run:
    """Run in a directory, or resume a stopped run; a finished one is only read.

    Raises: UserError for bad input; finished stages stay on disk.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    check_same(path, settings)
    if is_finished(path):
        found = _read_finished(path, source)
        if (not outside.page or (path / "report.html").exists()) and not _state_files(path):
            return found
    with _exclusive_folder(path, outside.wait):  # a refused process must not remove the files of the other one
        if is_finished(path):  # finished by another process meanwhile, or killed just before the end
            found = _read_finished(path, source)
            if outside.page:
                write_report(path)
            for state in _state_files(path):
                remove_path(state)
            return found
        check_same(path, settings)  # another process may have started it meanwhile
        try:
            with mark_saved(lambda: is_saved(path)):
                if not (path / "run.yaml").exists():
                    write_text(path / "run.yaml", dump_config(settings))
                return write_run(path, carry_out(settings, path, source, outside), page=outside.page)
        except BaseException:
            if path in made and not is_saved(path):
                _take_back(made)
            raise


def carry_out(settings: RunConfig, path: Path | None, source: RunSource, outside: RuntimeOptions) -> FinishedRun:
    """Carry out a run; without a path nothing is written, so that it cannot be resumed."""
    meter, stages = CostTracker(), path / "stages" if path else None
    watch = ProgressLogger(path / LOG if path else None, outside.console)
    with contextlib.closing(watch), contextlib.ExitStack() as trackers:
        checkpointer = Checkpointer(meter, stages, outside.save_every, watch.log_position, watch.rewind_log)
        watch.stage = lambda: checkpointer.open or ""
        tracker = trackers.enter_context(contextlib.closing(_start_trackers(settings, path, watch.steps_before)))
        data = source.overview()
        problem = source.make_problem(meter, checkpointer, watch)
        watch.first = [] if outside.wait else opening_lines(settings, problem, data, path)
        base = source.fingerprints(problem)
        if stages is not None:
            check_base(stages / "base.json", base)
        known = base | training_environment(settings, problem) | problem.cache.identity
        others = () if outside.observer is None else (outside.observer,)
        seen_by = ObserverGroup(problem.observer, tracker, *others)
        cache = TrainingCache(outside.cache, known, round(outside.cache_size * 2**30))
        snapshots = SnapshotStore(outside.snapshots, stages)
        problem = replace(problem, cache=cache, observer=seen_by, snapshots=snapshots)
        doubts = _method_doubts(settings, problem)
        for note in () if outside.wait else (*unused_settings(settings, problem.size, outside.snapshots), *doubts):
            outside.console.print(Text(f"note: {note}"), soft_wrap=True)
        if checkpointer.resumed_stage:
            outside.console.print(Text(f"resuming after {checkpointer.resumed_stage}"), soft_wrap=True)
        began = time.perf_counter()
        with source.parallel_map(path) as each:
            ticket = settings.method.run(replace(problem, map=each), float(settings.budget.sparsity or 0.0))
        facts = source.run_facts(problem, ticket)
        report = make_report(settings, problem, ticket, facts, time.perf_counter() - began)
        report["notes"] |= {"doubts": doubts} if doubts else {}
        report["notes"] |= degenerate_notes(report, watch.log_lines())
        report |= {"data": {"read": data.read, "notes": data.notes}}
        tracker.log_final(report["validation"], report["sparsity"]["reached"])
        return FinishedRun(settings, source, problem, ticket, report, watch.kept)


def _start_trackers(settings: RunConfig, path: Path | None, done: int) -> TrackerObserver:
    """Return the trackers of a run, maybe none, which continue after `done` steps.

    Raises: UserError if one cannot start.
    """
    names, model_data = settings.tracking.report_to, settings.model_data
    if path is None and "tensorboard" in names:
        raise UserError("tensorboard writes into the directory of the run; give out=... too", "report_to")
    name = f"{model_data.dataset} {settings.name} {settings.run_key()} seed {model_data.seed}"
    return TrackerObserver(names, path or Path(), name, flatten_table(settings.to_dict()), done)


def write_run(path: Path, done: FinishedRun, page: bool = True) -> Run:
    """Write the directory of a run that has ended: model, masks, report and page; its saved states are removed."""
    settings, problem, ticket, report = done.settings, done.problem, done.ticket, dict(done.report)
    if not (path / "run.yaml").exists():
        write_text(path / "run.yaml", dump_config(settings))
    if done.log:
        write_text(path / LOG, "".join(done.log))
    keys = ("method", "model", "dataset", "seed", "sparsity", "validation", "cost", "settings", "local", "versions")
    facts = {k: report[k] for k in keys}
    facts |= {k: v for k, v in report["notes"].items() if k == "low_rank"}  # of core.low_rank.low_rank_of
    brief = {"method": settings.name, "base_model": settings.model_data.model, "masks": "pruning/masks.safetensors"}
    with atomic_write(path / "model") as temporary:
        done.source.save_model(temporary, problem, ticket, brief | report["sparsity"])
        prefix = getattr(problem.pretrained, "base_model_prefix", "")
        base = {"origin": problem.base_fingerprint(), "base_model_prefix": prefix}
        save_masks(temporary / "pruning", ticket.masks, facts | base)
    report[DIGESTS] = digests_of_run(path)
    write_table(path / "report.json", report)
    if page:
        write_report(path)
    problem.checkpointer.close()
    return Run(path, report)


def is_finished(path: Path) -> bool:
    """Return True if a directory holds a finished run."""
    return (path / "report.json").exists()


def is_saved(path: Path) -> bool:
    """Return True if the run of a directory can be resumed, or is finished."""
    return is_finished(path) or (path / "stages" / CHECKPOINT).exists()


def _read_finished(path: Path, source: RunSource) -> Run:
    """Return a finished run, after verifying its files, and that model and data have not changed."""
    report = read_report(path)
    check_run_or_model(path, report)
    source.check_unchanged(path, report)
    return Run(path, report)


def _state_files(path: Path) -> list[Path]:
    return list((path / "stages").glob("*.safetensors"))


def _method_doubts(settings: RunConfig, problem: Problem) -> list[str]:
    """Return the method's notes on this problem before the first step."""
    method, find_doubts = settings.method, getattr(settings.method, "doubts", None)
    found = list(find_doubts(problem, float(settings.budget.sparsity or 0.0))) if find_doubts else []
    parts = getattr(method, "structure", "") in ("heads", "units", "heads-and-units", "features-and-units")
    known = hasattr(problem.pretrained, "config") and (parts or isinstance(method, (HybridMovement, MlPruning)))
    stays = why_not_shrinkable(problem.pretrained) if known else ""
    if not problem.steps and {*problem.head} & {*problem.fresh}:
        found.append("the head is randomly initialised and not trained, so the scores are those of guessing")
    return [*found, *([stays] if stays else [])]


@contextlib.contextmanager
def _exclusive_folder(path: Path, wait: bool) -> Iterator[None]:
    """Lock a run against other processes: with `wait`, wait for them, else refuse."""
    with file_lock(path / ".lock", wait):
        for left in list(path.rglob(".*.part")):  # left by a process killed while writing
            remove_path(left)
        yield
        remove_path(path / ".lock")


def _take_back(made: Sequence[Path]) -> None:
    """Remove a directory without any finished stage, and the parents created for it if they are empty."""
    shutil.rmtree(made[0], ignore_errors=True)
    with contextlib.suppress(OSError):  # it now holds another run
        for folder in made[1:]:
            folder.rmdir()
