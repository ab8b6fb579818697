"""The tables of a study: quality and cost by row and column over seeds, with significance."""

import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from scipy import stats

from sparsesoup.report.escaping import escape_markdown as escaped
from sparsesoup.report.escaping import printable_line
from sparsesoup.report.format import format_percent
from sparsesoup.report.terminal import low_rank_of, main_scores

Record = Mapping[str, Any]
Column = tuple[str, str, float | None]  # model, dataset, target sparsity; None for dense rows
Gap = tuple[float, float, int]  # mean difference, half-width of its interval, pairs
CONFIDENCE = 0.95
OPEN = "-"
LOSS = "negative_loss"  # the score of runs without metrics; it is no share, so it is not in points
BESIDE, ALONE = "FLOPs (dense = 1)", "PFLOP"  # units of cost: with a dense row, and without one
TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
       "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}  # fmt: skip


@dataclass(frozen=True)
class ScoreTable:
    """The scores of a study."""

    rows: list[str]  # in the order of the recipe
    columns: list[Column]  # each a model, a dataset and a sparsity
    # (row, column) -> seed -> first score on the test split, or on validation while test is unopened
    scores: dict[tuple[str, Column], dict[int, float]]
    costs: dict[tuple[str, Column], float] = field(default_factory=dict)  # (row, column) -> FLOPs of a run in `unit`
    seeds: int = 1  # the largest number of seeds of an entry
    split: str = "test"  # test, or validation as long as a run is untested
    unpruned: frozenset[str] = frozenset()  # rows that keep every weight
    metrics: Mapping[str, str] = field(default_factory=dict)  # dataset -> name of its first score
    # (row, column) -> number of planned seeds, if there is a recipe; entries missing from it are not planned
    own: Mapping[tuple[str, Column], int] = field(default_factory=dict)
    unit: str = BESIDE  # unit of costs: those of the dense rows, or 10^15 FLOPs if there are none
    given: frozenset[str] = frozenset()  # rows that train existing tickets
    removed: Mapping[str, float] = field(default_factory=dict)  # row of low rank -> least share of weights removed

    def factor(self, columns: Sequence[Column]) -> float | None:
        """Return the factor of scores in these columns: 100 for points, 1 for losses; None if there are both."""
        kinds = {1.0 if self.metrics.get(dataset) == LOSS else 100.0 for _, dataset, _ in columns}
        return max(kinds, default=100.0) if len(kinds) < 2 else None

    def is_pruned(self, row: str, columns: Sequence[Column]) -> bool:
        """Return True if a row is pruned in these columns: one of low rank where it removes at least their sparsity."""
        return row not in self.unpruned and all((c[2] or 0.0) <= self.removed.get(row, 1.0) for c in columns)

    def expected_scores(self, row: str, columns: Sequence[Column]) -> int:
        """Return the number of scores planned for a row in these columns."""
        return sum(self.own.get((row, column), 0 if self.own else self.seeds) for column in columns)


def score_table(records: Sequence[Record], planned: Sequence[tuple[str, Column, int]] = ()) -> ScoreTable:
    """Return the scores of these records; a dense row appears in all columns of its model and dataset.

    `planned` are (row, column, seed) of all trials, so that unfinished rows, columns and seeds appear as missing.
    """
    split = "test" if records and all(record["test"] for record in records) else "validation"
    places = [(r["model"], r["dataset"], r["asked"]) for r in records]
    known = dict.fromkeys([*(place for _, place, _ in planned), *places])
    pruned = [place for place in known if place[2] is not None]
    bare = [p for p in known if p[2] is None and not any(q[:2] == p[:2] for q in pruned)]
    columns: list[Column] = [*pruned, *bare]
    scores: dict[tuple[str, Column], dict[int, float]] = {}
    flops: dict[tuple[str, Column], dict[int, float]] = {}
    for record, place in zip(records, places, strict=True):
        total = sum(cost["flops"] for cost in record["cost"].values())
        for column in _standing_columns(place, columns):
            scores.setdefault((record["row"], column), {})[record["seed"]] = selecting_score(record, split)
            flops.setdefault((record["row"], column), {})[record["seed"]] = total
    cells = [*planned, *((r["row"], place, r["seed"]) for r, place in zip(records, places, strict=True))]
    rows = [*dict.fromkeys(row for row, _, _ in cells)]
    own = _own_seeds(planned, columns)
    seeds = max(own.values(), default=len({seed for _, _, seed in cells}))
    shares = sorted(((low["removed"], r["row"]) for r in records if (low := low_rank_of(r))), reverse=True)
    removed = {row: share for share, row in shares}  # the least of a row
    unpruned = frozenset(row for row, place, _ in cells if place[2] is None and row not in removed)
    metrics = {record["dataset"]: " and ".join(main_scores(record[split])) for record in records}
    unit = BESIDE if any(record["method"] == "dense" for record in records) else ALONE
    plain = {where: statistics.fmean(each.values()) / 1e15 for where, each in flops.items()}
    costs = _relative_flops(records, flops) if unit == BESIDE else plain
    given = frozenset(record["row"] for record in records if record["method"] == "ticket")
    return ScoreTable(rows, columns, scores, costs, seeds, split, unpruned, metrics, own, unit, given, removed)


def _standing_columns(place: Column, columns: Sequence[Column]) -> list[Column]:
    """Return the columns of a trial: its own, or for one without a sparsity all of its model and dataset."""
    return [c for c in columns if c == place or (place[2] is None and c[:2] == place[:2])]


def _own_seeds(planned: Sequence[tuple[str, Column, int]], columns: Sequence[Column]) -> dict[tuple[str, Column], int]:
    """Return (row, column) -> number of seeds in the recipe."""
    found: dict[tuple[str, Column], set[int]] = {}
    for row, place, seed in planned:
        for column in _standing_columns(place, columns):
            found.setdefault((row, column), set()).add(seed)
    return {where: len(seeds) for where, seeds in found.items()}


def selecting_score(record: Record, split: str) -> float:
    """Return the first score on a split; its mean over several test sets."""
    return statistics.fmean(main_scores(record[split]).values())


def _relative_flops(
    records: Sequence[Record], flops: Mapping[tuple[str, Column], dict[int, float]]
) -> dict[Any, float]:
    """Return the FLOPs relative to the cheapest row of method dense in the same column."""
    dense = {record["row"] for record in records if record["method"] == "dense"}
    found = {}
    for (row, column), values in flops.items():
        shares = [_paired_share(values, flops[other, column]) for other in dense if (other, column) in flops]
        if shares:
            found[row, column] = max(shares)
    return found


def _paired_share(values: Mapping[int, float], beside: Mapping[int, float]) -> float:
    """Return the ratio of means over common seeds: seeds differ in padding, by a tenth if T is short."""
    seeds = values.keys() & beside.keys()
    one, other = (statistics.fmean(v for s, v in each.items() if not seeds or s in seeds) for each in (values, beside))
    return one / other


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


def scores_of_row(found: ScoreTable, row: str, columns: Sequence[Column]) -> dict[tuple[Column, int], float]:
    """Return (column, seed) -> score of a row."""
    return {(c, seed): value for c in columns for seed, value in found.scores.get((row, c), {}).items()}


def format_entry(values: Mapping[Any, float], seeds: int, factor: float = 100.0) -> str:
    """Format mean and standard deviation in points, or of a loss with three digits; missing seeds are marked.

    Unplanned entries are empty.
    """
    if not values:
        return "missing" if seeds else OPEN
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
        form = ".2f" if found.unit == BESIDE else ".3g"
        name = f"{row} ({format_percent(found.removed[row])} removed by rank)" if row in found.removed else row
        rows.append([name, *cells, format(statistics.fmean(costs), form) if costs else "missing"])
        bold |= {(i, k + 1) for k, name in enumerate(best) if name == row}
    return ["method", *heads, found.unit], rows, bold


def _format_scores_of(found: ScoreTable, row: str, group: Sequence[Column]) -> str:
    values, factor = scores_of_row(found, row, group), found.factor(group)
    if factor is None:
        return OPEN  # a mean of losses and points means nothing
    if len(group) == 1:
        by_seed = {seed: value for (_, seed), value in values.items()}
        return format_entry(by_seed, found.expected_scores(row, group), factor)
    if not all(found.expected_scores(row, [column]) for column in group):
        return OPEN
    everywhere = set.intersection(*({seed for c, seed in values if c == column} for column in group))
    means = {s: statistics.fmean(values[column, s] for column in group) for s in sorted(everywhere)}
    most = max(found.expected_scores(row, [column]) for column in group)
    return format_entry(means, most, factor) if len(values) == found.expected_scores(row, group) else "missing"


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
