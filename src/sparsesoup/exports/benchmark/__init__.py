"""Benchmark pruned models: size, FLOPs, and batch time relative to the dense model, on every available backend."""

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.files import write_json
from sparsesoup.core.settings import TypedSettings
from sparsesoup.core.threads import check_threads
from sparsesoup.core.timing import median_and_quartiles, speedup_ratios, time_interleaved
from sparsesoup.exports.benchmark.backends import (
    BACKENDS,
    Batch,
    BoundModel,
    forward_flops,
    profile_model,
    sparse_flops,
)
from sparsesoup.exports.benchmark.candidate import AS_IT_IS, BenchmarkCandidate, open_candidate
from sparsesoup.exports.benchmark.explain import explain_speed, summary_sentences
from sparsesoup.exports.runtimes import first_error_line
from sparsesoup.exports.source import largest_difference, run_folder_of
from sparsesoup.hub.build import max_positions
from sparsesoup.hub.models.dummy_inputs import dummy_inputs
from sparsesoup.report.run_page import write_report
from sparsesoup.runs.results import library_versions, machine_name

FILE = "benchmark.json"
MEMORY = psutil.virtual_memory().total  # bytes of memory in this machine
LENGTH = 128  # tokens of a text
CLOSE = 1e-2  # largest difference between the outputs of a backend and torch, as a share of the largest output
Facts = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(TypedSettings):
    """Settings of a benchmark.

    Args:
        batch: texts or images in a batch.
        length: tokens of a text; None: 128.
        threads: threads for each backend; None: torch's number.
        rounds: interleaved measurements of each candidate.
        backends: the backends.
    """

    batch: int = 32
    length: int | None = None
    threads: int | None = None
    rounds: int = 9
    backends: tuple[str, ...] = tuple(BACKENDS)

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("length", 3), ("threads", 1), ("rounds", 3)):
            value = getattr(self, name)
            require(value is None or value >= least, name, f"at least {least}", value)
        check_threads(self.threads)
        if unknown := [name for name in self.backends or ("",) if name not in BACKENDS]:
            raise UserError(f"unknown backend {unknown[0]!r}; allowed: {', '.join(BACKENDS)}", "backends")

    @property
    def tokens(self) -> int:
        """The tokens of a text."""
        return LENGTH if self.length is None else self.length


def run_benchmark(
    paths: Sequence[Path], how: BenchmarkConfig, note: Callable[[str], object] = lambda text: None
) -> list[Facts]:
    """Benchmark runs or exports side by side; return a table of facts for each, as in benchmark.json.

    A backend that fails on a model is noted and skipped; it is an error if none runs any of them.
    """
    if not paths:
        raise UserError("nothing to measure; give a run or an export, or several")
    candidates = [open_candidate(path) for path in paths]
    for candidate in candidates:
        _check_batch(candidate, how)
    threads = torch.get_num_threads()
    torch.set_num_threads(how.threads or threads)
    try:
        tables = _measure_candidates(candidates, how, note)
    finally:
        torch.set_num_threads(threads)
    if not any(table["rows"] for table in tables):
        reasons = "; ".join(f"{label}: {reason}" for label, reason in tables[0]["failed"].items())
        raise UserError(
            f"nothing of {tables[0]['path']} could be measured ({reasons}); name other backends with --backends"
        )
    return [{**table, "summary": summary_sentences(table)} for table in tables]


def _check_batch(candidate: BenchmarkCandidate, how: BenchmarkConfig) -> None:
    """Refuse texts that are too long, and inputs that exceed the memory, for which torch has an obscure error."""
    few = dummy_inputs(candidate.dense)
    if how.length is not None and "input_ids" not in few:
        raise UserError(f"it is for texts, and {candidate.path} reads images, got {how.length}; leave it out", "length")
    if "input_ids" in few and how.tokens > (most := max_positions(candidate.dense)):
        raise UserError(
            f"--length {how.tokens} is above the {most} positions of {candidate.path}; set it to {most} or less"
        )
    row = sum(t[0].nbytes * how.tokens // t.shape[1] if t.dim() == 2 else t[0].nbytes for t in few.values())
    if how.batch > (most := MEMORY // row):
        long = f" of --length {how.tokens}" if "input_ids" in few else ""
        raise UserError(
            f"--batch {how.batch}{long} is too large: the {MEMORY / 1e9:.3g} GB of memory here hold the inputs of at "
            f"most {most}, and the model needs more than those; set far less, such as {BenchmarkConfig.batch}"
        )


def _measure_candidates(
    candidates: Sequence[BenchmarkCandidate], how: BenchmarkConfig, note: Callable[[str], object]
) -> list[Facts]:
    try:
        batches = [dummy_inputs(candidate.dense, how.batch, how.tokens) for candidate in candidates]
        tables = [_static_facts(candidate, batch, how) for candidate, batch in zip(candidates, batches, strict=True)]
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise UserError(
            f"--batch {how.batch} is too large for the memory here ({first_error_line(error)}); set a smaller "
            f"--batch or --length"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        for name in how.backends:
            note(f"measuring on {BACKENDS[name].label}")
            _time_backend(name, list(zip(candidates, batches, tables, strict=True)), how.rounds, Path(folder))
    return tables


def _static_facts(candidate: BenchmarkCandidate, batch: Batch, how: BenchmarkConfig) -> Facts:
    """Return the facts of a candidate that need no backend."""
    models = {"dense": candidate.dense, **candidate.forms}
    flops = {form: forward_flops(model, batch) for form, model in models.items()}
    for kind in ("csr", "bsr"):
        with contextlib.suppress(UserError):
            flops[kind] = sparse_flops(models[AS_IT_IS], kind, batch)
    parameters = sum(p.numel() for p in candidate.dense.parameters())
    dense = {"raw": candidate.itemsize * parameters, "parameters": parameters}
    return {
        "format": 1,
        "path": str(candidate.path),
        "batch": how.batch,
        "length": how.tokens if "input_ids" in batch else None,
        "threads": torch.get_num_threads(),
        "rounds": how.rounds,
        "machine": machine_name(),
        "versions": library_versions(),
        "sizes": {"dense": dense, "this": candidate.sizes},
        "flops": flops,
        "profiles": {form: profile_model(model, batch) for form, model in models.items()},
        "notes": candidate.notes,
        "rows": [],
        "failed": {},
    }


def _time_backend(
    name: str, measured: Sequence[tuple[BenchmarkCandidate, Batch, Facts]], rounds: int, folder: Path
) -> None:
    """Time all candidates on a backend in turn, and add the results to their tables."""
    timed: dict[tuple[int, str], BoundModel] = {}  # number of the candidate and its form
    for i, (candidate, batch, table) in enumerate(measured):
        try:
            timed |= {(i, form): model for form, model in _warm_forms(name, candidate, batch, folder).items()}
        except Exception as error:  # any error of a backend: continue with the others
            table["failed"][BACKENDS[name].label] = first_error_line(error)
    times = dict(zip(timed, time_interleaved([*timed.values()], rounds), strict=True))
    for (i, form), seconds in times.items():
        if form != "dense":
            table = measured[i][2]
            table["rows"].append(_result_row(name, form, times[i, "dense"], seconds, table))


def _warm_forms(name: str, candidate: BenchmarkCandidate, batch: Batch, folder: Path) -> dict[str, BoundModel]:
    """Warm up a candidate's forms for a backend and its dense model, and compare the outputs of the forms."""
    backend = BACKENDS[name]
    if not (forms := _forms_for(candidate, name)):
        raise UserError(f"a graph for another engine cannot be run on {backend.label}")
    warm = {form: backend.ready(model, batch, folder) for form, model in forms.items()}
    if candidate.graph is None:
        expected = BACKENDS["torch"].ready(candidate.forms[AS_IT_IS], batch, folder)()
        for model in warm.values():
            _check_answers(model(), expected)
    warm["dense"] = BACKENDS[backend.dense or name].ready(candidate.dense, batch, folder)
    warm["dense"]()
    return warm


def _forms_for(candidate: BenchmarkCandidate, name: str) -> dict[str, Any]:
    """Return a candidate's forms for a backend: the smallest one, and the one with zeros if that is informative."""
    backend, forms = BACKENDS[name], candidate.forms
    if candidate.graph is not None:
        return {AS_IT_IS: candidate.graph} if candidate.graph.suffix in backend.reads else {}
    if backend.dense:
        return {AS_IT_IS: forms[AS_IT_IS]}
    return forms if backend.zeros else dict([[*forms.items()][-1]])  # the last one is the smallest


def _check_answers(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise a UserError if the outputs of a backend differ from torch's, since its time would be meaningless."""
    for one, other in zip(found, expected, strict=True):
        largest_difference([one], [other], CLOSE, "it answers otherwise than torch")


def _result_row(name: str, form: str, dense: Sequence[float], own: Sequence[float], table: Facts) -> Facts:
    """Return the result of a form on a backend: median seconds a batch, their ratio, and quartiles over the rounds."""
    rounds, flops = median_and_quartiles(speedup_ratios(dense, own)), table["flops"]
    seconds, dense_seconds = median_and_quartiles(own).middle, median_and_quartiles(dense).middle
    row = {
        "on": name,
        "label": BACKENDS[name].label,
        "form": form,
        "flops_ratio": flops["dense"] / max(1, flops.get(name, flops[form])),
        "faster": dense_seconds / seconds,
        "quartiles": [rounds.low, rounds.high],
        "seconds": seconds,
        "dense_seconds": dense_seconds,
        "per_second": table["batch"] / seconds,
        "dense_per_second": table["batch"] / dense_seconds,
    }
    return {**row, "why": explain_speed(row, table)}


def write_tables(paths: Sequence[Path], tables: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write each table next to its model, update the pages of runs, and return the files written."""
    run_paths = [run_folder_of(path) for path in paths]
    for run_path, table in zip(run_paths, tables, strict=True):
        write_json(run_path / FILE, table)
        if (run_path / "report.json").is_file():
            write_report(run_path)
    return [run_path / FILE for run_path in run_paths]
