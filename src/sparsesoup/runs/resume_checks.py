"""Check that an existing run directory matches the requested config, model weights and dataset."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import read_table, write_table
from sparsesoup.core.manifest import check_run
from sparsesoup.core.targets import weights_fingerprint
from sparsesoup.core.ticket import load_masks
from sparsesoup.hub.build import OpenedTask
from sparsesoup.hub.models.loading import load_pruned
from sparsesoup.hub.tasks.splits import LoadedDataset
from sparsesoup.hub.tasks.zero_shot import HEAD
from sparsesoup.methods import METHODS
from sparsesoup.runs.config import UNRELATED, RunConfig, without_workers
from sparsesoup.runs.results import library_versions, machine_name
from sparsesoup.runs.yaml_text import BadYaml, read_text, read_yaml
from sparsesoup.training.problem import Problem


def check_run_or_model(run: Path, report: Mapping[str, Any]) -> None:
    """Verify the files of a finished run; without digests (an older version), check that its model loads.

    Raises: UserError naming the file that is missing or has changed.
    """
    if not check_run(run, report):
        load_pruned(run / "model", load_masks(run)[0])


def check_same(path: Path, settings: RunConfig) -> None:
    """Check that an existing directory holds a run with these settings.

    Raises: UserError if it holds another run, or something else.
    """
    if not path.exists():
        return
    if not (path / "run.yaml").is_file():
        if any(not entry.name.startswith(".") for entry in path.iterdir()):  # locks and partial files of a killed run
            raise UserError(f"{path} holds something that is no run (no run.yaml); give another --out or remove it")
        return
    try:
        there = read_yaml(read_text(path / "run.yaml"))
    except (OSError, BadYaml) as error:
        raise UserError(f"{path / 'run.yaml'} is damaged; give another --out or remove {path}") from error
    if keys := _changed_settings(there, settings):
        raise UserError(f"{path} holds a different run ({', '.join(keys)} differ); give another --out or remove it")


def check_recipe(run: Path, report: Mapping[str, Any], settings: RunConfig) -> None:
    """Check that a run is tested with the settings of its training; only root of the data and trackers may differ.

    Raises: UserError if `settings`, read from its run.yaml, differ from its report.
    """
    if keys := _changed_settings(report["settings"], settings):
        raise UserError(
            f"damaged: {run / 'run.yaml'} is not the recipe that {run} was made with ({', '.join(keys)} differ from "
            f"its report.json); put it back"
        )


def _changed_settings(there: Any, settings: RunConfig) -> list[str]:
    """Return the names of the settings that differ from a recipe; all if the recipe is not a table."""
    ours = without_workers(settings.to_dict())
    if not isinstance(there, dict):
        return [*ours]
    # Settings missing from the recipe were added later and had their default.
    plain = RunConfig(name=settings.name, method=METHODS[settings.name]).to_dict()
    there = without_workers(_fill_defaults(there, plain))
    return [k for k in {**ours, **there} if k not in UNRELATED and (k not in ours or there.get(k) != ours[k])]


def _fill_defaults(table: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """Add missing settings to a table, at every depth."""
    inner = {
        k: _fill_defaults(table[k], v)
        for k, v in plain.items()
        if isinstance(v, dict) and isinstance(table.get(k), dict)
    }
    return {**plain, **table, **inner}


def check_data(run: Path, facts: Mapping[str, Any], dataset: str, source: LoadedDataset) -> None:
    """Check that the dataset still has the rows that a finished run was trained on.

    Args:
        run: directory of the run.
        facts: its report; one without fingerprints (an older version) is trusted.
        dataset: the user's name of the dataset.
        source: the dataset as it is now.
    Raises: UserError if the rows differ.
    """
    if facts.get("dataset_fingerprint") not in (None, source.train_fingerprint):
        raise UserError(
            f"dataset {dataset} is not the one that {run} was trained on: its training rows differ, so its test rows "
            f"may too; put the old data back, or prune again with another --out"
        )


def check_model_files(run: Path, facts: Mapping[str, Any], model: str, opened: OpenedTask) -> None:
    """Check that the base model still has the files that a finished run was pruned from.

    Args:
        run: directory of the run.
        facts: its report; one without a digest of these files (an older version, a Hub id) is trusted.
        model: the user's name of the model.
        opened: the task, with the digest of the files as they are now.
    Raises: UserError if they differ.
    """
    if facts.get("model_files") and opened.model_files and facts["model_files"] != opened.model_files:
        raise UserError(
            f"model {model} is not the one that {run} was pruned from: its weights, config or tokenizer differ; put "
            f"the old files back, or prune again with another --out"
        )


def base_fingerprints(problem: Problem, opened: OpenedTask) -> dict[str, Any]:
    """Return the fingerprints of weights and rows at the start of a run, and T."""
    base = {
        "model": problem.base_fingerprint(),
        "copy of the model": opened.model_files,
        "dataset": opened.source.train_fingerprint,
        "steps": problem.steps,
    }
    frozen = {name: t for name, t in problem.pretrained.named_buffers() if name == HEAD}
    return base | ({"head": weights_fingerprint(frozen)} if frozen else {})


def training_environment(settings: RunConfig, problem: Problem) -> dict[str, Any]:
    """Return what else determines a training bit by bit: data reading, libraries, machine."""
    model_data = {k: v for k, v in dataclasses.asdict(settings.model_data).items() if k != "data_root"}
    return {"place": model_data, "versions": library_versions(), "machine": machine_name(problem.accelerator.device)}


def check_base(path: Path, base: dict[str, Any]) -> None:
    """Check that a stopped run resumes from the same weights and rows as those recorded in `path`.

    Raises: UserError if they differ.
    """
    if not path.exists():
        write_table(path, base)
        return
    there = read_table(path, "record of what the run began from", f"remove {path.parent} to start over")
    changed = [k for k in base if there.get(k) != base[k]]
    if "model" in changed:  # other weights are in other files
        changed = [k for k in changed if k != "copy of the model"]
    if changed:
        raise UserError(f"{path.parent.parent} was begun with another {' and '.join(changed)}; give another --out")
