"""One run of a study, with its place in the table and its name."""

import functools
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from sparsesoup.runs.config import RunConfig, without_workers


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    row: str  # its row in the table; the method's name, unless the recipe gives another
    sparsity: float | None  # target sparsity of the row; None for methods that keep every weight
    settings: RunConfig  # settings of the run
    path: Path  # path of the run, below the folder of all runs
    needs: Path | None = None  # path of the run whose ticket this one trains; None if it needs none

    @property
    def column_of(self) -> tuple[str, str, float | None]:
        """The column of the table: (model, dataset, sparsity)."""
        return self.settings.model_data.model, self.settings.model_data.dataset, self.sparsity

    @property
    def seed(self) -> int:
        """The seed of all random choices."""
        return self.settings.model_data.seed

    @property
    def planned_run(self) -> tuple[str, tuple[str, str, float | None], int]:
        """The place of its score in the tables: row, column, seed."""
        return self.row, self.column_of, self.seed

    @property
    def describe_trial(self) -> str:
        """The description of the trial."""
        model, dataset, sparsity = self.column_of
        how = "" if sparsity is None else f", sparsity {sparsity:g}"
        return f"{self.row} on {dataset}{how}, seed {self.settings.model_data.seed} ({model})"

    @property
    def portable_settings(self) -> RunConfig:
        """The settings, with the ticket's path relative to the folder of all runs, which may be moved."""
        return self.settings if self.needs is None else with_ticket(self.settings, self.needs)

    @functools.cached_property
    def trial_key(self) -> str:
        """Twelve hex digits of row, column and settings, equal for equal trials of other studies."""
        table = without_workers(self.portable_settings.to_dict())
        settings = {k: v for k, v in table.items() if k != "data_root"}
        text = json.dumps([self.row, self.sparsity, settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def with_ticket(settings: RunConfig, ticket: Path) -> RunConfig:
    """Return the settings of a trial that starts from another trial's ticket, with that ticket."""
    return replace(settings, method=replace(settings.method, ticket=str(ticket)))  # type: ignore[call-arg]
