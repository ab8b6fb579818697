"""Whether a method fits the T of its run, asked before anything runs: of a twin that stops where it would train."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.hub.build import Opened, Place, open_task
from sparsesoup.hub.models.loading import load_model
from sparsesoup.hub.models.prunable import prunable
from sparsesoup.hub.tasks.question_answering import Spans
from sparsesoup.hub.tasks.splits import training_splits
from sparsesoup.runs.config import Settings
from sparsesoup.runs.teacher import refuse
from sparsesoup.study.cost.estimate import parted, stand_in, steps_of
from sparsesoup.study.cost.simulator import Twin, Watch, bare, hollow
from sparsesoup.study.recipe.trial import Cell
from sparsesoup.study.recipe.yaml_lines import Wrong, blaming
from sparsesoup.training.batching import Data
from sparsesoup.training.cost import Meter
from sparsesoup.training.train_cache import Shelf

LONG = 100_000  # steps: no method finds them too few


class Begun(Exception):
    """A method has begun to train, so it has refused nothing."""


class First(Watch):
    """Stops a run where its first training begins."""

    def begin(self, label: str, step: int, until: int) -> None:
        """Go no further."""
        raise Begun


def need_fit(cells: Iterable[Cell]) -> None:
    """Refuse a row whose method would refuse the T of one of its cells, and a dataset that cannot be learnt from.

    Raises: Wrong, with the place in the recipe.
    """
    rows: dict[Place, tuple[int, bool]] = {}
    models: dict[Place, Any] = {}
    for cell in {(c.row, c.place): c for c in cells}.values():  # seeds make no difference
        place = replace(cell.settings.place, model="", seed=0)
        if place not in rows:
            with blaming("datasets", place.dataset):
                rows[place] = _rows(open_task(cell.settings.place))
        try:
            count, counted = rows[place]
            if counted or cell.settings.amount.steps is not None:
                _fit(cell.settings, count)
            if parted(cell.settings.method):
                _fall_apart(cell.settings, models)
        except UserError as error:
            raise Wrong(f"{cell.name}: {error}", "methods", cell.row) from error


def _rows(opened: Opened) -> tuple[int, bool]:
    """(How many rows a run trains on, whether epochs are as long: windows are counted once texts have been cut)."""
    train, _ = training_splits(opened.source, opened.task, 0)
    # Of windows there are no fewer, and no method takes a T for longer epochs that it refuses for shorter ones.
    return len(train), not isinstance(opened.task, Spans)


def _fit(settings: Settings, rows: int) -> None:
    """Let the method begin, on so many rows without anything in them."""
    twin = _twin(settings, rows)
    twin = replace(twin, steps=steps_of(settings, twin))
    try:
        stand_in(settings.method).run(twin, float(settings.amount.sparsity or 0.0))
    except Begun:
        return


def _twin(settings: Settings, rows: int) -> Twin:
    data = hollow(Data(range(rows), lambda rows: {}))
    return bare(data, data, settings.train, 1, settings.place.seed, meter=Meter(), watch=First(), shelf=Shelf())


def _fall_apart(settings: Settings, models: dict[Place, Any]) -> None:
    """Let the method begin on the matrices of the real model, which has other parts than a twin."""
    where = replace(settings.place, seed=0)
    if where not in models:
        models.clear()  # one at a time is in memory
        models[where] = load_model(where.model, open_task(where).task, where.seed, where.trust_remote_code)
    twin = _twin(settings, 1)
    real = replace(twin, pretrained=models[where], targets=prunable(models[where]), steps=LONG)
    refuse(real, settings)
