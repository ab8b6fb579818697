"""The verbs of the command line, from Python: names and paths go in, and so do objects of the settings' classes."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from sparsesoup import exports
from sparsesoup.core.errors import UserError, require
from sparsesoup.core.settings import fill_settings, unknown_setting
from sparsesoup.exports import benchmark as benchmarks
from sparsesoup.exports import push as pushing
from sparsesoup.exports.verify import verified_export
from sparsesoup.hub.build import ModelAndDataConfig
from sparsesoup.hub.models import tickets
from sparsesoup.methods import Method, row_of
from sparsesoup.report.escaping import SafeConsole
from sparsesoup.runs import run
from sparsesoup.runs.config import RunConfig, config_from_dict
from sparsesoup.runs.options import check_cache_size
from sparsesoup.study.compare import StudyResult, compare_recipe, compare_results
from sparsesoup.study.execute.jobs import TrialOptions
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.device import device_chosen
from sparsesoup.training.observer import Observer

if TYPE_CHECKING:
    from sparsesoup.loops.objects import PrunedModel

ALONE = "objects stay in this process, so nothing is shared with others; leave it out"


@overload
def prune(name: str | Method, *, train_dataset: Any, **settings: Any) -> "PrunedModel": ...
@overload
def prune(
    name: str | Method, *, model: str | None = None, dataset: str | None = None, sparsity: float | None = None,
    steps: int | None = None, epochs: float | None = None, seed: int | None = None,
    method: Mapping[str, Any] | None = None, train: Mapping[str, Any] | TrainingConfig | None = None,
    out: str | Path | None = None, cache_dir: str | Path | None = None, cache_size: float = 32.0,
    workers: int = 1, device: str | None = None, snapshots: str = "device", save_every: float = 30.0,
    progress: bool = True, observer: Observer | None = None, **settings: Any,
) -> run.Run: ...  # fmt: skip
@overload
def prune(name: str | Method, *, model: nn.Module, **settings: Any) -> "PrunedModel": ...
@overload
def prune(name: str | Method, *, trainer: Any, **settings: Any) -> "PrunedModel": ...
def prune(
    name: str | Method,
    *,
    model: "str | nn.Module | None" = None,
    dataset: str | None = None,
    sparsity: float | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    seed: int | None = None,
    method: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | TrainingConfig | None = None,
    out: str | Path | None = None,
    cache_dir: str | Path | None = None,
    cache_size: float = 32.0,
    workers: int = 1,
    device: str | None = None,
    snapshots: str = "device",
    save_every: float = 30.0,
    progress: bool = True,
    observer: Observer | None = None,
    trainer: Any = None,
    **settings: Any,
) -> "run.Run | PrunedModel":
    """Prune a model on a task: both given by name, as in `sparsesoup prune NAME`, or as objects.

    Args:
        name: name of the method, as in `sparsesoup methods`; or a method object, such as `InstantSoup(stages=3)`.
        model: Hub id, folder, or minilm; default minilm. Or a module, with train_dataset, eval_dataset, loss,
            data_collator, compute_metrics, prunable, ...: see `prune_model`.
        dataset: Hub id, folder, file, or docstrings; default docstrings. With train_dataset=..., the rows' name.
        sparsity: share of the prunable weights to remove, in [0, 1); default 0.9.
        steps, epochs: T, the steps of one fine-tuning; or passes over the training rows, default 3.
        seed: seed of all random choices; default 0.
        method: settings of a named method that differ from their defaults.
        train: training settings: a TrainingConfig, or a table of those that differ from its defaults.
        out: folder of run directories; default runs. With objects, default none: `save` writes the result.
        cache_dir: folder of trainings that runs share, each counted in full; `cache_size`: maximum GiB in it.
        workers: number of processes that train the weak masks of a run.
        device: cpu, cuda, cuda:1 or mps, for this call; default the first accelerator, else cpu.
        snapshots: keep forks and rewinding points on the device, in host memory (host) or on disk (disk).
        save_every: minimum seconds between saves, from which a killed run resumes.
        progress: show progress on stderr.
        observer: sees every step of this process and every validation; see `Observer`.
        trainer: a Trainer, instead of model and dataset; see `prune_trainer`.
        settings: max_length, text_columns, ... as on the command line.
    Returns: the run, with `path` and `report`; with objects a PrunedModel: `model`, `masks`, `metrics`, `cost`, `save`.
    Raises: UserError for bad input.
    """
    given = {"dataset": dataset, "sparsity": sparsity, "steps": steps, "epochs": epochs, "seed": seed, **settings}
    given = {key: value for key, value in given.items() if value is not None}
    outside: dict[str, Any] = {"observer": observer, "snapshots": snapshots, "save_every": save_every}
    with device_chosen(device):
        if trainer is not None or isinstance(model, nn.Module) or "train_dataset" in settings:
            _refuse_changed(prune, {"cache_dir": cache_dir, "cache_size": cache_size, "workers": workers}, ALONE)
            objects = {**given, "train": train, "out": out, **outside, "progress": progress}
            return _prune_objects(name, model, trainer, method, objects)
        config = _make_config(name, given if model is None else {**given, "model": model}, method, train)
        console, cache = SafeConsole(stderr=True, quiet=not progress), Path(cache_dir) if cache_dir else None
        options = run.RuntimeOptions(console, cache=cache, cache_size=cache_size, workers=workers, **outside)
        return run.run_method(config, Path("runs" if out is None else out), options)


def _make_config(
    name: str | Method,
    table: dict[str, Any],
    method: Mapping[str, Any] | None,
    train: Mapping[str, Any] | TrainingConfig | None,
) -> RunConfig:
    if not isinstance(name, str) and method:
        raise UserError("method has settings for a name, got a method as well; put the settings into the method")
    from sparsesoup.loops.attach import named_method

    _check_tables(method, train)
    row = name if isinstance(name, str) else row_of(named_method(name))
    plain = {} if train is None or isinstance(train, TrainingConfig) else dict(train)
    config = config_from_dict(row, {**table, "method": dict(method or {}), "train": plain})
    if not isinstance(name, str):
        config = replace(config, method=name)
    return replace(config, train=train) if isinstance(train, TrainingConfig) else config


def _check_tables(method: Any, train: Any) -> None:
    """Raise a UserError unless settings of a method and a training are tables, or a TrainingConfig."""
    require(method is None or isinstance(method, Mapping), "method", "a table of settings", repr(method))
    known = train is None or isinstance(train, Mapping | TrainingConfig)
    require(known, "train", "a TrainingConfig, or a table of its settings", repr(train))


def _refuse_changed(function: Callable[..., Any], given: Mapping[str, Any], why: str) -> None:
    """Raise a UserError for an argument of a function that is not its default."""
    defaults = inspect.signature(function).parameters
    for name in (name for name, value in given.items() if value != defaults[name].default):
        raise UserError(why, name)


def _prune_objects(
    name: str | Method, model: Any, trainer: Any, method: Mapping[str, Any] | None, given: dict[str, Any]
) -> "PrunedModel":
    from sparsesoup.loops.attach import named_method
    from sparsesoup.loops.objects import prune_model, prune_trainer

    given = {key: value for key, value in given.items() if value is not None}
    _check_tables(method, given.get("train"))
    chosen = fill_settings(named_method(name), method or {}, "method")
    given["row"] = name if isinstance(name, str) else None
    columns = {f.name for f in dataclasses.fields(ModelAndDataConfig)} - {"model", "dataset", "seed"}
    given["columns"] = {key: given.pop(key) for key in columns & given.keys()} or None
    if "args" in given:
        raise UserError(
            "give train=TrainingConfig(...), or trainer=Trainer(model, args, ...), which brings them", "args"
        )
    known = inspect.signature(prune_model).parameters
    if unknown := [key for key in given if key not in known]:
        own = [f"train.{f.name}" for f in dataclasses.fields(TrainingConfig)]
        raise unknown_setting(unknown[0], [*(key for key in known if key not in ("method", "columns")), *own])
    if isinstance(train := given.get("train"), Mapping):
        given["train"] = fill_settings(TrainingConfig(), train, "train")
    if trainer is None:
        return prune_model(chosen, model, **given)
    if model is not None:
        raise UserError("give either trainer=... or model=...; a Trainer brings its model")
    return prune_trainer(chosen, trainer, **given)


def evaluate_on_test(path: str | Path, *, device: str | None = None) -> dict[str, Any]:
    """Return the scores of a finished run on the test split, computed once, as `sparsesoup test RUN` does."""
    with device_chosen(device):
        scores: dict[str, Any] = run.evaluate_finished_run(Path(path), SafeConsole(quiet=True)).report["test"]
    return scores


def compare(
    recipe: "str | Path | Mapping[str, Any] | Sequence[str | Path | run.Run | PrunedModel]",
    *,
    out: str | Path = "runs",
    name: str | None = None,
    workers: int = 1,
    retry_failed: bool = False,
    device: str | None = None,
    cache_size: float = 32.0,
    snapshots: str = "device",
    progress: bool = True,
) -> StudyResult:
    """Run a study: methods, models, datasets, sparsities and seeds, as `sparsesoup compare --config FILE` does.

    Args:
        recipe: a YAML file, the name of a shipped recipe, or a table with the same keys. Or a list of
            existing runs, as directories or as `prune` returned them, for a table: `sparsesoup compare RUN RUN`.
        out: folder of all runs; the results of the study are in its studies/NAME.
        name: name of the study; default: the file's name, `study` for a table, `runs` for existing runs.
        workers: number of processes that train runs in parallel.
        retry_failed: repeat runs that failed before.
        device: cpu, cuda, cuda:1 or mps, for this call; default the first accelerator, else cpu.
        cache_size: maximum GiB of trainings that runs share.
        snapshots: keep forks and rewinding points on the device, in host memory (host) or on disk (disk).
        progress: show progress on stderr.
    Returns: the study: `path` of its folder, with tables and page, its `facts`, and its `table` of scores.
    Raises: UserError for bad input.
    """
    if isinstance(recipe, Sequence) and not isinstance(recipe, str):
        given = {"workers": workers, "retry_failed": retry_failed, "device": device}
        own = {**given, "cache_size": cache_size, "snapshots": snapshots}
        _refuse_changed(compare, own, "it is for a recipe; with runs that exist, leave it out")
        return compare_results(recipe, name, Path(out))
    known = isinstance(recipe, str | Mapping) or (isinstance(recipe, Path) and not recipe.is_dir())
    require(known, "recipe", "a recipe (file, name or table), or a list of runs", repr(recipe))
    console = SafeConsole(stderr=True, quiet=not progress)
    run.RuntimeOptions(console, snapshots=snapshots)  # checks it before anything is read
    check_cache_size(cache_size)
    options = TrialOptions(cache_size=cache_size, snapshots=snapshots)
    with device_chosen(device):
        return compare_recipe(recipe, Path(out), name, console, workers, retry_failed, options)


def export(
    path: str | Path, to: str, out: str | Path, *, verify: bool = False, **settings: Any
) -> exports.WrittenExport:
    """Write a pruned model in another format, as `sparsesoup export RUN --to FORMAT --out DIR` does.

    Args:
        path: run directory, model folder with `pruning/`, or another export.
        to: dense, packed, compact, low-rank, onnx, openvino or semi-structured.
        out: folder to write; an earlier export there is replaced, anything else is refused.
        verify: load it in a fresh process, run it on the whole test split and compare its outputs with the source's.
        settings: settings of the format, such as dtype="bf16" of packed.
    Returns: the export: `path` of its folder and `facts`, the content of its export.json.
    Raises: UserError for bad input; then nothing is written.
    """
    return (verified_export if verify else exports.write_export)(Path(path), to, Path(out), settings)


def apply(ticket: str | Path, model: str, out: str | Path, *, other_weights: bool = False) -> tuple[int, int]:
    """Write a sparse copy of a base model, using only a ticket's masks, as `sparsesoup apply RUN` does.

    Args:
        ticket: run directory, model folder or pruning folder.
        model: the ticket's base model: Hub id, folder, or minilm.
        out: folder to write, which must not exist.
        other_weights: allow a model whose weights are not those of the ticket's base model.
    Returns: (weights kept, prunable weights).
    Raises: UserError if the ticket is damaged, does not fit, or the weights differ.
    """
    return tickets.apply_ticket(Path(ticket), model, Path(out), other_weights)


def push(
    path: str | Path, repo: str, *, out: str | Path | None = None, private: bool = False, license: str = "unknown",
    token_from_env: str = "",
) -> str:  # fmt: skip
    """Upload a model and its card to the Hub, as `sparsesoup push RUN REPO` does, or with `out` its `--dry-run`.

    Args:
        path: a finished run's directory, or an export.
        repo: owner/name.
        out: folder to write instead of uploading; it must not exist.
        private: make a new repository private.
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
    """Measure size, FLOPs and speed relative to the dense model, as `sparsesoup benchmark RUN_OR_EXPORT ...` does.

    Args:
        paths: run directories, model folders with `pruning/`, exports.
        note: called with what is measured next.
        how: batch, length, threads, rounds, backends, as on the command line.
    Returns: the content of benchmark.json for each path.
    Raises: UserError for bad input.
    """
    folders = [Path(path) for path in paths]
    tables = benchmarks.run_benchmark(folders, fill_settings(benchmarks.BenchmarkConfig(), how), note)
    benchmarks.write_tables(folders, tables)
    return tables
