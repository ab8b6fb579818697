"""Self-contained HTML pages: templates, and charts as inline SVG in the page's colours."""

import functools
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined, Template
from markupsafe import Markup, escape

from sparsesoup.report import format as words
from sparsesoup.report.escaping import printable_lines
from sparsesoup.training.cost import label_name

# Placeholder colours, which the page replaces by its own, light or dark; no chart uses them otherwise.
INK, FAINT, PAPER = "#010101", "#010102", "#010106"
LINES = {"main": "#010103", "weak": "#010104", "search": "#010105"}
VARIABLES = {INK: "ink", FAINT: "faint", PAPER: "page"} | {colour: label for label, colour in LINES.items()}
STYLE = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9.5, "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": FAINT, "grid.alpha": 0.35, "axes.grid": True,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5,
    "axes.titlelocation": "left", "grid.linewidth": 0.6, "legend.frameon": False,
    "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """Render a page from a template of this package, with the shared style."""
    return printable_lines(_load_template(template).render(values))


@functools.cache
def _load_template(template: str) -> Template:
    """Return a template, compiled once per process."""
    folder = resources.files("sparsesoup.report")
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in (template, "page.css")}
    environment = Environment(loader=DictLoader(texts), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters |= {"percent": words.format_percent, "flop": words.format_count, "plain": _format_plain,
                            "duration": words.format_duration, "label": label_name}  # fmt: skip
    return environment.get_template(template)


def render_svg(name: str, height: float, draw: Callable[[Any], None], what: str) -> Markup:
    """Return a chart as inline SVG in the page's colours and font, deterministic for the same data."""
    import matplotlib.style  # a lazy import: it takes longer than all others
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    out = io.StringIO()
    with matplotlib.style.context(["default", STYLE | {"svg.hashsalt": name}]):
        figure = Figure(figsize=(9.2, height), layout="constrained")
        draw(figure)
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(out, metadata=metadata)  # `savefig` would draw everything twice
    text = out.getvalue()[out.getvalue().index("<svg") :]
    # Several charts share a page, so each needs its own ids.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text).replace("'DejaVu Sans'", "var(--font)")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(what)}" ', 1))


def draw_heatmap(
    figure: Any, values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str],
    limits: tuple[float, float], digits: int = 0,
) -> Any:  # fmt: skip
    """Draw percentages as a heat map with their numbers, darker for more, and return its axes; NaN is left empty."""
    axes, (low, high) = figure.subplots(), limits
    top = low + 1.3 * (high - low) or 1.0
    axes.pcolormesh(values, cmap="YlGnBu", vmin=low, vmax=top, edgecolors=PAPER, linewidth=2)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            ink = "white" if value - low > 0.82 * (high - low) else "#1b2733"
            text = "" if math.isnan(value) else f"{value:.{digits}f}"
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=ink, fontsize=8 if digits == 0 else 9.5)
    axes.set(xticks=[j + 0.5 for j in range(len(columns))], xticklabels=columns)
    axes.set(yticks=[i + 0.5 for i in range(len(rows))], yticklabels=rows)
    axes.invert_yaxis()
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    return axes


def sparsity_limits(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the range of colours for sparsities in percent: at least from the densest entry to half of its density."""
    known = [value for row in values for value in row if not math.isnan(value)]
    return min(known), max(*known, (100 + min(known)) / 2)


def _format_plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "not set", True: "yes", False: "no"}[value]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
