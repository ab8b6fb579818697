"""One run, from settings to a directory with model, masks and report."""

import contextlib
import fcntl
import json
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from sparsesoup import masks as algebra
from sparsesoup.errors import UserError
from sparsesoup.files import remove, whole, write_json, write_text
from sparsesoup.hub.build import Opened, build, open_task, score_test
from sparsesoup.hub.models import load_tokenizer, save_model
from sparsesoup.journal import JOURNAL, Journal
from sparsesoup.meter import Meter
from sparsesoup.methods import TABLE
from sparsesoup.methods.known import FromTicket
from sparsesoup.problem import Problem
from sparsesoup.recipe import Settings, dump, read
from sparsesoup.report import write_report
from sparsesoup.show import read_report
from sparsesoup.teacher import taught
from sparsesoup.ticket import Ticket, load_masks, save_masks
from sparsesoup.watch import Watch

SPARSITY = 0.9  # where nothing else is said: methods differ there


@dataclass(frozen=True)
class Run:
    """A run's directory and what its report says."""

    path: Path
    report: dict[str, Any]


def prune(settings: Settings, out: Path, console: Console, save_every: float = 10.0) -> Run:
    """Run a method on a model and a dataset, or go on with a run that was stopped; a finished one is only read.

    Raises: UserError for bad input; what was finished before stays on disk.
    """
    if not save_every >= 0:
        raise UserError(f"save_every is a number of seconds, 0 or more, got {save_every}")
    if TABLE[settings.name].dense and settings.amount.sparsity:
        console.print(f"note: {settings.name} keeps every weight; sparsity {settings.amount.sparsity:g} is not used")
    settings = _complete(settings)
    if (out / "run.yaml").exists():
        raise UserError(f"--out {out} is itself a run directory; give the folder that holds runs")
    opened = open_task(settings.place)
    path = out / opened.source.name / f"{settings.name}-{settings.key()}" / f"seed-{settings.place.seed}"
    fresh = not path.exists()
    _check_same(path, settings)
    if (path / "report.json").exists():
        report = read_report(path)
        states = list((path / "stages").glob("*.safetensors"))
        if states or not (path / "report.html").exists():  # killed before the very end
            with _alone(path):
                write_report(path)
                for state in states:
                    remove(state)
        return Run(path, report)
    with _alone(path):  # a process that is refused here must not take back what the other one writes
        try:
            if not (path / "run.yaml").exists():
                write_text(path / "run.yaml", dump(settings))
            return _work(settings, path, out, opened, console, save_every)
        except BaseException:
            if fresh and not (path / "stages" / JOURNAL).exists():
                _remove_empty(path, out)
            raise


def from_arguments(arguments: list[str], console: Console) -> Run:
    """What `sparsesoup prune` does with its arguments."""
    settings, others = read(arguments)
    return prune(settings, Path(others.out), console, others.save_every)


def test(path: Path, console: Console) -> Run:
    """Score a run's model on the test split, once: a second call reads what the first one wrote."""
    report = read_report(path)
    if report["test"] is not None:
        return Run(path, report)
    settings, _ = read(["--config", str(path / "run.yaml")])
    opened = open_task(settings.place)
    watch = Watch(None, console)
    place = replace(settings.place, model=str(path))
    try:
        problem = build(place, opened, steps=1, training=settings.train, observer=watch)
        report["test"] = score_test(problem, place, opened)
    finally:
        watch.close()
    write_json(path / "report.json", report)
    write_report(path)
    return Run(path, report)


def _complete(settings: Settings) -> Settings:
    """The settings with the sparsity that holds where none was given."""
    sparsity = settings.amount.sparsity
    if TABLE[settings.name].dense:
        sparsity = 0.0
    elif sparsity is None and isinstance(settings.method, FromTicket) and settings.method.ticket:
        sparsity = algebra.sparsity(load_masks(Path(settings.method.ticket))[0])
    elif sparsity is None:
        sparsity = SPARSITY
    return replace(settings, amount=replace(settings.amount, sparsity=sparsity))


def _work(settings: Settings, path: Path, out: Path, opened: Opened, console: Console, save_every: float) -> Run:
    place, amount = settings.place, settings.amount
    watch, meter = Watch(path / "log.jsonl", console), Meter()
    try:
        journal = Journal(meter, path / "stages", save_every, watch.position, watch.rewind)
        watch.piece = lambda: journal.open or ""
        problem = build(
            place, opened, steps=amount.steps, epochs=amount.epochs, training=settings.train, meter=meter,
            journal=journal, observer=watch,
        )  # fmt: skip
        if settings.train.distill.teacher:
            problem = taught(problem, settings, opened, lambda dense: prune(dense, out, console, save_every))
        _check_base(path / "stages" / "base.json", problem, opened)
        if journal.resumed:
            console.print(f"going on after {journal.resumed}", highlight=False)
        began = time.perf_counter()
        ticket = settings.method.run(problem, float(amount.sparsity or 0.0))
        report = _summary(settings, problem, ticket, opened, time.perf_counter() - began)
        _save(path, settings, problem, ticket, report)
    finally:
        watch.close()
    journal.close()
    return Run(path, report)


def _save(path: Path, settings: Settings, problem: Problem, ticket: Ticket, report: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(settings.place.model, settings.place.trust_remote_code)
    model: Any = problem.pretrained
    keys = ("method", "model", "dataset", "seed", "sparsity", "validation", "cost", "settings", "versions")
    facts = {k: report[k] for k in keys}
    brief = {"method": settings.name, "base_model": settings.place.model, "masks": "pruning/masks.safetensors"}
    with whole(path / "model") as temporary:
        save_model(model, ticket.weights, temporary, tokenizer, brief | report["sparsity"])
        base = {"origin": problem.origin(), "base_model_prefix": model.base_model_prefix}
        save_masks(temporary / "pruning", ticket.masks, facts | base)
    write_json(path / "report.json", report)
    write_report(path)


def _summary(settings: Settings, problem: Problem, ticket: Ticket, opened: Opened, seconds: float) -> dict[str, Any]:
    targets = problem.targets
    kept = {name: int(torch.count_nonzero(m)) for name, m in ticket.masks.items()}
    libraries = ("sparsesoup", "torch", "transformers", "datasets")
    device = problem.accelerator.device
    return {
        "format": 1,
        "method": settings.name,
        "settings": settings.to_dict(),
        "model": settings.place.model,
        "dataset": opened.source.name,
        "dataset_fingerprint": opened.source.fingerprint,
        "seed": settings.place.seed,
        "steps": problem.steps,
        "sparsity": {
            "asked": settings.amount.sparsity,
            "reached": ticket.sparsity,
            "kept": algebra.kept(ticket.masks),
            "total": algebra.total(ticket.masks),
        },
        "validation": ticket.metrics,
        "test": None,
        "cost": ticket.cost,
        "seconds": seconds,
        "matrices": [
            {"name": n, "role": t.role, "shape": list(t.shape), "kept": kept[n], "total": ticket.masks[n].numel()}
            for n, t in targets.items()
        ],
        "notes": ticket.notes,
        "head": f"task head and what the checkpoint lacks: drawn from seed {settings.place.seed}; not pruned",
        "train_rows": len(problem.train),
        "validation_rows": len(problem.validation),
        "command": settings.command(),
        "versions": {name: version(name) for name in libraries},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
    }


def _check_same(path: Path, settings: Settings) -> None:
    if not path.exists():
        return
    if not (path / "run.yaml").is_file():
        if any(path.iterdir()):
            raise UserError(f"{path} holds something that is no run (no run.yaml); give another --out or remove it")
        return
    try:
        there = yaml.safe_load((path / "run.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path / 'run.yaml'} is damaged; give another --out or remove {path}") from error
    ours = settings.to_dict()
    if not isinstance(there, dict) or {k: v for k, v in there.items() if k != "data_root"} != {
        k: v for k, v in ours.items() if k != "data_root"
    }:
        keys = [k for k in ours if not isinstance(there, dict) or there.get(k) != ours[k]]
        raise UserError(f"{path} holds a different run ({', '.join(keys)} differ); give another --out or remove it")


def _check_base(path: Path, problem: Problem, opened: Opened) -> None:
    """A stopped run goes on only from the same weights and rows."""
    base = {"model": problem.origin(), "dataset": opened.source.fingerprint, "steps": problem.steps}
    if not path.exists():
        write_json(path, base)
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    changed = [k for k in base if there.get(k) != base[k]]
    if changed:
        raise UserError(f"{path.parent.parent} was begun with another {' and '.join(changed)}; give another --out")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Two processes must not write one run."""
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process works on {path}; wait for it or give another --out") from error
        for left in list(path.rglob(".*.part")):  # of a process that was killed while it wrote
            remove(left)
        yield
    remove(path / ".lock")


def _remove_empty(path: Path, out: Path) -> None:
    """Take back a directory in which nothing was finished, and the empty folders above it."""
    shutil.rmtree(path, ignore_errors=True)
    for folder in [*path.parents]:
        if folder == out.parent or not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()
