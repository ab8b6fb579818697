"""One run, from settings to a directory with model, masks and report."""

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
from sparsesoup.core.files import DIGESTS, locked, remove, whole, write_table, write_text
from sparsesoup.core.manifest import digests_of_run
from sparsesoup.core.masking import fixed
from sparsesoup.core.ticket import Ticket, load_masks, save_masks
from sparsesoup.hub.build import Opened, build, open_task, score_test
from sparsesoup.hub.models.checkpoint import load_reader
from sparsesoup.hub.models.layer_layouts import uncut
from sparsesoup.hub.models.loading import save_model
from sparsesoup.hub.tasks.overview import overview
from sparsesoup.hub.tasks.registry import kind_of
from sparsesoup.hub.tasks.splits import test_splits
from sparsesoup.methods import TABLE
from sparsesoup.methods.from_ticket import FromTicket
from sparsesoup.methods.hybrid import HybridMovement
from sparsesoup.report.run_page import collapse_of, write_report
from sparsesoup.report.terminal import read_report
from sparsesoup.runs.config import Settings, dump, read
from sparsesoup.runs.options import Outside
from sparsesoup.runs.parallel import spread
from sparsesoup.runs.progress import Watch
from sparsesoup.runs.results import summary
from sparsesoup.runs.resume_checks import (
    base_of,
    check_base,
    check_data,
    check_recipe,
    check_run_or_model,
    check_same,
    surroundings,
)
from sparsesoup.runs.teacher import taught
from sparsesoup.training.checkpoint import JOURNAL, Journal
from sparsesoup.training.cost import Meter
from sparsesoup.training.problem import Problem
from sparsesoup.training.train_cache import Shelf

SPARSITY = 0.9  # where nothing else is said: methods differ there


@dataclass(frozen=True)
class Run:
    """A run's directory and what its report says."""

    path: Path
    report: dict[str, Any]


def prune(settings: Settings, out: Path, outside: Outside, within: Path | None = None) -> Run:
    """Run a method on a model and a dataset, or go on with a run that was stopped; a finished one is only read.

    Args:
        settings: of the run.
        out: the folder of all runs.
        outside: what has no part in the result.
        within: path of the run below `out`; default by its settings.
    Raises: UserError for bad input; what was finished before stays on disk.
    """
    if outside.workers > 1 and not masks_of(settings):
        raise UserError(f"--workers are for weak masks, and {settings.name} draws none; leave --workers out")
    if (out / "run.yaml").exists():
        raise UserError(f"--out {out} is itself a run directory; give the folder that holds runs")
    opened = open_task(settings.place)
    if not outside.patient:  # a study has many runs, and says it in none
        for said in filter(None, (_unused(settings), settings.train.doubt())):
            outside.console.print(Text(f"note: {said}"), soft_wrap=True)
    settings = complete(settings)
    path = out / (within or directory(opened.source.name, settings))
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    check_same(path, settings)
    if _finished(path):
        found = _read(path, opened, settings)
        if (not outside.page or (path / "report.html").exists()) and not _states(path):
            return found
    with _alone(path, outside.patient):  # who is refused here must not take back what the other one writes
        if _finished(path):  # meanwhile by the other one, or killed before the very end
            found = _read(path, opened, settings)
            if outside.page:
                write_report(path)
            for state in _states(path):
                remove(state)
            return found
        check_same(path, settings)  # another process may have begun it meanwhile
        try:
            if not (path / "run.yaml").exists():
                write_text(path / "run.yaml", dump(settings))
            return _work(settings, path, out, opened, outside)
        except BaseException:
            if path in made and not (path / "stages" / JOURNAL).exists():
                _take_back(made)
            raise


def _unused(settings: Settings) -> str:
    if not TABLE[settings.name].dense or not settings.amount.sparsity:
        return ""
    return f"{settings.name} keeps every weight; sparsity {settings.amount.sparsity:g} is not used"


def _doubts(settings: Settings, problem: Problem) -> list[str]:
    """Return notes on a method on this problem before the first step."""
    method, ask = settings.method, getattr(settings.method, "doubts", None)
    found = list(ask(problem, float(settings.amount.sparsity or 0.0))) if ask else []
    parts = getattr(method, "structure", "") in ("heads", "units", "heads-and-units")
    stays = uncut(problem.pretrained) if parts or isinstance(method, HybridMovement) else ""
    return [*found, *([stays] if stays else [])]


def masks_of(settings: Settings) -> int:
    """How many weak masks a stage of the method draws."""
    return int(getattr(settings.method, "weak_masks", 0))


def directory(dataset: str, settings: Settings) -> Path:
    """Where a run goes below the folder of all runs: dataset, method and key, seed."""
    return Path(dataset) / f"{settings.name}-{settings.key()}" / f"seed-{settings.place.seed}"


def _finished(path: Path) -> bool:
    return (path / "report.json").exists()


def _read(path: Path, opened: Opened, settings: Settings) -> Run:
    """A finished run of these settings, if it is as it was written, and was trained on what the dataset holds now."""
    report = read_report(path)
    check_run_or_model(path, report)
    check_data(path, report, settings.place.dataset, opened.source)
    return Run(path, report)


def _changed(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0.0


def _states(path: Path) -> list[Path]:
    return list((path / "stages").glob("*.safetensors"))


def from_arguments(arguments: list[str], console: Console) -> Run:
    """What `sparsesoup prune` does with its arguments."""
    settings, others = read(arguments)
    shelf = Path(others.shelf) if others.shelf else None
    return prune(settings, Path(others.out), Outside(console, others.save_every, shelf, workers=others.workers))


def test(path: Path, console: Console) -> Run:
    """Say what is read, and score a run's model on the test split, once: a later call reads what was written."""
    return score(path, console, aloud=True)


def score(path: Path, console: Console, aloud: bool = False) -> Run:
    """Do what `test` does; `aloud` says what is read, which a study says once for all its runs."""
    report = read_report(path)
    if report["test"] is not None:
        if _changed(path / "report.json") > _changed(path / "report.html"):  # killed before the page was drawn
            write_report(path)
        return Run(path, report)
    check_run_or_model(path, report)
    settings, _ = read(["--config", str(path / "run.yaml")])
    check_recipe(path, report, settings)
    # A ticket of a CLIP carries the words that it was told; a file of them may have changed.
    place = replace(settings.place, model=str(path), prompts=None, class_names=None)
    opened = open_task(place)
    check_data(path, report, place.dataset, opened.source)
    watch = Watch(None, console)
    try:
        problem = build(place, opened, steps=1, training=settings.train, observer=watch, whole=True)
        watch.first = overview(opened, place.seed).lines() if aloud else []
        report["test"] = score_test(problem, place, opened)
        report["test_splits"] = test_splits(opened.source, opened.task)
    finally:
        watch.close()
    write_table(path / "report.json", report)
    write_report(path)
    return Run(path, report)


def complete(settings: Settings) -> Settings:
    """The settings with the sparsity that holds where none was given."""
    sparsity = settings.amount.sparsity
    if TABLE[settings.name].dense:
        sparsity = 0.0
    elif sparsity is None and isinstance(settings.method, FromTicket) and settings.method.ticket:
        sparsity = algebra.sparsity(load_masks(Path(settings.method.ticket))[0])
    elif sparsity is None:
        only = fixed(getattr(settings.method, "scope", ""))
        sparsity = SPARSITY if only is None else only
    return replace(settings, amount=replace(settings.amount, sparsity=sparsity))


def _work(settings: Settings, path: Path, out: Path, opened: Opened, outside: Outside) -> Run:
    watch, meter = Watch(path / "log.jsonl", outside.console), Meter()
    try:
        journal = Journal(meter, path / "stages", outside.save_every, watch.position, watch.rewind)
        watch.piece = lambda: journal.open or ""
        data = overview(opened, settings.place.seed)
        problem = problem_of(settings, out, outside, opened, meter=meter, journal=journal, observer=watch)
        watch.first = [] if outside.patient else [*data.lines(), *(f"note: {note}" for note in problem.notes)]
        base = base_of(problem, opened)
        check_base(path / "stages" / "base.json", base)
        problem = replace(
            problem, shelf=Shelf(outside.shelf, base | surroundings(settings, problem) | problem.shelf.identity)
        )
        doubts = _doubts(settings, problem)
        for said in () if outside.patient else doubts:
            outside.console.print(Text(f"note: {said}"), soft_wrap=True)
        if journal.resumed:
            outside.console.print(Text(f"going on after {journal.resumed}"), soft_wrap=True)
        began = time.perf_counter()
        with spread(outside.workers, path / "stages", anew, settings, out) as each:
            ticket = settings.method.run(replace(problem, map=each), float(settings.amount.sparsity or 0.0))
        report = summary(settings, problem, ticket, opened, time.perf_counter() - began)
        report["notes"] |= {"doubts": doubts} if doubts else {}
        report["notes"] |= collapse_of(report, path / "log.jsonl")
        report |= {"data": {"read": data.read, "notes": data.notes}}
        _save(path, settings, problem, opened, ticket, report)
        if outside.page:
            write_report(path)
    finally:
        watch.close()
    journal.close()
    return Run(path, report)


def problem_of(settings: Settings, out: Path, outside: Outside, opened: Opened | None = None, **own: Any) -> Problem:
    """The problem of a run, its teacher found or drawn first; `own` is what `build` takes beside the settings."""
    opened, amount = opened or open_task(settings.place), settings.amount
    given: dict[str, Any] = {"steps": amount.steps, "epochs": amount.epochs, "training": settings.train}
    problem = build(settings.place, opened, **given, **own)
    if settings.train.distill.teacher:
        patient = replace(outside, patient=True, workers=1, page=True)

        def draw(dense: Settings) -> Run:
            if isinstance(watch := problem.observer, Watch):
                watch.announce()
            return prune(dense, out, patient)

        return taught(problem, settings, opened, draw)
    return problem


def anew(settings: Settings, out: Path) -> Problem:
    """The problem of a run that is under way elsewhere, for a process that works for it."""
    return problem_of(settings, out, Outside(Console(file=io.StringIO())))


def _save(
    path: Path, settings: Settings, problem: Problem, opened: Opened, ticket: Ticket, report: dict[str, Any]
) -> None:
    reader = load_reader(settings.place.model, kind_of(opened.task).images, settings.place.trust_remote_code)
    model: Any = problem.pretrained
    keys = ("method", "model", "dataset", "seed", "sparsity", "validation", "cost", "settings", "local", "versions")
    facts = {k: report[k] for k in keys}
    brief = {"method": settings.name, "base_model": settings.place.model, "masks": "pruning/masks.safetensors"}
    with whole(path / "model") as temporary:
        save_model(model, ticket.weights, temporary, reader, brief | report["sparsity"])
        base = {"origin": problem.origin(), "base_model_prefix": model.base_model_prefix}
        save_masks(temporary / "pruning", ticket.masks, facts | base)
        if beside := kind_of(opened.task).beside:
            beside(temporary / "pruning", model, opened.task)
    report[DIGESTS] = digests_of_run(path)
    write_table(path / "report.json", report)


@contextlib.contextmanager
def _alone(path: Path, patient: bool) -> Iterator[None]:
    """Two processes must not write one run: the second one waits if it is patient, else it is refused."""
    with locked(path / ".lock", patient):
        for left in list(path.rglob(".*.part")):  # of a process that was killed while it wrote
            remove(left)
        yield
        remove(path / ".lock")


def _take_back(made: Sequence[Path]) -> None:
    """Remove a directory in which nothing was finished, and those above it that were made for it and are empty."""
    shutil.rmtree(made[0], ignore_errors=True)
    with contextlib.suppress(OSError):  # another run is in it meanwhile
        for folder in made[1:]:
            folder.rmdir()
