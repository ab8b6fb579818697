"""The interface of export formats, and the content of export.json."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sparsesoup.exports.source import ModelSize, PrunedSource


@dataclass(frozen=True)
class PreparedExport:
    """An export that is ready to be written.

    Args:
        save: writes it into an existing empty folder; may return further facts for export.json.
        size: its size; `weights` is measured after writing.
        layers: a row per layer, before and after; {"layer": name, column: [before, after], ...}.
        load: one line of code that loads it.
        notes: sentences for the user, without the full stop.
        facts: further facts for export.json.
    """

    save: Callable[[Path], dict[str, Any] | None]
    size: ModelSize
    layers: list[dict[str, Any]]
    load: str
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


class ExportFormat(Protocol):
    """An export format: a frozen dataclass whose fields are its settings."""

    def make(self, source: PrunedSource) -> PreparedExport:
        """Return the export in memory; raise all errors here, before anything is written."""


def export_facts(
    to: str, settings: Mapping[str, Any], source: PrunedSource, before: ModelSize, product: PreparedExport
) -> dict[str, Any]:
    """Return the content of export.json, with sizes as [before, after]."""
    keys = ("method", "model", "dataset", "local", "seed", "sparsity", "validation", "test", "test_splits")
    pairs = {key: [value, asdict(product.size)[key]] for key, value in asdict(before).items()}
    return {
        "format": 1,
        "to": to,
        "settings": dict(settings),
        "source": {key: source.facts[key] for key in keys if key in source.facts},
        "sizes": pairs,
        "layers": product.layers,
        "load": product.load,
        "notes": [*product.notes],
        **product.facts,
    }
