"""Self-contained HTML pages: templates, and charts as inline SVG in the page's colours."""

import io
import json
import re
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup, escape

from sparsesoup.report import format as words
from sparsesoup.report.escaping import printable_lines

# Placeholder colours, which the page replaces by its own, light or dark; no chart uses them otherwise.
INK, FAINT, PAPER = "#010101", "#010102", "#010106"
LINES = {"strong": "#010103", "weak": "#010104", "search": "#010105"}
VARIABLES = {INK: "ink", FAINT: "faint", PAPER: "page"} | {colour: label for label, colour in LINES.items()}
MARK = "#D55E00"
STYLE = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9.5, "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": FAINT, "grid.alpha": 0.35, "axes.grid": True,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5,
    "axes.titlelocation": "left", "grid.linewidth": 0.6, "legend.frameon": False,
}  # fmt: skip


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """Render a page from a template of this package, with the shared style."""
    folder = resources.files("sparsesoup.report")
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in (template, "page.css")}
    environment = Environment(
        loader=DictLoader(texts), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": words.format_percent,
        "flop": words.format_count,
        "duration": words.format_duration,
        "plain": _format_plain,
    }
    return printable_lines(environment.get_template(template).render(values))


def render_svg(name: str, height: float, draw: Callable[[Any], None], what: str) -> Markup:
    """Return a chart as inline SVG in the page's colours and font, deterministic for the same data."""
    import matplotlib.style  # a lazy import: it takes longer than all others
    from matplotlib.figure import Figure

    out = io.StringIO()
    with matplotlib.style.context(["default", STYLE | {"svg.hashsalt": name}]):
        figure = Figure(figsize=(9.2, height), layout="constrained")
        draw(figure)
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=metadata)
    text = out.getvalue()[out.getvalue().index("<svg") :]
    # Several charts share a page, so each needs its own ids.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text).replace("'DejaVu Sans'", "var(--font)")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(what)}" ', 1))


def _format_plain(value: Any) -> str:
    words = {None: "not set", True: "yes", False: "no"}
    if value is None or isinstance(value, bool):
        return words[value]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
