"""The scores of a study by row and column: what is planned, done and failed, and what it cost."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsesoup.core.low_rank import low_rank_of
from sparsesoup.report.terminal import main_scores

Record = Mapping[str, Any]
Column = tuple[str, str, float | None]  # model, dataset, target sparsity; None for dense rows
PlannedRun = tuple[str, Column, int]  # row, column, seed
LOSS = "negative_loss"  # the score of runs without metrics; it is no share, so it is not in points
RELATIVE_FLOPS, ALONE = "FLOPs (dense = 1)", "PFLOP"  # units of cost: with a dense row, and without one


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
    unit: str = RELATIVE_FLOPS  # unit of costs: those of the dense rows, or 10^15 FLOPs if there are none
    given: frozenset[str] = frozenset()  # rows that train existing tickets
    removed: Mapping[str, float] = field(default_factory=dict)  # row of low rank -> least share of weights removed
    failed: Mapping[tuple[str, Column], int] = field(default_factory=dict)  # (row, column) -> number of failed seeds

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

    def describe_absence(self, row: str, columns: Sequence[Column]) -> str:
        """Return why a row has no score in these columns; `missing` for existing runs, which no recipe plans."""
        if not self.own:
            return "missing"
        if any(self.scores.get((row, column)) for column in columns):
            return "incomplete"
        failed = sum(self.failed.get((row, column), 0) for column in columns)
        return "failed" if failed == self.expected_scores(row, columns) else "not run yet"


def score_table(
    records: Sequence[Record], planned: Sequence[PlannedRun] = (), failed: Sequence[PlannedRun] = ()
) -> ScoreTable:
    """Return the scores of these records; a dense row appears in all columns of its model and dataset.

    `planned` are (row, column, seed) of all trials, `failed` those of trials that failed: so that a row, column or seed
    without a score says why.
    """
    split = "test" if records and all(record["test"] for record in records) else "validation"
    places = [(r["model"], r["dataset"], r["target"]) for r in records]
    known = dict.fromkeys([*(at for _, at, _ in planned), *places])
    pruned = [at for at in known if at[2] is not None]
    bare = [p for p in known if p[2] is None and not any(q[:2] == p[:2] for q in pruned)]
    columns: list[Column] = [*pruned, *bare]
    scores: dict[tuple[str, Column], dict[int, float]] = {}
    flops: dict[tuple[str, Column], dict[int, float]] = {}
    for record, at in zip(records, places, strict=True):
        total = sum(cost["flops"] for cost in record["cost"].values())
        for column in _standing_columns(at, columns):
            scores.setdefault((record["row"], column), {})[record["seed"]] = selecting_score(record, split)
            flops.setdefault((record["row"], column), {})[record["seed"]] = total
    trials = [*planned, *((r["row"], at, r["seed"]) for r, at in zip(records, places, strict=True))]
    rows = [*dict.fromkeys(row for row, _, _ in trials)]
    own = _own_seeds(planned, columns)
    seeds = max(own.values(), default=len({seed for _, _, seed in trials}))
    shares = sorted(((low["removed"], r["row"]) for r in records if (low := low_rank_of(r))), reverse=True)
    removed = {row: share for share, row in shares}  # the least of a row
    unpruned = frozenset(row for row, at, _ in trials if at[2] is None and row not in removed)
    metrics = {record["dataset"]: " and ".join(main_scores(record[split])) for record in records}
    unit = RELATIVE_FLOPS if any(record["method"] == "dense" for record in records) else ALONE
    plain = {where: statistics.fmean(each.values()) / 1e15 for where, each in flops.items()}
    costs = _relative_flops(records, flops) if unit == RELATIVE_FLOPS else plain
    given = frozenset(record["row"] for record in records if record["method"] == "ticket")
    return ScoreTable(
        rows,
        columns,
        scores,
        costs,
        seeds,
        split,
        unpruned,
        metrics,
        own,
        unit,
        given,
        removed,
        _own_seeds(failed, columns),
    )


def _standing_columns(at: Column, columns: Sequence[Column]) -> list[Column]:
    """Return the columns of a trial: its own, or for one without a sparsity all of its model and dataset."""
    return [c for c in columns if c == at or (at[2] is None and c[:2] == at[:2])]


def _own_seeds(planned: Sequence[PlannedRun], columns: Sequence[Column]) -> dict[tuple[str, Column], int]:
    """Return (row, column) -> number of seeds."""
    found: dict[tuple[str, Column], set[int]] = {}
    for row, at, seed in planned:
        for column in _standing_columns(at, columns):
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


def _paired_share(values: Mapping[int, float], reference: Mapping[int, float]) -> float:
    """Return the ratio of means over common seeds: seeds differ in padding, by a tenth if T is short."""
    seeds = values.keys() & reference.keys()
    means = [statistics.fmean(v for s, v in each.items() if not seeds or s in seeds) for each in (values, reference)]
    return means[0] / means[1]


def scores_of_row(found: ScoreTable, row: str, columns: Sequence[Column]) -> dict[tuple[Column, int], float]:
    """Return (column, seed) -> score of a row."""
    return {(c, seed): value for c in columns for seed, value in found.scores.get((row, c), {}).items()}
