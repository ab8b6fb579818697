"""Tables of a study with several cells (a dataset at a sparsity): means, rows level with the best, ranks, tests."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from sparsesoup.study.results.scores import selecting_score
from sparsesoup.study.results.tables import paired_interval

LEVEL = 0.005  # at most below the best mean of a cell
COUNTS = 0.03  # a cell counts where dense is at least this much above random on validation
UNRANKED = ("dense",)  # rows that prune nothing
Cell = tuple[str, float]  # dataset, sparsity
Scores = dict[str, dict[Cell, dict[int, float]]]  # row -> cell -> seed -> score


def scores_by_cell(result: Mapping[str, Any], split: str) -> Scores:
    """Return the first score of every run; a dense run stands in every cell of its dataset."""
    cells = sorted({(run["dataset"], run["target"]) for run in result["runs"] if run["target"] is not None})
    found: Scores = {row: {} for row in result["recipe"]["methods"]}
    for run in result["runs"]:
        for cell in cells:
            if cell == (run["dataset"], run["target"]) or (run["target"] is None and cell[0] == run["dataset"]):
                found[run["row"]].setdefault(cell, {})[run["seed"]] = selecting_score(run, split)
    return found


def complete_cells(result: Mapping[str, Any]) -> list[Cell]:
    """Return the cells in which every row has all seeds."""
    scores, seeds = scores_by_cell(result, "test"), set(result["recipe"]["seeds"])
    known = sorted({cell for row in scores.values() for cell in row})
    return [cell for cell in known if all(set(row.get(cell, {})) == seeds for row in scores.values())]


def counted_cells(result: Mapping[str, Any]) -> list[Cell]:
    """Return the complete cells in which dense is far enough above random on validation."""
    scores = scores_by_cell(result, "validation")
    return [
        cell for cell in complete_cells(result)
        if statistics.mean(scores["dense"][cell].values()) >= statistics.mean(scores["random"][cell].values()) + COUNTS
    ]  # fmt: skip


def level_rows(scores: Scores, cell: Cell) -> list[str]:
    """Return the rows that are level with the best of a cell: its mean is near, and none is significantly above it.

    Significantly: the 95 % interval of the difference, paired by seed, is above 0.
    """
    rows = [row for row in scores if row not in UNRANKED]
    means = {row: statistics.mean(scores[row][cell].values()) for row in rows}
    best = max(rows, key=means.__getitem__)
    found = []
    for row in rows:
        mean, half, _ = paired_interval(scores[best][cell], scores[row][cell])
        if row == best or (means[best] - means[row] <= LEVEL and mean <= half):
            found.append(row)
    return found


def mean_ranks(scores: Scores, cells: Sequence[Cell]) -> dict[str, float]:
    """Return the mean rank of every row over the cells; 1 is the best, ties have the mean of their ranks."""
    rows = [row for row in scores if row not in UNRANKED]
    ranks = [stats.rankdata([-statistics.mean(scores[row][cell].values()) for row in rows]) for cell in cells]
    return {row: statistics.mean(float(rank[i]) for rank in ranks) for i, row in enumerate(rows)}


def cell_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return (heads, rows) of the table of means on test; level entries are bold."""
    scores, cells, counted = scores_by_cell(result, "test"), complete_cells(result), counted_cells(result)
    level = {cell: level_rows(scores, cell) for cell in cells}
    ranks = mean_ranks(scores, counted) if counted else {}
    heads = ["method", *(f"{data.removeprefix('glue/')} {100 * share:.0f} %" for data, share in cells)]
    table = []
    for row in scores:
        entries = []
        for cell in cells:
            values = [100 * value for value in scores[row][cell].values()]
            text = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
            entries.append(f"**{text}**" if row in level[cell] else text)
        times = sum(row in level[cell] for cell in counted)
        summary = ["", ""] if row in UNRANKED else [f"{times} of {len(counted)}", f"{ranks.get(row, 0.0):.1f}"]
        table.append([row, *entries, *summary])
    return [*heads, "best or level", "mean rank"], table


def comparisons(result: Mapping[str, Any], ours: str) -> str:
    """Return how far a row is from the others over the means of the counted cells, by Wilcoxon's signed-rank test."""
    scores, cells, lines = scores_by_cell(result, "test"), counted_cells(result), []
    for other in [row for row in scores if row != ours and cells]:
        gaps = [
            100 * (statistics.mean(scores[ours][c].values()) - statistics.mean(scores[other][c].values()))
            for c in cells
        ]
        p = float(stats.wilcoxon(gaps).pvalue) if any(gaps) else 1.0
        won = sum(gap > 0 for gap in gaps)
        lines.append(
            f"- {ours} against {other}: {statistics.mean(gaps):+.1f} points in the mean of {len(cells)} cells, above in"
            f" {won} (Wilcoxon's signed-rank test: p = {p:.3f})"
        )
    return "\n".join(lines)
