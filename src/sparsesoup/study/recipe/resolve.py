"""What a recipe names, found before anything runs: models, datasets, teachers and tickets."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.hub.build import Opened, Place, check_head, check_length, open_task
from sparsesoup.hub.models.checkpoint import config_of, load_reader
from sparsesoup.hub.models.loading import load_model
from sparsesoup.hub.models.prunable import prunable
from sparsesoup.hub.tasks.registry import kind_of
from sparsesoup.methods.from_ticket import FromTicket, need_sparse
from sparsesoup.runs.run import directory
from sparsesoup.runs.teacher import DENSE, check_blocks, find_teacher
from sparsesoup.study.recipe.trial import Cell
from sparsesoup.study.recipe.yaml_lines import Levels, Table, Wrong, blaming, place_of

READING = ("label_column", "text_columns", "image_column", "prompts", "class_names", "dataset_config", "data_root")


def find_all(recipe: Table, cells: Sequence[Cell]) -> list[Cell]:
    """The cells, each with the path of its run.

    Raises: Wrong if a model, dataset, teacher or ticket is not there, or does not fit the others.
    """
    tasks: dict[Place, Opened] = {}
    taken: dict[Path, Cell] = {}
    placed = []
    for cell in cells:
        place = cell.settings.place
        if (where := _where(cell)) not in tasks:
            tasks[where] = _found(recipe, cell)
        name = tasks[where].source.name
        placed.append(replace(cell, path=directory(name, cell.anywhere)))
        other = taken.setdefault(placed[-1].path, cell)
        if other.settings != cell.settings:
            raise Wrong(f"datasets {other.place[1]} and {place.dataset} are both called {name}, so their runs "
                         f"would be in the same folder; rename one of them", "datasets", place.dataset)  # fmt: skip
    _need_teachers(recipe, cells, tasks)
    _need_tickets(cells, tasks)
    return placed


def _where(cell: Cell) -> Place:
    return replace(cell.settings.place, seed=0)


def _found(recipe: Table, cell: Cell) -> Opened:
    """The dataset and its task, once it and the model are found and fit each other."""
    place = cell.settings.place
    with blaming("models"):
        config_of(place.model, place.trust_remote_code)
    levels = _levels(recipe, cell)
    try:
        opened = open_task(place)
        check_head(place, opened)
    except UserError as error:
        raise Wrong(error, *(_named(levels, str(error)) or ["datasets", place.dataset])) from error
    with blaming("models"):
        reader = load_reader(place.model, kind_of(opened.task).images, place.trust_remote_code)
    try:
        check_length(place, opened, reader)
    except UserError as error:
        named = str(error).split()[0]  # max_length or doc_stride
        raise Wrong(error, *(place_of(levels, [named]) or ["models"])) from error
    return opened


def _named(levels: Levels, said: str) -> list[str]:
    """Where the setting stands of which an error tells value or name; nothing if it tells of none."""
    places = {key: where for key in READING if (where := place_of(levels, [key]))}
    for key, where in places.items():
        value = next(table[where[-1]] for _, table in reversed(levels) if table and where[-1] in table)
        words = [str(each) for each in (value if isinstance(value, list) else [value]) if each]
        if any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", said) for word in [*words, key]):
            return where
    return []


def _need_teachers(recipe: Table, cells: Sequence[Cell], tasks: Mapping[Place, Opened]) -> None:
    """Refuse a teacher that is not there, or whose model does not fit."""
    for (where, distill), cell in {(_where(c), c.settings.train.distill): c for c in reversed(cells)}.items():
        if distill.teacher not in ("", DENSE):
            named = ["train", "distill", "teacher"]
            with blaming(*(place_of(_levels(recipe, cell), named) or named)):
                teacher = find_teacher(where, tasks[where], distill.teacher)
                if distill.hidden:
                    check_blocks(_model(where, tasks), teacher)


def _need_tickets(cells: Sequence[Cell], tasks: Mapping[Place, Opened]) -> None:
    """Refuse a ticket that is not there, too sparse or of another model; not those that the study itself draws."""
    given = [(c, c.settings.method) for c in cells if not c.needs]
    tickets = [(cell, method) for cell, method in given if isinstance(method, FromTicket)]
    for cell, method in {(c.row, c.sparsity): (c, m) for c, m in tickets}.values():
        with blaming("methods", cell.row, "method", "ticket"):
            need_sparse(method.given()[0], float(cell.sparsity or 0.0))
    for (row, where), method in {(c.row, _where(c)): m for c, m in tickets}.items():
        with blaming("methods", row, "method", "ticket"):
            method.fitted(model := _model(where, tasks), prunable(model))


def _model(where: Place, tasks: Mapping[Place, Opened]) -> Any:
    return load_model(where.model, tasks[where].task, where.seed, where.trust_remote_code)


def _levels(recipe: Table, cell: Cell) -> Levels:
    """Where settings of a cell stand in the recipe; a row that begins with tickets has its source behind its name."""
    rows, datasets = (table if isinstance(table := recipe.get(key), dict) else {} for key in ("methods", "datasets"))
    row, dataset = max((row for row in rows if cell.row.startswith(row)), key=len, default=""), cell.place[1]
    return [((), recipe), (("datasets", dataset), datasets.get(dataset)), (("methods", row), rows.get(row))]
