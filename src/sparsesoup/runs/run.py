"""A run, from settings to a directory with model, masks and report."""

import contextlib
import io
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.files import DIGESTS, atomic_write, file_lock, remove_path, write_table, write_text
from sparsesoup.core.manifest import digests_of_run
from sparsesoup.core.masking import fixed_sparsity
from sparsesoup.core.ticket import Ticket, load_masks, save_masks
from sparsesoup.hub.build import OpenedTask, build_problem, open_task, score_test
from sparsesoup.hub.models.checkpoint import load_reader
from sparsesoup.hub.models.layer_layouts import why_not_shrinkable
from sparsesoup.hub.models.loading import save_model
from sparsesoup.hub.tasks.overview import data_overview
from sparsesoup.hub.tasks.registry import task_type_of
from sparsesoup.hub.tasks.splits import test_splits
from sparsesoup.methods import TABLE
from sparsesoup.methods.from_ticket import FromTicket
from sparsesoup.methods.hybrid import HybridMovement
from sparsesoup.report.run_page import degenerate_notes, write_report
from sparsesoup.report.terminal import read_report
from sparsesoup.runs.config import RunConfig, dump_config, read_run_config
from sparsesoup.runs.options import RuntimeOptions
from sparsesoup.runs.parallel import spread_forks
from sparsesoup.runs.progress import ProgressLogger, opening_lines
from sparsesoup.runs.results import make_report
from sparsesoup.runs.resume_checks import (
    base_fingerprints,
    check_base,
    check_data,
    check_model_files,
    check_recipe,
    check_run_or_model,
    check_same,
    training_environment,
)
from sparsesoup.runs.teacher import with_teacher
from sparsesoup.training.checkpoint import JOURNAL, Checkpointer
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.problem import Problem
from sparsesoup.training.train_cache import TrainingCache

SPARSITY = 0.9  # the default, unless the method has another


@dataclass(frozen=True)
class Run:
    """The directory of a run and its report."""

    path: Path
    report: dict[str, Any]


def run_method(settings: RunConfig, out: Path, outside: RuntimeOptions, within: Path | None = None) -> Run:
    """Run a method on a model and a dataset, or resume a stopped run; a finished one is only read.

    Args:
        settings: settings of the run.
        out: folder of all runs.
        outside: runtime options that do not affect the result.
        within: path of the run below `out`; derived from its settings by default.
    Raises: UserError for bad input; finished stages stay on disk.
    """
    if outside.workers > 1 and not masks_of(settings):
        raise UserError(
            f"--workers only applies to methods with weak masks, not to {settings.name}; leave --workers out"
        )
    if (out / "run.yaml").exists():
        raise UserError(f"--out {out} is itself a run directory; give the folder that holds runs")
    opened = open_task(settings.place)
    if not outside.patient:  # a study prints it once, not per run
        for said in filter(None, (_unused_sparsity_warning(settings), settings.train.precision_warning())):
            outside.console.print(Text(f"note: {said}"), soft_wrap=True)
    settings = fill_default_sparsity(settings)
    path = out / (within or run_folder(opened.source.name, settings))
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    check_same(path, settings)
    if _is_finished(path):
        found = _read_finished(path, opened, settings)
        if (not outside.page or (path / "report.html").exists()) and not _state_files(path):
            return found
    with _exclusive_folder(path, outside.patient):  # a refused process must not remove the files of the other one
        if _is_finished(path):  # finished by another process meanwhile, or killed just before the end
            found = _read_finished(path, opened, settings)
            if outside.page:
                write_report(path)
            for state in _state_files(path):
                remove_path(state)
            return found
        check_same(path, settings)  # another process may have started it meanwhile
        try:
            if not (path / "run.yaml").exists():
                write_text(path / "run.yaml", dump_config(settings))
            return _run_in_folder(settings, path, out, opened, outside)
        except BaseException:
            if path in made and not (path / "stages" / JOURNAL).exists():
                _take_back(made)
            raise


def _unused_sparsity_warning(settings: RunConfig) -> str:
    if not TABLE[settings.name].dense or not settings.amount.sparsity:
        return ""
    return f"{settings.name} keeps every weight; sparsity {settings.amount.sparsity:g} is not used"


def _method_doubts(settings: RunConfig, problem: Problem) -> list[str]:
    """Return the method's notes on this problem before the first step."""
    method, ask = settings.method, getattr(settings.method, "doubts", None)
    found = list(ask(problem, float(settings.amount.sparsity or 0.0))) if ask else []
    parts = getattr(method, "structure", "") in ("heads", "units", "heads-and-units")
    stays = why_not_shrinkable(problem.pretrained) if parts or isinstance(method, HybridMovement) else ""
    return [*found, *([stays] if stays else [])]


def masks_of(settings: RunConfig) -> int:
    """Return the number of weak masks per stage of the method."""
    return int(getattr(settings.method, "weak_masks", 0))


def run_folder(dataset: str, settings: RunConfig) -> Path:
    """Return the path of a run below the folder of all runs: dataset, method and key, seed."""
    return Path(dataset) / f"{settings.name}-{settings.run_key()}" / f"seed-{settings.place.seed}"


def _is_finished(path: Path) -> bool:
    return (path / "report.json").exists()


def _read_finished(path: Path, opened: OpenedTask, settings: RunConfig) -> Run:
    """Return a finished run of these settings, after verifying its files and that the dataset has not changed."""
    report = read_report(path)
    check_run_or_model(path, report)
    check_data(path, report, settings.place.dataset, opened.source)
    check_model_files(path, report, settings.place.model, opened)
    return Run(path, report)


def _modified_at(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0.0


def _state_files(path: Path) -> list[Path]:
    return list((path / "stages").glob("*.safetensors"))


def evaluate_finished_run(path: Path, console: Console) -> Run:
    """Print the run's overview and score its model on the test split, once; later calls read the saved scores."""
    return score_finished_run(path, console, aloud=True)


def score_finished_run(path: Path, console: Console, aloud: bool = False) -> Run:
    """Score as `evaluate_finished_run`; `aloud` prints the overview, which a study prints once for all its runs."""
    report = read_report(path)
    if report["test"] is not None:
        if _modified_at(path / "report.json") > _modified_at(path / "report.html"):  # killed before writing the page
            write_report(path)
        return Run(path, report)
    check_run_or_model(path, report)
    settings = read_run_config(path / "run.yaml")
    check_recipe(path, report, settings)
    # A CLIP ticket contains its prompts; a prompts file may have changed since.
    place = replace(settings.place, model=str(path), prompts=None, class_names=None)
    opened = open_task(place)
    check_data(path, report, place.dataset, opened.source)
    watch = ProgressLogger(None, console)
    try:
        problem = build_problem(place, opened, steps=1, training=settings.train, observer=watch, whole=True)
        watch.first = data_overview(opened, place.seed).lines() if aloud else []
        report["test"] = score_test(problem, place, opened)
        report["test_splits"] = test_splits(opened.source, opened.task)
    finally:
        watch.close()
    write_table(path / "report.json", report)
    write_report(path)
    return Run(path, report)


def fill_default_sparsity(settings: RunConfig) -> RunConfig:
    """Return the settings with the default sparsity if none is set."""
    sparsity = settings.amount.sparsity
    if TABLE[settings.name].dense:
        sparsity = 0.0
    elif sparsity is None and isinstance(settings.method, FromTicket) and settings.method.ticket:
        sparsity = algebra.sparsity(load_masks(Path(settings.method.ticket))[0])
    elif sparsity is None:
        only = fixed_sparsity(getattr(settings.method, "scope", ""))
        sparsity = SPARSITY if only is None else only
    return replace(settings, amount=replace(settings.amount, sparsity=sparsity))


def _run_in_folder(settings: RunConfig, path: Path, out: Path, opened: OpenedTask, outside: RuntimeOptions) -> Run:
    watch, meter = ProgressLogger(path / "log.jsonl", outside.console), CostTracker()
    try:
        journal = Checkpointer(meter, path / "stages", outside.save_every, watch.log_position, watch.rewind_log)
        watch.piece = lambda: journal.open or ""
        data = data_overview(opened, settings.place.seed)
        problem = problem_of(settings, out, outside, opened, meter=meter, journal=journal, observer=watch)
        watch.first = [] if outside.patient else opening_lines(settings, problem, data, path)
        base = base_fingerprints(problem, opened)
        check_base(path / "stages" / "base.json", base)
        problem = replace(
            problem,
            cache=TrainingCache(outside.cache, base | training_environment(settings, problem) | problem.cache.identity),
        )
        doubts = _method_doubts(settings, problem)
        for said in () if outside.patient else doubts:
            outside.console.print(Text(f"note: {said}"), soft_wrap=True)
        if journal.resumed_stage:
            outside.console.print(Text(f"resuming after {journal.resumed_stage}"), soft_wrap=True)
        began = time.perf_counter()
        with spread_forks(outside.workers, path / "stages", rebuild_problem, settings, out) as each:
            ticket = settings.method.run(replace(problem, map=each), float(settings.amount.sparsity or 0.0))
        report = make_report(settings, problem, ticket, opened, time.perf_counter() - began)
        report["notes"] |= {"doubts": doubts} if doubts else {}
        report["notes"] |= degenerate_notes(report, path / "log.jsonl")
        report |= {"data": {"read": data.read, "notes": data.notes}}
        _save_run(path, settings, problem, opened, ticket, report)
        if outside.page:
            write_report(path)
    finally:
        watch.close()
    journal.close()
    return Run(path, report)


def problem_of(
    settings: RunConfig, out: Path, outside: RuntimeOptions, opened: OpenedTask | None = None, **own: Any
) -> Problem:
    """Return the problem of a run, with its teacher found or trained; `own` are the other arguments of `build`."""
    opened, amount = opened or open_task(settings.place), settings.amount
    given: dict[str, Any] = {"steps": amount.steps, "epochs": amount.epochs, "training": settings.train}
    problem = build_problem(settings.place, opened, **given, **own)
    if settings.train.distill.teacher:
        patient = replace(outside, patient=True, workers=1, page=True)

        def run_dense(dense: RunConfig) -> Run:
            if isinstance(watch := problem.observer, ProgressLogger):
                watch.print_overview()
            return run_method(dense, out, patient)

        return with_teacher(problem, settings, opened, run_dense)
    return problem


def rebuild_problem(settings: RunConfig, out: Path) -> Problem:
    """Rebuild the problem of a run for one of its worker processes."""
    return problem_of(settings, out, RuntimeOptions(Console(file=io.StringIO())))


def _save_run(
    path: Path, settings: RunConfig, problem: Problem, opened: OpenedTask, ticket: Ticket, report: dict[str, Any]
) -> None:
    reader = load_reader(settings.place.model, task_type_of(opened.task).images, settings.place.trust_remote_code)
    model: Any = problem.pretrained
    keys = ("method", "model", "dataset", "seed", "sparsity", "validation", "cost", "settings", "local", "versions")
    facts = {k: report[k] for k in keys}
    brief = {"method": settings.name, "base_model": settings.place.model, "masks": "pruning/masks.safetensors"}
    with atomic_write(path / "model") as temporary:
        save_model(model, ticket.weights, temporary, reader, brief | report["sparsity"])
        base = {"origin": problem.base_fingerprint(), "base_model_prefix": model.base_model_prefix}
        save_masks(temporary / "pruning", ticket.masks, facts | base)
        if beside := task_type_of(opened.task).beside:
            beside(temporary / "pruning", model, opened.task)
    report[DIGESTS] = digests_of_run(path)
    write_table(path / "report.json", report)


@contextlib.contextmanager
def _exclusive_folder(path: Path, patient: bool) -> Iterator[None]:
    """Lock a run against other processes: a patient one waits, any other is refused."""
    with file_lock(path / ".lock", patient):
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
