"""Benchmark pruned models: size, FLOPs, and batch time relative to the dense model, on every available backend."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import write_json
from sparsesoup.core.threads import check_threads
from sparsesoup.core.timing import MedianAndQuartiles, median_and_quartiles, speedup_ratios, time_interleaved
from sparsesoup.exports.benchmark.backends import BACKENDS, BenchmarkInputs, BoundModel
from sparsesoup.exports.benchmark.candidate import AS_IT_IS, BenchmarkCandidate, open_subject
from sparsesoup.exports.benchmark.explain import explain_speed, summary_sentences
from sparsesoup.exports.benchmark.flops import forward_flops, profile_model, sparse_flops
from sparsesoup.exports.runtimes import first_error_line
from sparsesoup.exports.source import run_folder_of
from sparsesoup.hub.build import max_positions
from sparsesoup.hub.models.dummy_inputs import dummy_inputs
from sparsesoup.report.run_page import write_report
from sparsesoup.runs.results import library_versions, machine_name

FILE = "benchmark.json"
MEMORY = psutil.virtual_memory().total  # bytes of memory in this machine
CLOSE = 1e-2  # largest difference between the outputs of a backend and torch, as a share of the largest output
Facts = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Settings of a benchmark.

    Args:
        batch: texts or images in a batch.
        length: tokens of a text; ignored for images.
        threads: threads for each backend; None: torch's number.
        rounds: interleaved measurements of each candidate.
        on: the backends.
    Raises: UserError for a number that is too small, or an unknown backend.
    """

    batch: int = 32
    length: int = 128
    threads: int | None = None
    rounds: int = 9
    backends: tuple[str, ...] = tuple(BACKENDS)

    def __post_init__(self) -> None:
        if isinstance(self.backends, str):  # also accepted in Python, as on the command line
            object.__setattr__(self, "backends", tuple(name for name in self.backends.split(",") if name))
        for name, least in (("batch", 1), ("length", 3), ("threads", 1), ("rounds", 3)):
            value = getattr(self, name)
            if value is None and name == "threads":
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise UserError(f"--{name} is a whole number, got {value!r}")
            if value < least:
                raise UserError(f"--{name} is at least {least}, got {value}")
        check_threads(self.threads)
        if unknown := [name for name in self.backends or ("",) if name not in BACKENDS]:
            raise UserError(f"unknown backend {unknown[0]!r} in --backends; allowed: {', '.join(BACKENDS)}")


def run_benchmark(
    paths: Sequence[Path], how: BenchmarkConfig, note: Callable[[str], object] = lambda text: None
) -> list[Facts]:
    """Benchmark runs or exports side by side; return a table of facts for each, as in benchmark.json.

    Args:
        paths: run directories, model folders with `pruning/`, exports.
        how: batch, length, threads, rounds, backends.
        note: called with a progress message.
    Raises: UserError for bad input, or if no backend could run any of them. A backend that fails on a model is noted
        and skipped.
    """
    if not paths:
        raise UserError("nothing to measure; give a run or an export, or several")
    subjects = [open_subject(path) for path in paths]
    for subject in subjects:
        _check_length(subject, how)
        _check_size(subject, how)
    with _limit_threads(how.threads):
        with _in_memory(how):
            batches = [dummy_inputs(subject.dense, how.batch, how.length) for subject in subjects]
            tables = [_static_facts(subject, batch, how) for subject, batch in zip(subjects, batches, strict=True)]
        with tempfile.TemporaryDirectory() as folder:
            for name in how.backends:
                note(f"measuring on {BACKENDS[name].label}")
                _time_backend(name, subjects, batches, tables, how, Path(folder))
        _check_rows(tables)
        for table in tables:
            table["said"] = summary_sentences(table)
    return tables


def _check_rows(tables: Sequence[Facts]) -> None:
    """Raise a UserError if no backend could run any of them."""
    if not any(table["rows"] for table in tables):
        first = tables[0]
        reasons = "; ".join(f"{label}: {reason}" for label, reason in first["failed"].items())
        raise UserError(
            f"nothing of {first['path']} could be measured ({reasons}); name other backends with --backends"
        )


def _check_length(subject: BenchmarkCandidate, how: BenchmarkConfig) -> None:
    most = max_positions(subject.dense)
    if "input_ids" in dummy_inputs(subject.dense) and how.length > most:
        raise UserError(f"--length {how.length} is above the {most} positions of {subject.path}; say {most} or less")


def _check_size(subject: BenchmarkCandidate, how: BenchmarkConfig) -> None:
    """Raise a UserError for a batch whose inputs exceed the memory: torch would raise an obscure error."""
    few = dummy_inputs(subject.dense)
    row = sum(t[0].nbytes * how.length // t.shape[1] if t.dim() == 2 else t[0].nbytes for t in few.values())
    if how.batch > (most := MEMORY // row):
        long = f" of --length {how.length}" if "input_ids" in few else ""
        raise UserError(
            f"--batch {how.batch}{long} is too large: the {MEMORY / 1e9:.3g} GB of memory here hold the inputs of at "
            f"most {most}, and the model needs more than those; say far less, such as {BenchmarkConfig.batch}"
        )


@contextlib.contextmanager
def _in_memory(how: BenchmarkConfig) -> Iterator[None]:
    """Turn an out-of-memory error for a batch into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise UserError(
            f"--batch {how.batch} is too large for the memory here ({first_error_line(error)}); say a smaller "
            f"--batch or --length"
        ) from error


@contextlib.contextmanager
def _limit_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _static_facts(subject: BenchmarkCandidate, batch: Mapping[str, Tensor], how: BenchmarkConfig) -> Facts:
    """Return the facts of a candidate that need no timing."""
    models = subject.forms
    parameters = sum(p.numel() for p in subject.dense.parameters())
    counted = {form: forward_flops(model, batch) for form, model in models.items()}
    for kind in ("csr", "bsr"):
        with contextlib.suppress(UserError):
            counted[kind] = sparse_flops(models[AS_IT_IS], kind, batch)
    profiles = {form: asdict(profile_model(model, batch)) for form, model in {"dense": subject.dense, **models}.items()}
    return {
        "format": 1,
        "path": str(subject.path),
        "batch": how.batch,
        "length": how.length if "input_ids" in batch else None,
        "threads": torch.get_num_threads(),
        "rounds": how.rounds,
        "machine": machine_name(),
        "versions": library_versions(),
        "sizes": {"dense": {"raw": subject.itemsize * parameters, "parameters": parameters}, "this": subject.sizes},
        "flops": {"dense": forward_flops(subject.dense, batch), **counted},
        "profiles": profiles,
        "notes": [*subject.notes],
        "rows": [],
        "failed": {},
    }


@dataclass(frozen=True)
class _TimedForm:
    """A timed model: the dense one (form "dense") or a form of a candidate."""

    number: int
    form: str
    answer: BoundModel


def _time_backend(
    name: str, subjects: Sequence[BenchmarkCandidate], batches: Sequence[Mapping[str, Tensor]],
    tables: Sequence[Facts], how: BenchmarkConfig,
    folder: Path,
) -> None:  # fmt: skip
    """Time all candidates on a backend in turn, and add the results to their tables."""
    turns: list[_TimedForm] = []
    for i, subject in enumerate(subjects):
        place = BenchmarkInputs(batches[i], torch.get_num_threads(), folder)
        try:
            turns += _warm_forms(name, i, subject, place)
        except Exception as error:  # any error of a backend: continue with the others
            tables[i]["failed"][BACKENDS[name].label] = first_error_line(error)
    times = time_interleaved([turn.answer for turn in turns], how.rounds)
    dense = {turn.number: t for turn, t in zip(turns, times, strict=True) if turn.form == "dense"}
    for turn, seconds in zip(turns, times, strict=True):
        if turn.form != "dense":
            tables[turn.number]["rows"].append(
                _result_row(name, turn.form, dense[turn.number], seconds, tables[turn.number])
            )


def _warm_forms(name: str, number: int, subject: BenchmarkCandidate, place: BenchmarkInputs) -> list[_TimedForm]:
    """Warm up the dense model and a candidate's forms for a backend, and compare their outputs."""
    backend = BACKENDS[name]
    forms = _forms_for(subject, name)
    if not forms:
        raise UserError(f"a graph for another engine cannot be run on {backend.label}")
    plain = BACKENDS[backend.dense] if backend.dense else backend
    turns = [_TimedForm(number, form, backend.ready(model, place)) for form, model in forms.items()]
    if subject.graph is None:
        expected = BACKENDS["torch"].ready(subject.forms[AS_IT_IS], place)()
        for turn in turns:
            _check_answers(turn.answer(), expected)
    turns.append(_TimedForm(number, "dense", plain.ready(subject.dense, place)))
    turns[-1].answer()
    return turns


def _forms_for(subject: BenchmarkCandidate, name: str) -> dict[str, Any]:
    """Return a candidate's forms for a backend: the smallest one, and the one with zeros if that is informative."""
    backend, forms = BACKENDS[name], subject.forms
    if subject.graph is not None:
        return {AS_IT_IS: subject.graph} if subject.graph.suffix in backend.reads else {}
    if backend.dense:
        return {AS_IT_IS: forms[AS_IT_IS]}
    return forms if backend.zeros else dict([[*forms.items()][-1]])  # the last one is the smallest


def _check_answers(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise a UserError if the outputs of a backend differ from torch's, since its time would be meaningless."""
    for one, other in zip(found, expected, strict=True):
        difference, largest = float((one - other).abs().max()), float(other.abs().max())
        if not difference <= CLOSE * max(largest, 1.0):
            raise UserError(f"it answers otherwise than torch, by {difference:.3g} of {largest:.3g}")


def _result_row(name: str, form: str, dense: Sequence[float], own: Sequence[float], table: Facts) -> Facts:
    """Return the result of a form on a backend: seconds per batch, and FLOPs per second of the remaining products."""
    faster, counted = median_and_quartiles(speedup_ratios(dense, own)), table["flops"]
    times: dict[str, MedianAndQuartiles] = {"dense": median_and_quartiles(dense), "own": median_and_quartiles(own)}
    count = max(1, counted.get(name, counted[form]))
    row = {
        "on": name,
        "label": BACKENDS[name].label,
        "form": form,
        "promise": counted["dense"] / count,
        "faster": faster.middle,
        "quartiles": [faster.low, faster.high],
        "seconds": times["own"].middle,
        "dense_seconds": times["dense"].middle,
        "per_second": table["batch"] / times["own"].middle,
        "dense_per_second": table["batch"] / times["dense"].middle,
    }
    return {**row, "why": explain_speed(row, table)}


def write_tables(paths: Sequence[Path], tables: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write each table next to its model, update the pages of runs, and return the files written."""
    places = [run_folder_of(path) for path in paths]
    for place, table in zip(places, tables, strict=True):
        write_json(place / FILE, table)
        if (place / "report.json").is_file():
            write_report(place)
    return [place / FILE for place in places]
