"""The command line's verbs, from Python."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from sparsesoup import exports
from sparsesoup.core.errors import UserError
from sparsesoup.exports import benchmark as measuring
from sparsesoup.exports import push as pushing
from sparsesoup.exports.benchmark import write_tables
from sparsesoup.exports.verify import verified_export
from sparsesoup.report.console import SafeConsole
from sparsesoup.runs import run
from sparsesoup.runs.config import config_from_dict


def prune(
    name: str,
    *,
    out: str | Path = "runs",
    method: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    shelf: str | Path | None = None,
    workers: int = 1,
    progress: bool = True,
    **settings: Any,
) -> run.Run:
    """Draw a ticket; what `sparsesoup prune NAME` does.

    Args:
        name: of the method, as in `sparsesoup methods`.
        out: folder that run directories are put in.
        method: the method's own settings that differ from their defaults.
        train: settings of the training that differ from their defaults.
        shelf: folder of trainings that runs have in common; each is charged in full.
        workers: processes over which the weak masks of a run are spread.
        progress: whether to show it on stderr.
        settings: model, dataset, sparsity, steps, epochs, seed, max_length, ... as on the command line.
    Returns: the run: `path` of its directory, whose `model` folder transformers loads, and its `report`.
    Raises: UserError for bad input.
    """
    table = {**settings, "method": method or {}, "train": train or {}}
    console = SafeConsole(stderr=True, quiet=not progress)
    outside = run.RuntimeOptions(console, shelf=Path(shelf) if shelf else None, workers=workers)
    return run.run_method(config_from_dict(name, table), Path(out), outside)


def export(
    path: str | Path, to: str, out: str | Path, *, verify: bool = False, **settings: Any
) -> exports.WrittenExport:
    """Write a pruned model in another form; what `sparsesoup export RUN --to FORMAT --out DIR` does.

    Args:
        path: run directory, model folder with `pruning/`, or another export.
        to: dense, packed, compact, onnx, openvino or semi-structured.
        out: folder to write; an earlier export there is replaced, anything else refused.
        verify: load it in a fresh process, ask it for the whole test split and compare with the source's own answers.
        settings: those of the format, such as dtype="bf16" of packed.
    Returns: the export: `path` of its folder and `facts`, what its export.json says.
    Raises: UserError for bad input; then nothing is written.
    """
    return (verified_export if verify else exports.write_export)(Path(path), to, Path(out), settings)


def push(
    path: str | Path, repo: str, *, out: str | Path | None = None, private: bool = False, license: str = "unknown",
    token_from_env: str = "",
) -> str:  # fmt: skip
    """Put a model on the Hub with its card; what `sparsesoup push RUN REPO` does, or with `out` its `--dry-run`.

    Args:
        path: a finished run's directory, or an export.
        repo: owner/name.
        out: folder to write instead of uploading; it must not exist.
        private: whether a new repository is private.
        license: as the Hub calls it, such as apache-2.0.
        token_from_env: environment variable that holds the token; default HF_TOKEN, else the one of `hf auth login`.
    Returns: the address on the Hub, or the folder.
    Raises: UserError for bad input, without a token, or if the Hub does not answer.
    """
    to = Path(out) if out is not None else None
    return pushing.push_to_hub(
        Path(path), repo, out=to, private=private, license=license, token_from_env=token_from_env
    )


def benchmark(
    *paths: str | Path, note: Callable[[str], object] = lambda text: None, **how: Any
) -> list[dict[str, Any]]:
    """What pruning gained, side by side; what `sparsesoup measure RUN_OR_EXPORT ...` does.

    Args:
        paths: run directories, model folders with `pruning/`, exports.
        note: told what is measured next.
        how: batch, length, threads, rounds, on (names of backends), as on the command line.
    Returns: for each what its measure.json says.
    Raises: UserError for bad input.
    """
    folders = [Path(path) for path in paths]
    if unknown := how.keys() - {field.name for field in fields(measuring.BenchmarkConfig)}:
        raise UserError(f"measure has no setting {min(unknown)!r}; it has batch, length, threads, rounds, on")
    tables = measuring.run_benchmark(folders, measuring.BenchmarkConfig(**how), note)
    write_tables(folders, tables)
    return tables


def score_on_test(path: str | Path) -> dict[str, Any]:
    """Scores of a finished run on the test split, taken once; what `sparsesoup test RUN` does."""
    return run.evaluate_finished_run(Path(path), SafeConsole(quiet=True)).report["test"]
