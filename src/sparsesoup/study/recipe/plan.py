"""A study's recipe (YAML) and its trials (model, dataset, row, sparsity, seed), all checked before anything runs."""

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.core.settings import flag_of, plain_values
from sparsesoup.hub.build import EPOCHS
from sparsesoup.methods import METHODS, TABLE
from sparsesoup.runs.config import RunConfig, config_from_dict
from sparsesoup.runs.run import fill_default_sparsity
from sparsesoup.study.recipe.budget import check_budget, read_budget
from sparsesoup.study.recipe.resolve import check_schedules_fit, resolve_all
from sparsesoup.study.recipe.trial import Trial, with_ticket
from sparsesoup.study.recipe.yaml_lines import (
    Levels,
    RecipeError,
    Table,
    add_location,
    apply_changes_,
    as_list,
    builtin_recipe,
    check_keys,
    displaced_settings,
    locate_keys,
    read_written,
)

LISTS = {"models": ["minilm"], "datasets": ["docstrings"], "sparsities": [0.9], "seeds": [0, 1, 2]}
READ = ("dataset_config", "text_columns", "image_column", "label_column", "drop_unlabelled", "max_length", "doc_stride",
        "prompts", "class_names")  # how a dataset is read  # fmt: skip
OWN = ("name", "method", "train", "times", "steps", "epochs", "seeds", "sparsities", "from")  # settings of a row
PLACED = ("train", "steps", "epochs", "seeds", "sparsities", *READ)  # of a dataset
OF_RUNS = ("train", "steps", "epochs", *READ, "data_root", "trust_remote_code")  # as `prune` has them
KEYS = (*LISTS, "methods", "budget", *OF_RUNS)
NO_DISTILL: tuple[Any, ...] = (None, {}, {"teacher": ""}, {"teacher": None})  # distillation disabled
MOST_SEED = 2**63  # limit of an integer column


@dataclass(frozen=True)
class StudyPlan:
    """A study."""

    name: str  # name of its folder
    recipe: Table  # the recipe, with changes from flags
    trials: list[Trial]  # trials in order of execution
    command: str  # command that repeats it
    location: Callable[[Sequence[str]], str]  # describes the location of a path of keys in the recipe


def read_plan(
    path: Path | Table, changes: Mapping[str, Any] | None = None, name: str | None = None, out: Path = Path("runs"),
    fit: bool = False,
) -> StudyPlan:  # fmt: skip
    """Read the study of a recipe; every error in it is reported with its file and line.

    Args:
        path: path of the recipe; or the name of a shipped one: table2, table3, transfer; or a table with its keys.
        changes: recipe keys to override. They take precedence over a dataset's own settings, but not over a row's;
            datasets with other names keep the recipe's own settings.
        out: folder of all runs, for rows that start from the tickets of others.
        fit: also refuse rows whose methods do not fit their T; with a budget, T is checked when it is set.
    """
    if isinstance(path, dict):
        given = file = out / "studies" / (name or "study") / "study.yaml"  # which the study writes
        recipe, lines = plain_values(path), None
    else:
        given, file = path, builtin_recipe(path)
        recipe, lines = read_written(file)
    changed = {key: value for key, value in (changes or {}).items() if value is not None}

    def location(where: Sequence[str]) -> str:
        key, *deeper = where
        given = key in changed and len(deeper) < 2  # deeper paths are a dataset's own settings, which have no flags
        if lines is None:
            return ".".join(where)
        return flag_of(key) if given else f"{file}, line {lines(where)}"

    with add_location(location):
        apply_changes_(recipe, changed)
        trials = list(_trials_of(recipe))
        check_budget(recipe, _dataset_tables(recipe))
        trials = resolve_all(recipe, trials)
        trials += resolve_all(recipe, list(_transfer_trials(recipe, trials, out)))
        if fit and read_budget(recipe.get("budget")) is None:
            check_schedules_fit(trials)
        _need_once(trials)
    words = [str(word) for key, value in changed.items() for word in (flag_of(key), *as_list(value))]
    command = shlex.join(["sparsesoup", "compare", "--config", str(given), *words])
    return StudyPlan(name or file.stem, recipe, trials, command, location)


def _trials_of(recipe: Table) -> Iterator[Trial]:
    """Yield the trials row by row, with all seeds of a row, so that rows are completed one after the other."""
    check_keys(recipe, KEYS)
    rows = recipe.get("methods")
    if not rows or not isinstance(rows, (dict, list)):
        raise RecipeError("a study needs methods: a list of names, or a table of rows with settings", "methods")
    rows = rows if isinstance(rows, dict) else {str(row): None for row in _list_at(recipe, "methods")}
    for row, own in rows.items():
        if own is not None and not isinstance(own, dict):
            message = f"row {row} has its own settings (name, method, train, ...), got {own!r}"
            raise RecipeError(message, "methods", row)
    for (dataset, placed), model, (row, own) in product(
        _dataset_tables(recipe).items(), _list_at(recipe, "models"), rows.items()
    ):
        if "from" not in (own or {}):
            yield from _trials_of_row(recipe, str(model), dataset, placed, str(row), dict(own or {}))


def _transfer_trials(recipe: Table, trained: list[Trial], out: Path) -> Iterator[Trial]:
    """Yield trials that train existing tickets: `from: ROW` of that row on every dataset, or on one dataset only."""
    rows, datasets = recipe["methods"], _dataset_tables(recipe)
    found = {(trial.row, trial.column_of, trial.seed): trial for trial in trained}
    for row, own in rows.items() if isinstance(rows, dict) else ():
        if "from" not in (own or {}):
            continue
        source, origin = _ticket_origin(row, own, datasets)
        plain = {key: value for key, value in own.items() if key != "from"} | {"name": "ticket"}
        for start, (dataset, placed), model in product(
            [origin] if origin else datasets, datasets.items(), _list_at(recipe, "models")
        ):
            label = row if origin else f"{row} {start}"
            for trial in _trials_of_row(recipe, str(model), dataset, placed, label, plain):
                first = found.get((source, (trial.column_of[0], start, trial.sparsity), trial.seed))
                if first is None or TABLE[first.settings.name].grouped:
                    why = "which this study does not make" if first is None else "whose masks are in groups"
                    ticket = f"{source} on {start} at sparsity {trial.sparsity:g}, seed {trial.seed}"
                    message = f"row {row} begins with the ticket of {ticket}, {why}; name another row"
                    raise RecipeError(message, "methods", row, "from")
                yield replace(trial, settings=with_ticket(trial.settings, out / first.path), needs=first.path)


def _ticket_origin(row: str, own: Table, datasets: Mapping[str, Table]) -> tuple[str, str]:
    """Return (the row whose tickets a row starts from, the one dataset of these tickets; '' for every dataset)."""
    if strange := [key for key in ("name", "method") if key in own]:
        message = f"row {row} begins with tickets, so its method is ticket; leave out {strange[0]}"
        raise RecipeError(message, "methods", row, strange[0])
    given = own["from"] if isinstance(own["from"], dict) else {"row": own["from"]}
    check_keys(given, ("row", "dataset"), "methods", row, "from")
    if given.get("row") is None or isinstance(given["row"], (dict, list)):
        message = f"row {row}: from is the name of a row, or {{row: NAME, dataset: NAME}}, got {own['from']!r}"
        raise RecipeError(message, "methods", row, "from")
    origin = "" if given.get("dataset") is None else str(given["dataset"])
    if origin and origin not in datasets:
        message = f"row {row} begins with tickets of {origin}; allowed: {', '.join(datasets)}"
        raise RecipeError(message, "methods", row, "from", "dataset")
    return str(given["row"]), origin


def _dataset_tables(recipe: Table) -> dict[str, Table]:
    found = recipe.get("datasets", LISTS["datasets"])
    if not found or not isinstance(found, dict):
        return {str(name): {} for name in _list_at({"datasets": [] if found == {} else found}, "datasets")}
    for name, placed in found.items():
        if placed is not None and not isinstance(placed, dict):
            message = f"dataset {name} has its own settings (sparsities, steps, ...), got {placed!r}"
            raise RecipeError(message, "datasets", name)
        check_keys(placed or {}, PLACED, "datasets", name)
    return {str(name): dict(placed or {}) for name, placed in found.items()}


def _trials_of_row(recipe: Table, model: str, dataset: str, placed: Table, row: str, own: Table) -> Iterator[Trial]:
    check_keys(own, OWN, "methods", row)
    name = str(row if own.get("name") is None else own["name"])
    dense = name in METHODS and TABLE[name].dense
    levels: Levels = [((), recipe), (("datasets", dataset), placed), (("methods", row), own)]
    merged = _override_table(_override_table(recipe, placed), {k: v for k, v in own.items() if k in PLACED})
    table = {key: merged[key] for key in OF_RUNS if key in merged}
    table |= {"model": model, "dataset": dataset, "method": own.get("method"), "train": _training_settings(levels)}
    if own.get("times") is not None:
        _scale_steps_(table, row, own["times"])
    if dense:  # the recipe's sparsities are for other rows, but the row's own must be possible
        for sparsity in as_list(own.get("sparsities")):
            _settings_of(row, name, table | {"sparsity": sparsity}, levels)
    for sparsity in [None] if dense else _list_at(merged, "sparsities", levels):
        settings = _settings_of(row, name, table | {"sparsity": sparsity}, levels)
        for seed in _list_at(merged, "seeds", levels):
            if not isinstance(seed, int) or isinstance(seed, bool) or not -MOST_SEED <= seed < MOST_SEED:
                message = f"a seed is a whole number of at most 64 bits, got {seed!r}"
                raise RecipeError(message, *locate_keys(levels, ["seeds"]))
            own_settings = replace(settings, model_data=replace(settings.model_data, seed=seed))
            yield Trial(row, None if dense else settings.budget.sparsity, own_settings, Path())


def _override_table(table: Table, own: Table) -> Table:
    """Return a table overridden by another, without the settings that it excludes; conflicts within one are kept."""
    return {key: value for key, value in table.items() if key not in displaced_settings(own)} | own


def _training_settings(levels: Levels) -> Table:
    """Return the training settings: a row's override a dataset's, and these the recipe's."""
    train: Table = {}
    for where, level in levels:
        own = {} if level.get("train") is None else level["train"]
        if not isinstance(own, dict):
            message = f"train has its own settings (learning_rate, batch_size, ...), got {own!r}"
            raise RecipeError(message, *where, "train")
        train = _deep_merge(train, own)
    return train


def _deep_merge(table: Table, own: Table) -> Table:
    """Override nested settings by others; disabled distillation removes all of its settings.

    >>> _deep_merge({"clip": 1, "distill": {"teacher": "dense", "hidden": 1}}, {"distill": {"hidden": 2}})
    {'clip': 1, 'distill': {'teacher': 'dense', 'hidden': 2}}
    >>> _deep_merge({"clip": 1, "distill": {"teacher": "dense", "hidden": 1}}, {"distill": None})
    {'clip': 1}
    """
    found = {**table, **own}
    for key in own.keys() & table.keys():
        if isinstance(table[key], dict) and own[key] in NO_DISTILL:
            del found[key]
        elif isinstance(table[key], dict) and isinstance(own[key], dict):
            found[key] = _deep_merge(table[key], own[key])
    return found


def _scale_steps_(table: Table, row: str, times: Any) -> None:
    """Multiply the T of a row."""
    length = "steps" if table.get("steps") is not None else "epochs"
    given = EPOCHS if table.get(length) is None else table[length]
    for number in (times, given):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            message = f"row {row} lasts {times!r} times {length} {given!r}, which are to be numbers"
            raise RecipeError(message, "methods", row, "times")
    table[length] = round(times * given) if length == "steps" else times * given


def _settings_of(row: str, name: str, table: Table, levels: Levels) -> RunConfig:
    try:
        given = {key: value for key, value in table.items() if value is not None}
        return fill_default_sparsity(config_from_dict(name, given))
    except UserError as error:
        named = ["sparsities"] if error.field == "sparsity" else error.field.split(".") if error.field else []
        raise RecipeError(error, *(locate_keys(levels, named) or ["methods", row, *named])) from error


def _list_at(table: Table, key: str, levels: Levels = ()) -> list[Any]:
    found = table.get(key, LISTS.get(key))
    listed = as_list(found)
    empty = None in listed and key != "sparsities"  # an empty sparsity is the default of the method or ticket
    if not listed or empty or len(set(map(str, listed))) < len(listed):
        hint = f"; name some, or leave {key} out" if empty and key in LISTS else ""
        message = f"{key} needs one or several different values, got {found}{hint}"
        raise RecipeError(message, *(locate_keys(levels, [key]) or [key]))
    return listed


def _need_once(trials: list[Trial]) -> None:
    """Refuse two trials at one place of the table: 0.5 and "0.50", or a name equal to that of a row with tickets."""
    seen = set()
    for trial in trials:
        if (identity := (trial.row, trial.column_of, trial.seed)) in seen:
            message = f"{trial.describe_trial} is there twice; leave one out, or call its row otherwise"
            raise RecipeError(message, "methods", trial.row)
        seen.add(identity)
