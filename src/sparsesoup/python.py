"""The command line's verbs, from Python."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsesoup import run
from sparsesoup.errors import UserError
from sparsesoup.hub.build import Place
from sparsesoup.problem import Training
from sparsesoup.recipe import Amount, Settings, method_named


def prune(
    name: str,
    *,
    out: str | Path = "runs",
    method: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    progress: bool = True,
    **settings: Any,
) -> run.Run:
    """Draw a ticket; what `sparsesoup prune NAME` does.

    Args:
        name: of the method, as in `sparsesoup methods`.
        out: folder that run directories are put in.
        method: the method's own settings that differ from their defaults.
        train: settings of the training that differ from their defaults.
        progress: whether to show it on stderr.
        settings: model, dataset, sparsity, steps, epochs, seed, max_length, ... as on the command line.
    Returns: the run: `path` of its directory, whose `model` folder transformers loads, and its `report`.
    Raises: UserError for bad input.
    """
    own = {kind: {f.name for f in dataclasses.fields(kind)} for kind in (Amount, Place)}
    unknown = settings.keys() - own[Amount] - own[Place]
    if unknown:
        raise UserError(f"unknown setting {min(unknown)}; allowed: {', '.join(sorted(own[Amount] | own[Place]))}")
    amount, place = ({k: v for k, v in settings.items() if k in own[kind]} for kind in (Amount, Place))
    chosen = Settings(
        name=name,
        method=_changed(method_named(name), method or {}),
        amount=Amount(**amount),
        place=Place(**place),
        train=_changed(Training(), train or {}),
    )
    return run.prune(chosen, Path(out), Console(stderr=True, quiet=not progress))


def score_on_test(path: str | Path) -> dict[str, Any]:
    """Scores of a finished run on the test split, taken once; what `sparsesoup test RUN` does."""
    return run.test(Path(path), Console(quiet=True)).report["test"]


def _changed(value: Any, changes: dict[str, Any]) -> Any:
    known = [f.name for f in dataclasses.fields(value)]
    for name in changes:
        if name not in known:
            raise UserError(f"unknown setting {name}; {type(value).__name__} has {', '.join(known)}")
    return dataclasses.replace(value, **changes)
