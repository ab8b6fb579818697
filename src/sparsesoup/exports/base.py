"""What a format makes of a source, and what export.json tells of it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sparsesoup.exports.source import ModelSize, PrunedSource


@dataclass(frozen=True)
class PreparedExport:
    """An export that is ready to be written.

    Args:
        save: writes it into a folder that is there and empty; may return what else export.json tells, known by then.
        size: how large it is; its `weights` are measured once written.
        layers: a row a layer, what was there and what is left; {"layer": name, column: [before, after], ...}.
        load: how it is loaded, in one line.
        notes: sentences that the user should read, without the full stop.
        facts: what else export.json tells.
    """

    save: Callable[[Path], dict[str, Any] | None]
    size: ModelSize
    layers: list[dict[str, Any]]
    load: str
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


class ExportFormat(Protocol):
    """A way to export: a frozen dataclass, whose fields are its settings."""

    def make(self, source: PrunedSource) -> PreparedExport:
        """The product in memory; whatever is wrong is said here, before anything is written."""


def export_facts(
    to: str, settings: Mapping[str, Any], source: PrunedSource, before: ModelSize, product: PreparedExport
) -> dict[str, Any]:
    """What export.json says, sizes before and after as pairs."""
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
