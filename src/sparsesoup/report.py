"""The report of a run: one page that needs nothing but itself, drawn from report.json and log.jsonl alone."""

import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sparsesoup.errors import UserError
from sparsesoup.files import write_text
from sparsesoup.schedules import geometric

REPORT, LOG, PAGE, FORMAT = "report.json", "log.jsonl", "report.html", 1
COSTS = ("steps", "examples", "tokens", "padding", "flops", "seconds")
NEEDED: dict[str, type | tuple[type, ...]] = {
    "method": str, "model": str, "dataset": str, "seed": int, "steps": int, "settings": dict, "sparsity": dict,
    "validation": dict, "cost": dict, "matrices": list, "notes": dict, "command": str, "versions": dict, "machine": str,
}  # fmt: skip
KNOWN_NOTES = ("stages", "budget", "weak_share", "rounds")
BARS = 40  # a longer list of bars is no picture
POINTS = 500  # of one curve: more than a screen shows, few enough for a page to stay small
# Colours that a browser replaces by those of the page, light or dark: no chart draws with them otherwise.
INK, FAINT, LINES = "#010101", "#010102", {"strong": "#010103", "weak": "#010104", "search": "#010105"}
VARIABLES = {INK: "ink", FAINT: "faint"} | {colour: label for label, colour in LINES.items()}
STYLE = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9.5, "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": FAINT, "grid.alpha": 0.35, "axes.grid": True,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5,
    "axes.titlelocation": "left", "grid.linewidth": 0.6, "legend.frameon": False, "lines.solid_capstyle": "round",
}  # fmt: skip


def write_report(run: Path) -> Path:
    """Draw report.html of a run directory from its report.json and log.jsonl, and return its path.

    The same input gives the same bytes. Raises: UserError if report.json is missing or damaged.
    """
    facts, (log, unread) = read_report(run), _read_log(Path(run) / LOG)
    text = (resources.files("sparsesoup") / "report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "flop": flop, "duration": duration, "plain": _plain}
    table = grid(facts["matrices"])
    soup = soup_stages(facts)
    page = environment.from_string(text).render(
        run=facts, headline=headline(facts), validation=flat(facts["validation"]), test=flat(facts.get("test")),
        scored={"validation": first(facts["validation"]), "test": first(facts.get("test"))},
        dense=is_dense(facts), cost=facts["cost"], total=total(facts), bars=_cost_bars(facts), times=times_dense(facts),
        curves=_curves(log) if log else "", steps=len(log), unread=unread, grid=table,
        heat=_heat(table) if table and not is_dense(facts) else "", least=min(density(facts), key=lambda m: m[1]),
        matrices=sorted(density(facts), key=lambda m: m[1])[:BARS], most=max(d for _, d in density(facts)),
        soup=soup, agreement=_agreement(soup) if soup else "", settings=_dotted(facts["settings"]),
        others={k: v for k, v in facts["notes"].items() if k not in KNOWN_NOTES},
    )  # fmt: skip
    write_text(Path(run) / PAGE, page)
    return Path(run) / PAGE


def _read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(the lines of a log, how many could not be read): a report must not fail on a torn last line."""
    rows, unread = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            rows.append({"label": str(row["label"])} | {k: float(row[k]) for k in ("step", "loss", "sparsity")})
        except (ValueError, KeyError, TypeError):
            unread += 1
    return rows, unread


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _dotted(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names, as on the command line."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def _cost_bars(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """This run, a dense one and IMP, each as parts of the longest; none where there is nothing to compare."""
    dense = _dense_flops(facts)
    if not dense or is_dense(facts):
        return []
    rounds = len(geometric(0.2, facts["sparsity"]["asked"])) + 1
    mine = {k: v["flops"] for k, v in facts["cost"].items() if k != "validation" and v["flops"]}
    rows: list[tuple[str, dict[str, float]]] = [
        ("this run", mine), ("dense, estimated", {"strong": dense}),
        (f"IMP, {rounds} trainings, estimated", {"search": (rounds - 1) * dense, "strong": dense}),
    ]  # fmt: skip
    longest = max(sum(parts.values()) for _, parts in rows)
    return [
        {"name": name, "flops": sum(parts.values()), "times": sum(parts.values()) / dense,
         "parts": [(label, 100 * part / longest) for label, part in parts.items()]}
        for name, parts in rows
    ]  # fmt: skip


