"""The page of a study: its table, significance, and quality by sparsity, by cost and by layer."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.ticket import load_masks
from sparsesoup.report.plots import FAINT, draw_heatmap, render_page, render_svg, sparsity_limits
from sparsesoup.report.terminal import format_main_score, sparsity_grid
from sparsesoup.study.results.scores import LOSS, Column, Record, ScoreTable, scores_of_row
from sparsesoup.study.results.tables import column_heading, paired_by_task, table_caption, table_lines

STYLES = ("-", "--", "-.", ":")
MOST_PAIRS = 40  # rows of a readable list
WIDEST = 32  # letters of a row's name in a chart; the tables have the full name
LINE = 0.17  # inches per name in a chart


def draw_page(name: str, found: ScoreTable, records: Sequence[Record], out: Path, facts: Mapping[str, Any]) -> str:
    """Return the page as HTML; `out` is the folder of all runs, which contains the tickets' masks."""
    heads, rows, bold = table_lines(found)
    pairs = ticket_agreement(found, records, out)
    runs = [
        {"run": record["run"], "reached": record["sparsity"]["reached"], "seconds": record["seconds"],
         **{split: format_main_score(record[split]) or "not scored" for split in ("validation", "test")}}
        for record in records
    ]  # fmt: skip
    cells = [[{"text": c, "bold": (i, k) in bold} for k, c in enumerate(row)] for i, row in enumerate(rows)]
    return render_page("study.html.j2", {
        "name": name, "heads": heads, "rows": cells, "note": table_caption(found), "facts": dict(facts),
        "failed": facts.get("failed", []), "split": found.split,
        "unit": ", points" if found.factor(found.columns) == 100.0 else "",
        "digits": 1 if found.factor(found.columns) == 100.0 else 3, "gaps": compare_to_best(found),
        "charts": study_charts(found, records, pairs), "pairs": len(pairs),
        "agreement": sorted(pairs, key=lambda pair: -pair["share"])[:MOST_PAIRS],
        "runs": runs,
    })  # fmt: skip


def study_charts(
    found: ScoreTable, records: Sequence[Record], pairs: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Return the charts with data; `pairs` are those of `ticket_agreement`."""
    charts = []
    for pair in dict.fromkeys(column[:2] for column in found.columns):
        columns = [c for c in found.columns if c[:2] == pair and c[2] is not None]
        name = column_heading((*pair, None), found.columns)
        if len(columns) > 1:
            title, height = f"Quality over sparsity: {name}", max(3.6, 0.5 + LINE * len(found.rows))
            charts.append(_make_chart(title, height, lambda f, c=columns: _over_sparsity(f, found, c)))
        for column in [c for c in columns if any((row, c) in found.costs for row in found.rows)]:
            title = f"Quality over cost: {column_heading(column, found.columns)}"
            height = 3.2 + 0.08 * len(found.rows)
            charts.append(_make_chart(title, height, lambda f, c=column: _over_cost(f, found, c)))
    sparsities, shown = by_layer(found, records), _first_pruned(found)
    where = column_heading(shown, found.columns) if shown else ""
    if sparsities:
        height = 1.0 + 0.24 * len(sparsities)
        title = f"Sparsity by layer, % of the weights pruned: {where}"
        charts.append(_make_chart(title, height, lambda f: _sparsity_chart(f, sparsities)))
    if len(pairs) > 1:
        height = 1.6 + 0.24 * len({pair["one"] for pair in pairs})
        charts.append(
            _make_chart(f"Weights that two tickets share, %: {where}", height, lambda f: _agreement_chart(f, pairs))
        )
    return charts


def _first_pruned(found: ScoreTable) -> Column | None:
    return next((column for column in found.columns if column[2] is not None), None)


def _make_chart(title: str, height: float, draw: Any) -> dict[str, Any]:
    name = "".join(letter if letter.isalnum() else "-" for letter in title.lower())
    return {"title": title, "svg": render_svg(name, height, draw, title)}


def compare_to_best(found: ScoreTable) -> list[dict[str, Any]]:
    """Compare the rows with the best pruned one, over all columns: the difference, and whether it is significant.

    The best is one of those in most columns with most seeds: a mean over easy columns is not comparable.
    """
    pooled = {row: scores_of_row(found, row, found.columns) for row in found.rows}
    pruned = {row: values for row, values in pooled.items() if values and found.is_pruned(row, found.columns)}
    factor = found.factor(found.columns)
    if len(pruned) < 2 or factor is None:
        return []
    best = max(pruned, key=lambda row: (len(pruned[row]), statistics.fmean(pruned[row].values())))
    gaps = []
    for row, values in pooled.items():
        if row != best and values:
            mean, half, pairs = paired_by_task(pruned[best], values)
            word = "noise" if abs(mean) <= half else "better" if mean > 0 else "worse"
            gap = {"best": best, "row": row, "mean": factor * mean, "half": factor * half}
            gaps.append({**gap, "pairs": pairs, "word": word})
    return gaps


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the rows that no other beats at the same cost or less, cheapest first.

    >>> pareto_front({"a": (1.0, 0.5), "b": (2.0, 0.4), "c": (3.0, 0.9)})
    ['a', 'c']
    """
    best, found = float("-inf"), list[str]()
    for row, (_, quality) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if quality > best:
            best, found = quality, [*found, row]
    return found


def _scale(found: ScoreTable, columns: Sequence[Column]) -> tuple[float, str]:
    """Return the factor of the scores in columns of one dataset, and the label of their axis."""
    factor = found.factor(columns) or 1.0
    return factor, f"{found.split} score, points" if factor == 100.0 else f"{found.split} {LOSS}"


def _over_sparsity(figure: Any, found: ScoreTable, columns: Sequence[Column]) -> None:
    axes, charts, (factor, label) = figure.subplots(), {}, _scale(found, columns)
    for i, row in enumerate(row for row in found.rows if any(found.scores.get((row, c)) for c in columns)):
        have = sorted((c for c in columns if found.scores.get((row, c))), key=lambda column: column[2] or 0)
        means = [factor * statistics.fmean(found.scores[row, c].values()) for c in have]
        style = STYLES[i // 10 % len(STYLES)]
        positions = [100 * float(c[2] or 0) for c in have]
        if row in found.removed:  # one run, at what it removes
            means, positions = means[:1], [100 * found.removed[row]]
        (charts[row],) = axes.plot(positions, means, style, marker=".", color=f"C{i % 10}")
    axes.set(xlabel="sparsity, %", ylabel=label)
    legend = axes.legend(
        [*charts.values()], [" "] * len(charts), loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8
    )
    for text, row in zip(legend.get_texts(), charts, strict=True):  # matplotlib leaves out labels such as _tuned
        text.set_text(_short_name(row))


def _over_cost(figure: Any, found: ScoreTable, column: Column) -> None:
    from matplotlib.ticker import LogLocator

    axes, (factor, label) = figure.subplots(), _scale(found, [column])
    points = {
        row: (found.costs[row, column], factor * statistics.fmean(found.scores[row, column].values()))
        for row in found.rows
        if (row, column) in found.costs
    }
    best = pareto_front(points)
    axes.plot(*zip(*(points[row] for row in best), strict=True), "-", color="#9aa5b1", linewidth=1, zorder=1)
    for row, (x, y) in points.items():
        values = [factor * v for v in found.scores[row, column].values()]
        error = statistics.stdev(values) if len(values) > 1 else 0.0
        color, order = ("C3", 3) if row in best else ("C0", 2)  # points of the front are drawn on top
        axes.errorbar(x, y, yerr=error, fmt="o", capsize=2, color=color, markersize=5, zorder=order)
    axes.set(xlabel=f"{found.unit}; the line joins the rows that none beats at its cost", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set(ylabel=label)
    _label_points(axes, points, LINE / figure.get_figheight())


def _label_points(axes: Any, points: Mapping[str, tuple[float, float]], share: float) -> None:
    """Write names next to points, `share` of the height apart; a moved name is connected to its point."""
    low, high = axes.get_ylim()
    gap = (high - low) * share
    heights = spread_labels(points, gap)
    axes.set_ylim(low, max(high, *(y + gap / 2 for y in heights.values())))  # matplotlib clips names above the axes
    for row, y in heights.items():
        thread = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
        moved = thread if y - points[row][1] > gap / 2 else None
        style = {"xytext": (9, y), "textcoords": ("offset points", "data"), "arrowprops": moved}
        axes.annotate(_short_name(row), points[row], **style, fontsize=8, va="center")


def _short_name(name: str) -> str:
    """Shorten a name to fit the chart: its beginning and its end.

    >>> _short_name("isp"), _short_name("imp of four rounds, each of which trains for a third of T")
    ('isp', 'imp of four roun…or a third of T')
    """
    return name if len(name) <= WIDEST else f"{name[: WIDEST // 2]}…{name[1 - WIDEST // 2 :]}"


def spread_labels(points: Mapping[str, tuple[float, float]], gap: float) -> dict[str, float]:
    """Return the heights of point labels: each at its point, or moved up to keep the gap from its neighbour.

    Points count as neighbours if their costs are within a tenth.

    >>> spread_labels({"a": (1.0, 5.0), "b": (1.02, 5.1), "c": (2.0, 5.0)}, 1.0)
    {'a': 5.0, 'c': 5.0, 'b': 6.0}
    """
    found: dict[str, float] = {}
    for row, (x, y) in sorted(points.items(), key=lambda item: item[1][1]):
        raised = [found[other] + gap for other in found if abs(math.log(x / points[other][0])) < 0.1]
        found[row] = max([y, *raised])
    return found


def by_layer(found: ScoreTable, records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Return row -> layer -> sparsity, over the runs of the first pruned column."""
    column = _first_pruned(found)
    table: dict[str, dict[str, float]] = {}
    for row in found.rows:
        runs = [r for r in records if r["row"] == row and (r["model"], r["dataset"], r["target"]) == column]
        sums: dict[str, list[float]] = {}
        for run in runs:
            for layer, shares in sparsity_grid([{**matrix, "role": "all"} for matrix in run["matrices"]]).items():
                sums.setdefault(layer, []).append(shares["all"])
        if sums:  # matrices outside of numbered layers have none
            table[row] = {layer: statistics.fmean(values) for layer, values in sums.items()}
    return table if len(table) > 1 else {}


def _sparsity_chart(figure: Any, table: Mapping[str, Mapping[str, float]]) -> None:
    names = list(dict.fromkeys(layer for row in table.values() for layer in row))
    values = [[100 * row.get(layer, math.nan) for layer in names] for row in table.values()]
    draw_heatmap(figure, values, [*map(_short_name, table)], names, sparsity_limits(values)).set(title="layer")


def _agreement_chart(figure: Any, pairs: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for pair in pairs for name in (pair["one"], pair["other"])))
    share = {frozenset((pair["one"], pair["other"])): 100 * pair["share"] for pair in pairs}
    values = [[share.get(frozenset((one, other)), math.nan) for other in names] for one in names]
    short = [*map(_short_name, names)]
    for label in draw_heatmap(figure, values, short, short, (0, 100)).get_xticklabels():
        label.set(rotation=40, horizontalalignment="left")


def ticket_agreement(found: ScoreTable, records: Sequence[Record], out: Path) -> list[dict[str, Any]]:
    """Return for each two rows the intersection over union of kept weights, and its value for random masks.

    Uses the first pruned column, and its first seed.
    """
    column = _first_pruned(found)
    runs = {r["row"]: r for r in reversed(records) if (r["model"], r["dataset"], r["target"]) == column}
    kept = {}
    for row in found.rows:
        try:
            kept[row] = load_masks(out / runs[row]["run"])[0]
        except (KeyError, UserError):
            continue  # the run is missing, or its ticket was moved
    shares = {row: 1 - algebra.sparsity(masks) for row, masks in kept.items()}
    comparisons: list[dict[str, Any]] = []
    for one, other in combinations(kept, 2):
        if kept[one].keys() == kept[other].keys():
            p, q = shares[one], shares[other]
            share, chance = 1 - algebra.jaccard_distance(kept[one], kept[other]), p * q / max(p + q - p * q, 1e-12)
            comparisons.append({"one": one, "other": other, "share": share, "chance": chance})
    return comparisons
