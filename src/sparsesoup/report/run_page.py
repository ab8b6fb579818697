"""The report page of a run: self-contained HTML from report.json, log.jsonl and benchmark.json."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from sparsesoup.core.files import from_json, write_text
from sparsesoup.core.schedules import geometric_sparsities
from sparsesoup.report import format as words
from sparsesoup.report import terminal as show
from sparsesoup.report.collapse import collapse_warnings
from sparsesoup.report.escaping import command_line
from sparsesoup.report.plots import INK, LINES, MARK, PAPER, render_page, render_svg

LOG, PAGE, MEASURED = "log.jsonl", "report.html", "benchmark.json"
TOLD = ("said", "rows", "failed", "batch", "length", "rounds", "threads", "machine")  # of benchmark.json on the page
BARS = 40  # more bars than this are not plotted
POINTS = 400  # points per curve: enough for the page's resolution, and a small file
NAMES = {label: f"{label}: {show.LABELS[label]}" for label in LINES}


def write_report(run: Path) -> Path:
    """Write report.html of a run directory from its report.json, log.jsonl and benchmark.json, and return its path.

    The same input gives the same bytes. Raises: UserError if report.json is missing or damaged.
    """
    run = Path(run)
    facts, (log, unread) = show.read_report(run), _read_log(run / LOG)
    sentences, others = words.describe_notes(facts)
    text = render_page("report.html.j2", _score_values(facts) | _chart_values(facts, log) | {
        "run": facts, "costs": show.ordered_costs(facts), "steps": len(log), "unread": unread,
        "headline": show.run_headline(facts),
        "total": show.total_cost(facts), "bars": _cost_bars(facts), "settings": _dotted_settings(facts["settings"]),
        "origin": _provenance_values(facts), "noted": sentences, "others": others, "most_rows": BARS,
        "repeat": command_line(facts["command"]),
        "checks": _early_bird_checks(facts["notes"]), "measured": _benchmark_values(run / MEASURED),
        "meaning": {label: show.LABELS[label] for label, _ in show.ordered_costs(facts) if label in show.LABELS},
    })  # fmt: skip
    write_text(run / PAGE, text)
    return run / PAGE


def _score_values(facts: Mapping[str, Any]) -> dict[str, Any]:
    test = facts.get("test")
    return {
        "validation": show.flatten_scores(facts["validation"]), "test": show.flatten_scores(test),
        "times": show.times_dense(facts),
        "dense": show.is_dense(facts),
        "chosen": {"validation": show.main_scores(facts["validation"]), "test": show.main_scores(test)},
    }  # fmt: skip


def _chart_values(facts: Mapping[str, Any], log: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the template's values and charts; an empty chart is left out."""
    table, soup = show.density_grid(facts["matrices"]), show.soup_stages(facts)
    rows = sorted(show.matrix_densities(facts), key=lambda row: row[1])
    curves = (
        render_svg("curves", 4.0, lambda f: _draw_curves(f, log), "Loss and sparsity over the steps") if log else ""
    )
    heat = ""
    if table and not show.is_dense(facts):
        heat = render_svg(
            "heat", 0.8 + 0.29 * len(table), lambda f: _draw_heat(f, table), "Weights kept by layer and role"
        )
    votes = (
        render_svg("soup", 2.9, lambda f: _draw_soup(f, soup), "Agreement of the weak masks by stage") if soup else ""
    )
    return {"curves": curves, "heat": heat, "agreement": votes, "soup": soup, "matrices": rows[:BARS],
            "count": len(rows), "least": rows[0], "most": rows[-1]}  # fmt: skip


def _read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return (the lines of a log, the number of unreadable lines): a partial last line must not break a report."""
    rows, unread = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = from_json(line)
            rows.append({"label": str(row["label"])} | {k: float(row[k]) for k in ("step", "loss", "sparsity")})
        except (ValueError, KeyError, TypeError):
            unread += 1
    return rows, unread


def collapse_of(facts: Mapping[str, Any], log: Path) -> dict[str, list[str]]:
    """Return the warning of a collapsed run; an empty dict for others."""
    losses = [row["loss"] for row in _read_log(log)[0] if row["label"] == "strong"]
    found = collapse_warnings(facts, losses)
    return {"collapse": found} if found else {}


def _benchmark_values(path: Path) -> dict[str, Any] | None:
    """Return the results of `benchmark`, with times relative to the longest; None if it was not run."""
    try:
        found = from_json(path.read_text(encoding="utf-8"))
        if found["format"] != 1 or not {*TOLD} <= found.keys():
            return None
        longest = max([row[key] for row in found["rows"] for key in ("seconds", "dense_seconds")], default=1.0)
        rows = [
            {**row, "widths": [100 * row[key] / longest for key in ("seconds", "dense_seconds")]}
            for row in found["rows"]
        ]
        return {**found, "rows": rows}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _dotted_settings(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names, as on the command line; tables in a list are numbered from 1."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
            value = {str(number): part for number, part in enumerate(value, start=1)}
        nested = isinstance(value, Mapping) and value
        found |= _dotted_settings(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def _provenance_values(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the provenance of the run; missing facts are left out."""
    keys = {"model": "model", "head": "head", "dataset": "dataset", "task": "task",
            "dataset_fingerprint": "data fingerprint",
            "train_rows": "training rows", "validation_rows": "validation rows", "seed": "seed",
            "steps": "T, steps of one training", "machine": "machine"}  # fmt: skip
    told = {name: facts[key] for key, name in keys.items() if facts.get(key) is not None}
    return told | dict(facts["versions"]) | {"report format": facts["format"]}


def _early_bird_checks(notes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return step and largest distances of each mask of an early-bird search; the first mask has none."""
    try:
        return [
            {"step": c["step"], **{k: max(c[k], default=None) for k in ("hamming", "kept-sets")}}
            for c in notes["early_bird"]["checks"][-BARS:]
        ]
    except (KeyError, TypeError):
        return []


def _cost_bars(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return bars for this run, a dense one and IMP, relative to the longest; none if there is nothing to compare."""
    dense = show.dense_flops(facts)
    if not dense or show.is_dense(facts):
        return []
    rounds = len(geometric_sparsities(0.2, facts["sparsity"]["asked"])) + 1
    mine = show.flops_by_label(facts)
    rows: list[tuple[str, dict[str, float]]] = [
        ("this run", mine), ("dense, estimated", {"strong": dense}),
        (f"IMP, {rounds} trainings, estimated", {"strong": dense, "search": (rounds - 1) * dense}),
    ]  # fmt: skip
    longest = max(sum(parts.values()) for _, parts in rows)
    return [
        {"name": name, "flops": sum(parts.values()), "times": sum(parts.values()) / dense,
         "parts": [(label, 100 * part / longest) for label, part in parts.items()]}
        for name, parts in rows
    ]  # fmt: skip


def _loss_stretches(log: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[int], list[float]]]:
    """Yield (label, positions, losses) of each monotonic stretch of training; the main one continues after branches."""
    under_way: dict[str, tuple[list[int], list[float]]] = {}
    last: dict[str, float] = {}
    for place, row in enumerate(log, start=1):
        label = row["label"]
        broken = label != "strong" and under_way.get(label, ([place - 1], []))[0][-1] < place - 1
        if label in under_way and (broken or row["step"] <= last[label]):
            yield (label, *under_way.pop(label))
        last[label] = row["step"]
        places, losses = under_way.setdefault(label, ([], []))
        places.append(place)
        losses.append(row["loss"])
    for label, (places, losses) in under_way.items():
        yield label, places, losses


def _smooth_losses(values: Sequence[float], span: float) -> list[float]:
    """Return the exponential moving average over about `span` values, bias-corrected."""
    mean, weight, found = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = mean + (value - mean) / span, weight + (1 - weight) / span
        found.append(mean / weight if weight else math.nan)
    return found


def _draw_curves(figure: Any, log: list[dict[str, Any]]) -> None:
    gone, x = [100 * row["sparsity"] for row in log], "position in the log (steps of all kinds, as they were made)"
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[5, 2]) if any(gone) else [figure.subplots()] * 2
    below.set(xlabel=x, xlim=(0, len(log) + 1))
    if any(gone):
        _draw_sparsity(below, gone)
    drawn: set[str] = set()
    for label, places, losses in sorted(_loss_stretches(log), key=lambda stretch: stretch[0] != "strong"):
        values, every = _smooth_losses(losses, max(4.0, len(log) / 60)), -(-len(log) // POINTS)
        points = [(x, y) for i, (x, y) in enumerate(zip(places, values, strict=True)) if i % every == 0]
        gaps = [(b - 0.5, math.nan) for (a, _), (b, _) in pairwise(points) if b - a > every]
        name = None if label in drawn else NAMES.get(label, label)
        look = {"color": LINES.get(label, INK), "linewidth": 1.1 if label == "weak" else 1.7, "label": name}
        # A stretch with one point has no line and needs a marker.
        above.plot(*zip(*sorted(points + gaps), strict=True), marker="." if len(points) == 1 else "", **look)
        drawn.add(label)
    above.set(ylabel="training loss, smoothed")
    if drawn != {"strong"}:
        # Above the axes, so that no curve overlaps it.
        above.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)


def _draw_sparsity(axes: Any, gone: list[float]) -> None:
    turns = [i for i in range(len(gone)) if i in (0, len(gone) - 1) or gone[i - 1] != gone[i]]
    x, y = [i + 1 for i in turns], [gone[i] for i in turns]
    axes.fill_between(x, y, step="post", color=LINES["strong"], alpha=0.18, linewidth=0)
    axes.step(x, y, where="post", color=LINES["strong"], linewidth=1.4)
    axes.set(ylim=(0, 100), yticks=(0, 50, 100), ylabel="removed, %")


def _draw_heat(figure: Any, table: dict[str, dict[str, float]]) -> None:
    from matplotlib.patches import Rectangle

    axes, roles = figure.subplots(), list(dict.fromkeys(role for row in table.values() for role in row))
    cells = {(i, roles.index(role)): d for i, row in enumerate(table.values()) for role, d in row.items()}
    values = [[cells.get((i, j), math.nan) for j in range(len(roles))] for i in range(len(table))]
    most, least = max(cells.values()), min(cells, key=lambda at: cells[at])
    # Show at least half of the scale below the highest bar, so that small differences do not look large.
    low = min(cells[least], most / 2)
    high = low + 1.3 * (most - low) or 1.0
    axes.pcolormesh(values, cmap="YlGnBu", vmin=low, vmax=high, edgecolors=PAPER, linewidth=2)
    for (i, j), d in cells.items():
        ink = "white" if d - low > 0.63 * (high - low) else "#1b2733"
        weight = "bold" if (i, j) == least else "normal"
        axes.text(j + 0.5, i + 0.5, f"{100 * d:.1f}", ha="center", va="center", color=ink, weight=weight)
    axes.add_patch(Rectangle((least[1], least[0]), 1, 1, fill=False, edgecolor=MARK, linewidth=2.2, zorder=3))
    axes.set(xticks=[j + 0.5 for j in range(len(roles))], xticklabels=roles, ylabel="layer")
    axes.set(yticks=[i + 0.5 for i in range(len(table))], yticklabels=list(table))
    axes.invert_yaxis()
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.grid(False)


def _draw_soup(figure: Any, stages: Sequence[Mapping[str, Any]]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    numbers = list(range(1, len(stages) + 1))
    for key, style, colour in (
        ("same", "o-", LINES["strong"]),
        ("unanimous", "s--", LINES["search"]),
        ("overlap", "^-.", INK),
    ):
        shares = [100 * stage.get(key, math.nan) for stage in stages]
        left.plot(numbers, shares, style, color=colour, label=key, markersize=5)
    left.legend(loc="best")
    right.bar(numbers, [100 * stage["decided"] for stage in stages], color=LINES["weak"], width=0.6)
    ticks = numbers[:: -(-len(numbers) // 8)]
    left.set(title="agreement of the weak masks, %")
    right.set(title="decided by the soup, % of all weights")
    for axes in (left, right):
        axes.set(xticks=ticks, xlabel="stage, and the sparsity after it", xlim=(0.5, len(stages) + 0.5))
        axes.set_xticklabels([f"{n}\n{100 * stages[n - 1]['sparsity']:.0f} %" for n in ticks])
