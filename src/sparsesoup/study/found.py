"""What a recipe names, found before anything runs: models, datasets, teachers and tickets."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sparsesoup.hub.build import check_head, check_length, open_task
from sparsesoup.hub.checkpoint import config_of, load_reader
from sparsesoup.hub.kinds import kind_of
from sparsesoup.methods.known import FromTicket, need_sparse
from sparsesoup.run import directory
from sparsesoup.study.cell import Cell
from sparsesoup.study.written import Levels, Table, Wrong, blaming, place_of
from sparsesoup.teacher import DENSE

ASKED = ("model", "dataset", "dataset_config", "text_columns", "label_column", "max_length", "prompts", "class_names")


def find_all(recipe: Table, cells: Sequence[Cell]) -> list[Cell]:
    """The cells, each with the path of its run.

    Raises: Wrong if a model, dataset, teacher or ticket is not there, or does not fit the others.
    """
    names: dict[str, str] = {}
    taken: dict[Path, Cell] = {}
    placed = []
    for cell in cells:
        place = cell.settings.place
        known = json.dumps([getattr(place, key) for key in ASKED])
        if known not in names:
            names[known] = _found(recipe, cell)
        placed.append(replace(cell, path=directory(names[known], cell.anywhere)))
        other = taken.setdefault(placed[-1].path, cell)
        if other.settings != cell.settings:
            raise Wrong(f"datasets {other.place[1]} and {place.dataset} are both called {names[known]}, so their runs "
                         f"would be in the same folder; rename one of them", "datasets", place.dataset)  # fmt: skip
    _need_teachers(recipe, cells)
    _need_tickets(cells)
    return placed


def _found(recipe: Table, cell: Cell) -> str:
    """What the dataset is called, once it and the model are found and fit each other."""
    place = cell.settings.place
    with blaming("models"):
        config_of(place.model, place.trust_remote_code)
    with blaming("datasets", place.dataset):
        opened = open_task(place)
        check_head(place, opened)
    with blaming("models"):
        reader = load_reader(place.model, kind_of(opened.task).images, place.trust_remote_code)
    with blaming(*(place_of(_levels(recipe, cell), ["max_length"]) or ["models"])):
        check_length(place, opened, reader)
    return opened.source.name


def _need_teachers(recipe: Table, cells: Sequence[Cell]) -> None:
    for teacher, cell in {cell.settings.train.distill.teacher: cell for cell in reversed(cells)}.items():
        if teacher not in ("", DENSE):
            named = ["train", "distill", "teacher"]
            with blaming(*(place_of(_levels(recipe, cell), named) or named)):
                config_of(teacher, cell.settings.place.trust_remote_code)


def _need_tickets(cells: Sequence[Cell]) -> None:
    """Refuse a ticket that is not there or too sparse; not those that the study itself draws."""
    rows = {(cell.row, cell.sparsity): cell for cell in cells if not cell.needs}
    for (row, sparsity), cell in rows.items():
        if isinstance(method := cell.settings.method, FromTicket):
            with blaming("methods", row, "method", "ticket"):
                need_sparse(method.given()[0], float(sparsity or 0.0))


def _levels(recipe: Table, cell: Cell) -> Levels:
    """Where settings of a cell stand in the recipe; a row that begins with tickets has its source behind its name."""
    rows, datasets = (table if isinstance(table := recipe.get(key), dict) else {} for key in ("methods", "datasets"))
    row, dataset = max((row for row in rows if cell.row.startswith(row)), key=len, default=""), cell.place[1]
    return [((), recipe), (("datasets", dataset), datasets.get(dataset)), (("methods", row), rows.get(row))]
