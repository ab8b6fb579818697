"""The report page of a run: self-contained HTML from report.json, log.jsonl and benchmark.json."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from sparsesoup.core.files import from_json, write_text
from sparsesoup.core.low_rank import low_rank_of
from sparsesoup.core.schedules import geometric_sparsities
from sparsesoup.report import format as words
from sparsesoup.report import terminal as show
from sparsesoup.report.degenerate import degenerate_warnings
from sparsesoup.report.escaping import command_line
from sparsesoup.report.plots import INK, LINES, draw_heatmap, render_page, render_svg, sparsity_limits
from sparsesoup.training.cost import LABELS, label_name

LOG, PAGE, MEASURED = "log.jsonl", "report.html", "benchmark.json"
FIELDS = ("summary", "rows", "failed", "batch", "length", "rounds", "threads", "machine")  # of benchmark.json
BARS = 40  # more bars than this are not plotted
POINTS = 400  # points per curve: enough for the page's resolution, and a small file


def write_report(run: Path) -> Path:
    """Write report.html of a run directory from its report.json, log.jsonl and benchmark.json, and return its path."""
    run = Path(run)
    facts, (log, unread) = show.read_report(run), _parse_log(read_log_lines(run / LOG))
    sentences, others = words.describe_notes(facts)
    scores = {split: facts.get(split) for split in ("validation", "test")}
    text = render_page("report.html.j2", _chart_values(facts, log) | {
        **{split: show.flatten_scores(table) for split, table in scores.items()},
        "chosen": {split: show.main_scores(table) for split, table in scores.items()},
        "times": show.times_dense(facts), "dense": show.is_dense(facts),
        "low_rank": low_rank_of(facts), "flops_note": show.describe_flops(facts),
        "run": facts, "costs": show.ordered_costs(facts), "steps": len(log), "unread": unread,
        "headline": show.run_headline(facts), "total": show.total_cost(facts), "bars": _cost_bars(facts),
        "settings": _dotted_settings(facts["settings"]), "origin": _provenance_values(facts), "noted": sentences,
        "others": others, "most_rows": BARS, "repeat": command_line(facts["command"]),
        "checks": _early_bird_checks(facts["notes"]), "measured": _benchmark_values(run / MEASURED),
        "evaluations": _evaluation_values(facts),
        "meaning": dict(LABELS[label] for label, _ in show.ordered_costs(facts) if label in LABELS),
    })  # fmt: skip
    write_text(run / PAGE, text)
    return run / PAGE


def _chart_values(facts: Mapping[str, Any], log: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the template's values and charts; an empty chart is left out."""
    table, soup = show.sparsity_grid(facts["matrices"]), show.soup_stages(facts)
    rows = sorted(show.matrix_sparsities(facts), key=lambda row: -row[1])
    curves, heat, votes = "", "", ""
    if log:
        curves = render_svg("curves", 4.0, lambda f: _draw_curves(f, log), "Loss and sparsity over the steps")
    if table and not show.is_dense(facts) and not low_rank_of(facts):
        heat = render_svg("heat", 0.8 + 0.29 * len(table), lambda f: _draw_heat(f, table), "Sparsity by layer and role")
    if soup:
        votes = render_svg("soup", 2.9, lambda f: _draw_soup(f, soup), "Agreement of the weak masks by stage")
    return {"curves": curves, "heat": heat, "agreement": votes, "soup": soup, "matrices": rows[:BARS],
            "count": len(rows), "most": rows[0], "least": rows[-1]}  # fmt: skip


def read_log_lines(path: Path) -> list[str]:
    """Return the lines of a log; none if there is no such file."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _parse_log(lines: Iterable[str]) -> tuple[list[dict[str, Any]], int]:
    """Return (the records of a log, the number of unreadable lines): a partial last line must not break a report."""
    rows, unread = list[dict[str, Any]](), 0
    for line in lines:
        try:
            row = from_json(line)
            if row["label"] == "evaluation":  # scores without a loss, which the report has too
                continue
            rows.append({"label": str(row["label"])} | {k: float(row[k]) for k in ("step", "loss", "sparsity")})
        except (ValueError, KeyError, TypeError):
            unread += 1
    return rows, unread


def _evaluation_values(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return metric, number, best score and chart of the validations during training; empty if there were none."""
    try:
        points = [(row["step"], float(next(iter(row["scores"].values())))) for row in facts["evaluations"]]
        metric = next(iter(facts["evaluations"][0]["scores"]))
    except (LookupError, TypeError, ValueError, StopIteration, AttributeError):
        return {}
    step, score = max(points, key=lambda point: (point[1], -point[0]))
    chart = render_svg("evaluations", 2.6, lambda f: _draw_evaluations(f, points, metric), f"{metric} over the steps")
    return {"metric": metric, "count": len(points), "step": step, "score": score, "chart": chart}


def degenerate_notes(facts: Mapping[str, Any], log: Iterable[str]) -> dict[str, list[str]]:
    """Return the warnings of a degenerate run as a note of its report; an empty dict for others."""
    losses = [row["loss"] for row in _parse_log(log)[0] if row["label"] == "main"]
    found = degenerate_warnings(facts, losses)
    return {"degenerate": found} if found else {}


def _benchmark_values(path: Path) -> dict[str, Any] | None:
    """Return the results of `benchmark`, with times relative to the longest; None if it was not run."""
    times = ("seconds", "dense_seconds")
    try:
        found = from_json(path.read_text(encoding="utf-8"))
        if found["format"] != 1 or not {*FIELDS} <= found.keys():
            return None
        longest = max([row[key] for row in found["rows"] for key in times], default=1.0)
        return {**found, "rows": [{**r, "widths": [100 * r[key] / longest for key in times]} for r in found["rows"]]}
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
    keys = {"model": "model", "head": "head", "dataset": "dataset", "task": "task", "seed": "seed",
            "dataset_fingerprint": "data fingerprint", "train_rows": "training rows", "machine": "machine",
            "validation_rows": "validation rows", "steps": "T, steps of one training"}  # fmt: skip
    found = {name: facts[key] for key, name in keys.items() if facts.get(key) is not None}
    return found | dict(facts["versions"]) | {"report format": facts["format"]}


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
    low = low_rank_of(facts)
    rounds = len(geometric_sparsities(0.2, low["removed"] if low else facts["sparsity"]["target"])) + 1
    mine = show.flops_by_label(facts)
    rows: list[tuple[str, dict[str, float]]] = [
        ("this run", mine), ("dense, estimated", {"main": dense}),
        (f"IMP, {rounds} trainings, estimated", {"main": dense, "search": (rounds - 1) * dense}),
    ]  # fmt: skip
    longest = max(sum(parts.values()) for _, parts in rows)
    return [
        {"name": name, "flops": sum(parts.values()), "times": sum(parts.values()) / dense,
         "parts": [(label, 100 * part / longest) for label, part in parts.items()]}
        for name, parts in rows
    ]  # fmt: skip


def _loss_stretches(log: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[int], list[float]]]:
    """Yield (label, positions, losses) of each monotonic stretch of training; the main one continues after branches."""
    running: dict[str, tuple[list[int], list[float]]] = {}
    last: dict[str, float] = {}
    for line_number, row in enumerate(log, start=1):
        label = row["label"]
        broken = label != "main" and running.get(label, ([line_number - 1], []))[0][-1] < line_number - 1
        if label in running and (broken or row["step"] <= last[label]):
            yield (label, *running.pop(label))
        last[label] = row["step"]
        places, losses = running.setdefault(label, ([], []))
        places.append(line_number)
        losses.append(row["loss"])
    for label, (places, losses) in running.items():
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
    gone, x = [100 * row["sparsity"] for row in log], "logged steps, in the order in which they were made"
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[5, 2]) if any(gone) else [figure.subplots()] * 2
    below.set(xlabel=x, xlim=(0, len(log) + 1))
    if any(gone):
        _draw_sparsity(below, gone)
    drawn: set[str] = set()
    for label, places, losses in sorted(_loss_stretches(log), key=lambda stretch: stretch[0] != "main"):
        values, every = _smooth_losses(losses, max(4.0, len(log) / 60)), -(-len(log) // POINTS)
        points = [(x, y) for i, (x, y) in enumerate(zip(places, values, strict=True)) if i % every == 0]
        gaps = [(b - 0.5, math.nan) for (a, _), (b, _) in pairwise(points) if b - a > every]
        style = {"color": LINES.get(label, INK), "linewidth": 1.1 if label == "weak" else 1.7}
        style["label"] = None if label in drawn else label_name(label)
        # A stretch with one point has no line and needs a marker.
        above.plot(*zip(*sorted(points + gaps), strict=True), marker="." if len(points) == 1 else "", **style)
        drawn.add(label)
    above.set(ylabel="training loss, smoothed")
    if drawn != {"main"}:
        # Above the axes, so that no curve overlaps it.
        above.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)


def _draw_evaluations(figure: Any, points: Sequence[tuple[float, float]], metric: str) -> None:
    """Draw the scores; a line ends where the run goes back to an earlier step."""
    axes, line = figure.subplots(), [*points[:1]]
    for before, point in pairwise(points):
        line += [(point[0], math.nan), point] if point[0] <= before[0] else [point]
    axes.plot(*zip(*line, strict=True), "o-", color=LINES["main"], markersize=3.5, linewidth=1.4)
    axes.set(xlabel="step of the run", ylabel=f"{metric}, validation")


def _draw_sparsity(axes: Any, gone: list[float]) -> None:
    turns = [i for i in range(len(gone)) if i in (0, len(gone) - 1) or gone[i - 1] != gone[i]]
    x, y = [i + 1 for i in turns], [gone[i] for i in turns]
    axes.fill_between(x, y, step="post", color=LINES["main"], alpha=0.18, linewidth=0)
    axes.step(x, y, where="post", color=LINES["main"], linewidth=1.4)
    axes.set(ylim=(0, 100), yticks=(0, 50, 100), ylabel="sparsity, %")


def _draw_heat(figure: Any, table: dict[str, dict[str, float]]) -> None:
    roles = list(dict.fromkeys(role for row in table.values() for role in row))
    values = [[100 * row.get(role, math.nan) for role in roles] for row in table.values()]
    draw_heatmap(figure, values, list(table), roles, sparsity_limits(values), digits=1).set(ylabel="layer")


def _draw_soup(figure: Any, stages: Sequence[Mapping[str, Any]]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    numbers = list(range(1, len(stages) + 1))
    styles = (("same", "o-", LINES["main"]), ("unanimous", "s--", LINES["search"]), ("overlap", "^-.", INK))
    for key, style, colour in styles:
        shares = [100 * stage.get(key, math.nan) for stage in stages]
        left.plot(numbers, shares, style, color=colour, label=key, markersize=5)
    left.legend(loc="best")
    right.bar(numbers, [100 * stage["changed"] for stage in stages], color=LINES["weak"], width=0.6)
    ticks = numbers[:: -(-len(numbers) // 8)]
    left.set(title="agreement of the weak masks, %")
    right.set(title="changed by the soup, % of all weights")
    for axes in (left, right):
        axes.set(xticks=ticks, xlabel="stage, and the sparsity after it", xlim=(0.5, len(stages) + 0.5))
        axes.set_xticklabels([f"{n}\n{100 * stages[n - 1]['sparsity']:.0f} %" for n in ticks])
