"""The tables of a study: quality and cost by row and column over seeds, with significance."""

import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

from scipy import stats

from sparsesoup.report.escaping import escape_markdown as escaped
from sparsesoup.report.escaping import printable_line
from sparsesoup.report.format import format_percent
from sparsesoup.study.results.scores import LOSS, RELATIVE_FLOPS, Column, ScoreTable, scores_of_row

Gap = tuple[float, float, int]  # mean difference, half-width of its interval, pairs
CONFIDENCE = 0.95
OPEN = "-"
TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
       "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}  # fmt: skip


def paired_interval(one: Mapping[Any, float], other: Mapping[Any, float]) -> Gap:
    """Return (mean difference, half-width of its 95 % Student interval, pairs) over common keys.

    With fewer than two pairs the interval is infinite: one seed proves nothing.
    """
    gaps = [one[key] - other[key] for key in one.keys() & other.keys()]
    if len(gaps) < 2:
        return (gaps[0] if gaps else 0.0), float("inf"), len(gaps)
    width = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1)) * statistics.stdev(gaps) / len(gaps) ** 0.5
    return statistics.fmean(gaps), width, len(gaps)


def significantly_best(found: ScoreTable, columns: Sequence[Column]) -> str | None:
    """Return the pruned row that is significantly better than every other one; None if there is none.

    A row with missing seeds or columns cannot win, but must be beaten where it has scores.
    """
    pooled = {row: scores_of_row(found, row, columns) for row in found.rows if found.is_pruned(row, columns)}
    everywhere = [row for row in pooled if all(found.expected_scores(row, [column]) for column in columns)]
    whole = {row: pooled[row] for row in everywhere if len(pooled[row]) == found.expected_scores(row, columns)}
    if len(whole) < 2:
        return None
    best = max(whole, key=lambda row: statistics.fmean(whole[row].values()))
    gaps = [paired_by_task(whole[best], values) for row, values in pooled.items() if values and row != best]
    return best if all(mean > half for mean, half, _ in gaps) else None


def paired_by_task(one: Mapping[tuple[Column, int], float], other: Mapping[tuple[Column, int], float]) -> Gap:
    """Return `paired_interval` over seeds, models and datasets; the mean over sparsities is one pair.

    The same dense run appears at each sparsity, and tickets of a seed at two sparsities are not independent.
    """
    both = sorted(one.keys() & other.keys(), key=str)
    means = []
    for scores in (one, other):
        parts: dict[tuple[str, str, int], list[float]] = {}
        for column, seed in both:
            parts.setdefault((*column[:2], seed), []).append(scores[column, seed])
        means.append({key: statistics.fmean(values) for key, values in parts.items()})
    return paired_interval(*means)


def format_entry(values: Mapping[Any, float], seeds: int, factor: float = 100.0, absent: str = "missing") -> str:
    """Format mean and standard deviation in points, or of a loss with three digits; missing seeds are marked.

    Unplanned entries are empty; `absent` is the text of planned ones without any value.
    """
    if not values:
        return absent if seeds else OPEN
    digits = 1 if factor == 100.0 else 3
    text = f"{factor * statistics.fmean(values.values()):.{digits}f}"
    if len(values) > 1:
        text += f" ± {factor * statistics.stdev(values.values()):.{digits}f}"
    return text if len(values) == seeds else f"{text} ({len(values)} of {seeds})"


def column_heading(column: Column, columns: Sequence[Column]) -> str:
    """Return the heading of a column, with its model if there are several."""
    model, dataset, sparsity = column
    parts = [model] if len({c[0] for c in columns}) > 1 else []
    return " ".join([*parts, dataset, *([] if sparsity is None else [f"at {_format_sparsity(sparsity)}"])])


def _format_sparsity(sparsity: float) -> str:
    """Format in percent with all digits: 0.905 is not 90 %."""
    return f"{100 * sparsity:g} %"


def table_lines(found: ScoreTable) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """Return (heads, cells of each row, places of cells that are significantly better than the rest)."""
    heads = [column_heading(column, found.columns) for column in found.columns]
    groups: list[Sequence[Column]] = [[column] for column in found.columns]
    if len(found.columns) > 1:
        heads, groups = [*heads, "mean"], [*groups, found.columns]
    best = [significantly_best(found, group) if found.factor(group) else None for group in groups]
    rows, bold = [], set()
    for i, row in enumerate(found.rows):
        cells = [_format_scores_of(found, row, group) for group in groups]
        costs = [found.costs[row, column] for column in found.columns if (row, column) in found.costs]
        form = ".2f" if found.unit == RELATIVE_FLOPS else ".3g"
        name = f"{row} ({format_percent(found.removed[row])} removed by rank)" if row in found.removed else row
        absent = found.describe_absence(row, found.columns)
        rows.append([name, *cells, format(statistics.fmean(costs), form) if costs else absent])
        bold |= {(i, k + 1) for k, name in enumerate(best) if name == row}
    return ["method", *heads, found.unit], rows, bold


def _format_scores_of(found: ScoreTable, row: str, group: Sequence[Column]) -> str:
    values, factor, absent = scores_of_row(found, row, group), found.factor(group), found.describe_absence(row, group)
    if factor is None:
        return OPEN  # a mean of losses and points means nothing
    if len(group) == 1:
        by_seed = {seed: value for (_, seed), value in values.items()}
        return format_entry(by_seed, found.expected_scores(row, group), factor, absent)
    if not all(found.expected_scores(row, [column]) for column in group):
        return OPEN
    everywhere = set.intersection(*({seed for c, seed in values if c == column} for column in group))
    means = {s: statistics.fmean(values[column, s] for column in group) for s in sorted(everywhere)}
    most = max(found.expected_scores(row, [column]) for column in group)
    whole = len(values) == found.expected_scores(row, group)
    return format_entry(means, most, factor, absent) if whole else absent


def markdown_table(found: ScoreTable) -> str:
    """Return the table in Markdown."""
    heads, rows, bold = table_lines(found)
    heads, *rows = [[escaped(cell) for cell in row] for row in (heads, *rows)]
    text = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for i, row in enumerate(rows):
        text.append("| " + " | ".join(f"**{c}**" if (i, k) in bold else c for k, c in enumerate(row)) + " |")
    return "\n".join([*text, "", escaped(table_caption(found))]) + "\n"


def latex_table(found: ScoreTable) -> str:
    """Return the table in LaTeX, for the package booktabs."""
    heads, rows, bold = table_lines(found)
    text = [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule", *_tex_heads(found, heads), r"\midrule"]
    for i, row in enumerate(rows):
        text.append(_latex_row(row, {k for k in range(len(row)) if (i, k) in bold}))
        if found.rows[i] in found.unpruned and i + 1 < len(rows) and found.rows[i + 1] not in found.unpruned:
            text.append(r"\midrule")
    return "\n".join([*text, r"\bottomrule", r"\end{tabular}", f"% {printable_line(table_caption(found))}"]) + "\n"


def _tex_heads(found: ScoreTable, heads: Sequence[str]) -> list[str]:
    """Return one line of heads; or, as published, datasets above sparsities if a dataset has several."""
    places = [list(group) for _, group in groupby(found.columns, key=lambda column: column[:2])]
    if all(len(group) == 1 for group in places):
        return [_latex_row(heads)]
    names = [column_heading((*group[0][:2], None), found.columns) for group in places]
    above = [rf"\multicolumn{{{len(g)}}}{{c}}{{{_latex_escaped(name)}}}" for g, name in zip(places, names, strict=True)]
    below = ["" if column[2] is None else _format_sparsity(column[2]) for column in found.columns]
    tail = heads[1 + len(found.columns) :]
    return [" & ".join(["", *above, *([""] * len(tail))]) + r" \\", _latex_row([heads[0], *below, *tail])]


def _latex_escaped(text: str) -> str:
    text = printable_line(text)
    plain = re.sub(r"[\\%&_#${}~^<>|]", lambda sign: TEX.get(sign[0], "\\" + sign[0]), text)
    return plain.replace("±", r"$\pm$")


def _latex_row(cells: Sequence[str], bold: Collection[int] = ()) -> str:
    escaped = [_latex_escaped(cell) for cell in cells]
    if escaped[0].lstrip().startswith(("[", "*")):
        escaped[0] = "{}" + escaped[0]  # otherwise the line before would take it as an option
    return " & ".join(rf"\textbf{{{c}}}" if k in bold else c for k, c in enumerate(escaped)) + r" \\"


def table_caption(found: ScoreTable) -> str:
    """Return the caption of the table."""
    names = {*found.metrics.values()}
    each = ", ".join(f"{metric} of {dataset}" for dataset, metric in found.metrics.items())
    unit = "" if names == {LOSS} else " in points" + (", losses as they are" if LOSS in names else "")
    what = f"{unit}: {each if len(names) > 1 else names.pop()}" if names else unit
    least = min(found.own.values(), default=found.seeds)
    many = f"{found.seeds} seeds" if least == found.seeds else f"{least} to {found.seeds} seeds, as the recipe has them"
    spread = f"Mean ± standard deviation over {many}." if found.seeds > 1 else "Of one seed."
    lent = f" What drawing a ticket cost is not in the row that it was given to ({', '.join(sorted(found.given))})."
    rank = " A row of low rank counts as pruned in the columns whose sparsity is at most the share that it removes."
    return (
        f"{found.split.capitalize()} scores{what}. {spread} Bold: better than every other pruned row by more "
        f"than the {100 * CONFIDENCE:.0f} % interval of the difference (Student, paired by seed, model and dataset). "
        f"FLOPs: all training, scoring and selection.{lent if found.given else ''}{rank if found.removed else ''}"
    )
