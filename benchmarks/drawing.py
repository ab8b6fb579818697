"""Figures of the documents, the same bytes for the same data."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsesoup.study.results.html import spread_labels


@contextlib.contextmanager
def axes(path: Path, title: str, widths: tuple[int, ...] = (1,), height: float = 3.8) -> Iterator[Any]:
    """Axes to draw on, or some side by side of these relative widths; saved to an SVG file when they are drawn."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "sparsesoup", "font.size": 10})
    from matplotlib import pyplot

    shape = {"width_ratios": widths}
    shown, drawn = pyplot.subplots(1, len(widths), figsize=(6.4, height), sharey=True, gridspec_kw=shape)
    shown.suptitle(title)
    for each in shown.axes:
        each.spines[["top", "right"]].set_visible(False)
    yield drawn
    shown.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    shown.savefig(path, metadata={"Date": None})
    pyplot.close(shown)


def label(drawn: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """The name of each point beside it, none over another."""
    low, high = drawn.get_ylim()
    for name, y in spread_labels(dict(points), (high - low) / 22).items():
        drawn.annotate(name, (points[name][0], y), xytext=(6, 0), textcoords="offset points", fontsize=8, va="center")
