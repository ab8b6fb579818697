"""Existing runs as records of a study, assigned to rows and columns of the table."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsesoup.core.errors import UserError, require
from sparsesoup.report.terminal import read_report
from sparsesoup.runs.config import without_workers
from sparsesoup.study.execute.jobs import KEPT

COLUMN_SETTINGS = ("model", "dataset", "data_root", "sparsity", "seed")  # settings that define the column or the seed


def run_paths(results: Sequence[Any]) -> list[Path]:
    """Return the directories of runs, given as such or as `prune` returned them.

    Raises: UserError if one is in memory, or is no run.
    """
    if not results:
        raise UserError("the list has no runs; give at least one", "recipe")
    found = []
    for result in results:
        path = result if isinstance(result, str | Path) else getattr(result, "path", result)
        if path is None:
            raise UserError(f"{result!r} is in memory; write it with save(folder) first")
        require(isinstance(path, str | Path), "recipe", "a recipe, or a list of runs", repr(result))
        found.append(Path(path))
    return found


def records_of(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return what a table needs of each run, column by column.

    A row is a method with its settings. It is named after the method if all its runs have the same settings, else after
    the folder of the first run. Of equal runs outside folders seed-<n>, such as those of objects with another loss,
    each has a row that is named after its own folder.
    """
    found = _in_columns(_in_rows([_of_run(run) for run in runs]))
    _need_same_data(found)
    taken: dict[Any, str] = {}
    for record in found:
        if other := taken.get(identity := _column_and_seed(record)):
            same = "the same run" if Path(other).resolve() == Path(record["run"]).resolve() else "runs of the same kind"
            raise UserError(f"{other} and {record['run']} are {same}, {record['row']} on {record['dataset']} with seed "
                            f"{record['seed']}, which a table has once; give one of them")  # fmt: skip
        taken[identity] = record["run"]
    return found


def _need_same_data(found: Sequence[dict[str, Any]]) -> None:
    """Refuse different datasets of the same name, which would share a column. Old runs have no fingerprints."""
    first: dict[Any, dict[str, Any]] = {}
    for record in found:
        if (own := record["dataset_fingerprint"]) is None:
            continue
        other = first.setdefault((record["model"], record["dataset"]), record)
        if other["dataset_fingerprint"] != own:
            raise UserError(
                f"{other['run']} and {record['run']} were trained on different data that are both called "
                f"{record['dataset']}, which is one column of a table; give runs of one of them"
            )


def _of_run(run: Path) -> dict[str, Any]:
    report, folder = read_report(run), run.resolve()
    dense = report["sparsity"]["kept"] == report["sparsity"]["total"]
    head = {"model": report["model"], "dataset": report["dataset"], "seed": report["seed"]}
    head["target"] = None if dense else report["sparsity"]["target"]
    head["row"] = folder.parent.name if folder.name.startswith("seed-") else folder.name
    head["settings"] = _common_settings(report["settings"], report["seed"])
    return {**head, "run": str(run), **{key: report.get(key) for key in KEPT}}


def _common_settings(settings: dict[str, Any], seed: int) -> str:
    """Return the settings that runs of a row share; a ticket or teacher of the run's own seed counts as the same."""
    table = without_workers(settings)
    own = json.dumps({key: value for key, value in table.items() if key not in COLUMN_SETTINGS}, sort_keys=True)
    return re.sub(rf'(?<=[/\\])seed-{seed}(?=[/\\"])', "seed", own)


def _in_rows(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records with the names of their rows."""
    first: dict[Any, str] = {}
    for record in found:
        first.setdefault((record["method"], record["settings"]), record["row"])
    kinds = Counter(method for method, _ in first)
    for record in found:
        method, settings = record["method"], record.pop("settings")
        record["row"] = method if kinds[method] == 1 else first[method, settings]
    equal = Counter(map(_column_and_seed, found))
    for record in found:
        if equal[_column_and_seed(record)] > 1 and not (own := Path(record["run"]).resolve().name).startswith("seed-"):
            record["row"] = own
    return found


def _column_and_seed(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return row, column and seed, of which a table has one run."""
    return tuple(record[key] for key in ("row", "model", "dataset", "target", "seed"))


def _in_columns(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records by column; of sparsities that keep equally many weights, such as a ticket's, the shortest."""
    places = list(dict.fromkeys((record["model"], record["dataset"]) for record in found))
    pruned = [record for record in found if record["target"] is not None]
    shortest: dict[Any, float] = {}
    for record in sorted(pruned, key=lambda record: len(repr(record["target"]))):
        shortest.setdefault(_column_key(record), record["target"])
    for record in pruned:
        record["target"] = shortest[_column_key(record)]
    return sorted(found, key=lambda r: (places.index((r["model"], r["dataset"])), r["target"] or 0.0))


def _column_key(record: dict[str, Any]) -> tuple[str, str, int]:
    """Return model, dataset and the number of weights that a run was to keep."""
    return record["model"], record["dataset"], round((1 - record["target"]) * record["sparsity"]["total"])
