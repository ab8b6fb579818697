"""A run of a model and a dataset found by their names: from settings to a directory with model, masks and report."""

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.text import Text

from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.files import write_table
from sparsesoup.core.masking import fixed_sparsity
from sparsesoup.core.single_process import require_single_process
from sparsesoup.core.ticket import Ticket
from sparsesoup.hub.build import OpenedTask, build_problem, load_model_and_data, open_task, score_test
from sparsesoup.hub.model_data_cache import ModelDataCache
from sparsesoup.hub.models.checkpoint import load_reader
from sparsesoup.hub.models.loading import save_model
from sparsesoup.hub.tasks.overview import DataOverview, data_overview
from sparsesoup.hub.tasks.registry import task_type_of
from sparsesoup.hub.tasks.splits import test_splits
from sparsesoup.methods import TABLE
from sparsesoup.methods.from_ticket import FromTicket
from sparsesoup.methods.pela import Pela
from sparsesoup.report.run_page import write_report
from sparsesoup.report.terminal import read_report
from sparsesoup.runs.config import RunConfig, read_run_config, refuse_objects
from sparsesoup.runs.memory import memory_warning
from sparsesoup.runs.options import RuntimeOptions as RuntimeOptions
from sparsesoup.runs.parallel import parallel_forks
from sparsesoup.runs.progress import ProgressLogger
from sparsesoup.runs.results import RunFacts, facts_of_task
from sparsesoup.runs.resume_checks import (
    base_fingerprints,
    check_data,
    check_model_files,
    check_recipe,
    check_run_or_model,
)
from sparsesoup.runs.run_folder import Run as Run
from sparsesoup.runs.run_folder import run_in_folder
from sparsesoup.runs.teacher import with_teacher
from sparsesoup.runs.trackers import check_installed
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.device import current_device
from sparsesoup.training.forks import ParallelMap
from sparsesoup.training.problem import Problem

SPARSITY = 0.9  # the default, unless the method has another


def run_method(settings: RunConfig, out: Path, outside: RuntimeOptions, within: Path | None = None) -> Run:
    """Run a method on a model and a dataset, or resume a stopped run; a finished one is only read.

    Args:
        settings: settings of the run.
        out: folder of all runs.
        outside: runtime options that do not affect the result.
        within: path of the run below `out`; derived from its settings by default.
    Raises: UserError for bad input; finished stages stay on disk.
    """
    settings = check_options(settings, out, outside)
    opened = outside.load_cache.open_task(settings.model_data)
    path = out / (within or run_folder(opened.source.name, settings))
    return run_in_folder(settings, path, NamedSource(settings, opened, out, outside), outside)


def check_options(settings: RunConfig, out: Path, outside: RuntimeOptions) -> RunConfig:
    """Return the settings of a run with its sparsity, after checking them on this machine; print what is not used.

    Raises: UserError for an option that this machine or the method lacks.
    """
    require_single_process()
    check_installed(settings.tracking.report_to)
    settings.train.check_device()
    if outside.workers > 1 and not masks_of(settings):
        raise UserError(f"only methods with weak masks have a use for it, not {settings.name}; leave it out", "workers")
    if (out / "run.yaml").exists():
        raise UserError(f"{out} is itself a run directory; give the folder that holds runs", "out")
    unused, settings = _unused_sparsity_warning(settings), fill_default_sparsity(settings)
    if not outside.wait:  # a study prints it once, not per run
        for note in filter(None, (unused, settings.train.precision_warning())):
            outside.console.print(Text(f"note: {note}"), soft_wrap=True)
    return settings


@dataclass(frozen=True)
class NamedSource:
    """Model and data found by their names: the source of a run from the command line.

    Args:
        settings: settings of the run.
        opened: the dataset with its task.
        out: folder of all runs, in which a dense teacher is looked for.
        outside: runtime options.
    """

    settings: RunConfig
    opened: OpenedTask
    out: Path
    outside: RuntimeOptions

    def overview(self) -> DataOverview:
        """Return what is read of the data, and possible mistakes."""
        return self.outside.load_cache.overview(self.settings.model_data, self.opened)

    def make_problem(self, meter: CostTracker, checkpointer: Checkpointer, watch: ProgressLogger) -> Problem:
        """Return the problem, with its teacher."""
        if not self.outside.wait:  # the dry run of a study has checked that it fits
            device, snapshots = current_device(), self.outside.snapshots
            if note := memory_warning(self.settings, self.opened, device, snapshots):
                self.outside.console.print(Text(f"note: {note}"), soft_wrap=True)
        own: dict[str, Any] = {"meter": meter, "checkpointer": checkpointer, "observer": watch}
        return problem_of(self.settings, self.out, self.outside, self.opened, **own)

    def fingerprints(self, problem: Problem) -> dict[str, Any]:
        """Return the fingerprints of weights, files and rows, and T."""
        return base_fingerprints(problem, self.opened)

    def parallel_map(self, path: Path | None) -> contextlib.AbstractContextManager[ParallelMap]:
        """Provide the map over the copies of a state, in several processes."""
        folder = (path or self.out) / "stages"
        return parallel_forks(self.outside.workers, folder, rebuild_problem, self.settings, self.out)

    def run_facts(self, problem: Problem, ticket: Ticket) -> RunFacts:
        """Return what the report says of model and data."""
        return facts_of_task(self.settings, problem, self.opened)

    def save_model(self, folder: Path, problem: Problem, ticket: Ticket, brief: Mapping[str, Any]) -> None:
        """Write the model with its tokenizer or image processor, and the other files of its task."""
        model_data, kind, model = (
            self.settings.model_data,
            task_type_of(self.opened.task),
            cast(Any, problem.pretrained),
        )
        save_model(
            model,
            ticket.weights,
            folder,
            load_reader(model_data.model, kind.images, model_data.trust_remote_code),
            brief,
        )
        if kind.save_extras:
            kind.save_extras(folder / "pruning", model, self.opened.task)

    def check_unchanged(self, path: Path, report: Mapping[str, Any]) -> None:
        """Raise a UserError if the dataset or the base model's files have changed."""
        model_data = self.settings.model_data
        check_data(path, report, model_data.dataset, self.opened.source)
        check_model_files(path, report, model_data.model, self.opened)


def _unused_sparsity_warning(settings: RunConfig) -> str:
    if not TABLE[settings.name].dense or not settings.budget.sparsity:
        return ""
    return f"{settings.name} keeps every weight; sparsity {settings.budget.sparsity:g} is not used"


def masks_of(settings: RunConfig) -> int:
    """Return the number of weak masks per stage of the method."""
    return int(getattr(settings.method, "weak_masks", 0))


def run_folder(dataset: str, settings: RunConfig) -> Path:
    """Return the path of a run below the folder of all runs: dataset, method and key, seed."""
    return Path(dataset) / f"{settings.name}-{settings.run_key()}" / f"seed-{settings.model_data.seed}"


def _modified_at(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0.0


def evaluate_finished_run(path: Path, console: Console) -> Run:
    """Print the run's overview and score its model on the test split, once; later calls read the saved scores."""
    return score_finished_run(path, console, show_overview=True)


def score_finished_run(
    path: Path, console: Console, show_overview: bool = False, load_cache: ModelDataCache | None = None
) -> Run:
    """Score a finished run on the test split.

    Args:
        show_overview: print the data first, which a study does only once.
        load_cache: the model and data that the run began with, if they are kept.
    """
    load_cache = load_cache or ModelDataCache()
    report = read_report(path)
    if report["test"] is not None:
        if _modified_at(path / "report.json") > _modified_at(path / "report.html"):  # killed before writing the page
            write_report(path)
        return Run(path, report)
    refuse_objects(report["settings"], str(path))
    check_run_or_model(path, report)
    settings = read_run_config(path / "run.yaml")
    check_recipe(path, report, settings)
    # A CLIP ticket contains its prompts; a prompts file may have changed since.
    model_data = replace(settings.model_data, model=str(path), prompts=None, class_names=None)
    opened = open_task(model_data, load_cache.open_source(model_data))
    check_data(path, report, model_data.dataset, opened.source)
    watch = ProgressLogger(None, console)
    try:
        precision = settings.train.mixed_precision
        loaded = load_model_and_data(
            model_data, opened, precision, True, load_cache.cached_model_and_data(settings.model_data, precision)
        )
        problem = build_problem(model_data, opened, steps=1, training=settings.train, observer=watch, loaded=loaded)
        watch.first = data_overview(opened, model_data.seed).lines() if show_overview else []
        report["test"] = score_test(problem, model_data, opened)
        report["test_splits"] = test_splits(opened.source, opened.task)
    finally:
        watch.close()
    write_table(path / "report.json", report)
    write_report(path)
    return Run(path, report)


def fill_default_sparsity(settings: RunConfig) -> RunConfig:
    """Return the settings with the default sparsity if none is set.

    Raises: UserError for a sparsity above 0 of a method that removes parameters by rank.
    """
    sparsity = settings.budget.sparsity
    if isinstance(settings.method, Pela):
        settings.method.refuse_sparsity(sparsity or 0.0)
    if TABLE[settings.name].dense:
        sparsity = 0.0
    elif sparsity is None and isinstance(settings.method, FromTicket) and settings.method.ticket:
        sparsity = algebra.sparsity(settings.method.load_given()[0])
    elif sparsity is None:
        only = fixed_sparsity(getattr(settings.method, "scope", ""))
        sparsity = SPARSITY if only is None else only
    return replace(settings, budget=replace(settings.budget, sparsity=sparsity))


def problem_of(
    settings: RunConfig, out: Path, outside: RuntimeOptions, opened: OpenedTask | None = None, **own: Any
) -> Problem:
    """Return the problem of a run, with its teacher found or trained; `own` are the other arguments of `build`."""
    opened, budget = opened or outside.load_cache.open_task(settings.model_data), settings.budget
    given: dict[str, Any] = {"steps": budget.steps, "epochs": budget.epochs, "training": settings.train}
    given["loaded"] = outside.load_cache.load_model_and_data(
        settings.model_data, opened, settings.train.mixed_precision
    )
    problem = build_problem(settings.model_data, opened, **given, **own)
    if settings.train.distill.teacher:
        inner = replace(outside, wait=True, workers=1, page=True, observer=None)

        def run_dense(dense: RunConfig) -> Run:
            if isinstance(watch := problem.observer, ProgressLogger):
                watch.print_overview()
            return run_method(dense, out, inner)

        return with_teacher(problem, settings, opened, run_dense)
    return problem


def rebuild_problem(settings: RunConfig, out: Path) -> Problem:
    """Rebuild the problem of a run for one of its worker processes."""
    return problem_of(settings, out, RuntimeOptions(Console(file=io.StringIO())))
