"""One run of a study: where it stands in the table, and what it is called."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from sparsesoup.runs.config import RunConfig


@dataclass(frozen=True)
class Trial:
    """One run of a study.

    Args:
        row: its name in the table; the method's own, unless the recipe gives another.
        sparsity: what the row is pruned to; None for methods that keep every weight.
        settings: of the run.
        path: of the run, below the folder of all runs.
        needs: path of the run whose ticket this one trains; None where it begins by itself.
    """

    row: str
    sparsity: float | None
    settings: RunConfig
    path: Path
    needs: Path | None = None

    @property
    def column_of(self) -> tuple[str, str, float | None]:
        """(model, dataset, sparsity): the column of the table."""
        return self.settings.place.model, self.settings.place.dataset, self.sparsity

    @property
    def seed(self) -> int:
        """Of everything random."""
        return self.settings.place.seed

    @property
    def describe_trial(self) -> str:
        """The cell in words."""
        model, dataset, sparsity = self.column_of
        how = "" if sparsity is None else f", sparsity {sparsity:g}"
        return f"{self.row} on {dataset}{how}, seed {self.settings.place.seed} ({model})"

    @property
    def portable_settings(self) -> RunConfig:
        """The settings, with a ticket told from the folder of all runs: that may be named otherwise, or moved."""
        return self.settings if self.needs is None else with_ticket(self.settings, self.needs)

    @property
    def trial_key(self) -> str:
        """Twelve hex digits of row, column and settings: a cell of another study with the same key is the same."""
        settings = {k: v for k, v in self.portable_settings.to_dict().items() if k != "data_root"}
        text = json.dumps([self.row, self.sparsity, settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def with_ticket(settings: RunConfig, ticket: Path) -> RunConfig:
    """The settings of a cell that begins with a ticket of another one, with that ticket."""
    # Such a cell is always of the method `ticket`, a dataclass; the protocol Method does not say so.
    return replace(settings, method=replace(settings.method, ticket=str(ticket)))  # type: ignore[type-var]
