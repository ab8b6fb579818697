"""Tables of a study: means, intervals and winners by another road, and their Markdown and LaTeX."""

import html
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy import stats

from sparsesoup.core.ticket import save_masks
from sparsesoup.study.compare import flatten_record
from sparsesoup.study.results.html import (
    _over_sparsity,
    compare_to_best,
    draw_page,
    pareto_front,
    spread_labels,
    study_charts,
    ticket_agreement,
)
from sparsesoup.study.results.scores import score_table
from sparsesoup.study.results.tables import (
    format_entry,
    latex_table,
    markdown_table,
    paired_interval,
    significantly_best,
    table_lines,
)

SCORES = st.lists(st.floats(0, 1), min_size=2, max_size=6)


def record(row: str, seed: int, test: float | None, asked: float | None = 0.5, **more: Any) -> dict[str, Any]:
    method = "dense" if asked is None else row
    plain: dict[str, Any] = {
        "row": row, "method": method, "model": "bert", "dataset": "d_1", "target": asked, "seed": seed,
        "validation": {"accuracy": 0.5}, "test": None if test is None else {"accuracy": test, "f1": 0.0},
        "cost": {"main": {"flops": 100}, "weak": {"flops": 50 if row == "isp" else 0}},
    }  # fmt: skip
    return plain | more


def rows(**scores: list[float]) -> list[dict[str, Any]]:
    return [
        record(row.replace("_", "-"), seed, value, None if row.startswith("dense") else 0.5)
        for row, values in scores.items()
        for seed, value in enumerate(values)
    ]


def test_losses_are_no_points_and_have_no_mean_with_them() -> None:
    """Only `negative_loss` is known to be no share; a mean of it and an accuracy means nothing."""
    loss = {"validation": {"negative_loss": -0.6931}, "test": {"negative_loss": -0.6931}, "dataset": "text"}
    losses = [record(row, 0, None) | loss for row in ("isp", "imp")]
    shares = [record(row, 0, 0.75) for row in ("isp", "imp")]
    alone, both = markdown_table(score_table(losses)), markdown_table(score_table([*losses, *shares]))
    assert "| isp | -0.693 |" in alone
    assert "Test scores: negative_loss. " in alone
    assert "| isp | -0.693 | 75.0 | - |" in both
    assert "Test scores in points, losses as they are: negative_loss of text, accuracy of d_1. " in both
    assert compare_to_best(score_table([*losses, *shares])) == []
    assert [gap["mean"] for gap in compare_to_best(score_table(losses))] == [0.0]


@given(SCORES, SCORES)
def test_the_interval_is_that_of_a_paired_t_test(one: list[float], other: list[float]) -> None:
    pairs = list(zip(one, other, strict=False))
    a, b = ({i: pair[k] for i, pair in enumerate(pairs)} for k in (0, 1))
    mean, half, count = paired_interval(a, b)
    assert count == len(pairs)
    spread = statistics.stdev(x - y for x, y in pairs)
    if spread > 1e-6:
        wanted = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.95)
        assert (mean - half, mean + half) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_one_seed_shows_nothing() -> None:
    assert paired_interval({0: 0.9}, {0: 0.1}) == (pytest.approx(0.8), math.inf, 1)
    assert (
        significantly_best(score_table(rows(isp=[0.9], magnitude=[0.1])), score_table(rows(isp=[0.9])).columns) is None
    )


def test_the_best_is_marked_only_where_it_is_more_than_noise() -> None:
    clear = score_table(rows(dense=[0.95, 0.96, 0.94], isp=[0.90, 0.91, 0.89], magnitude=[0.80, 0.81, 0.79]))
    assert significantly_best(clear, clear.columns) == "isp"
    assert "| isp | **90.0 ± 1.0** |" in markdown_table(clear)
    assert "| dense | 95.0 ± 1.0 |" in markdown_table(clear)  # no winner: it prunes nothing
    noisy = score_table(rows(isp=[0.9, 0.5, 0.7], magnitude=[0.6, 0.7, 0.5]))
    assert significantly_best(noisy, noisy.columns) is None
    assert "**" not in markdown_table(noisy)


def test_a_row_that_lacks_a_seed_is_marked_and_wins_nothing() -> None:
    found = score_table(rows(isp=[0.90, 0.91], magnitude=[0.80, 0.81, 0.79], random=[0.1, 0.1, 0.1]))
    assert "| isp | 90.5 ± 0.7 (2 of 3) |" in markdown_table(found)
    assert significantly_best(found, found.columns) is None  # nor does magnitude, which it beats on two seeds
    behind = score_table(rows(isp=[0.80, 0.805], magnitude=[0.90, 0.91, 0.89], random=[0.1, 0.1, 0.1]))
    assert significantly_best(behind, behind.columns) == "magnitude"


def test_rows_columns_and_seeds_of_which_nothing_is_done_say_why() -> None:
    column, other = ("bert", "d_1", 0.5), ("bert", "d_2", 0.5)
    planned = [(row, place, seed) for place in (column, other) for row in ("isp", "imp") for seed in (0, 1, 2)]
    found = score_table(rows(isp=[0.90, 0.91]), planned)
    heads, cells, _ = table_lines(found)
    assert heads[1:3] == ["d_1 at 50 %", "d_2 at 50 %"]
    assert cells[0] == ["isp", "90.5 ± 0.7 (2 of 3)", "not run yet", "incomplete", "1.5e-13"]
    assert cells[1] == ["imp", *["not run yet"] * 4]
    assert {gap["row"] for gap in compare_to_best(found)} == set()
    failed = [("imp", column, seed) for seed in (0, 1, 2)] + [("imp", other, 0)]
    cells = table_lines(score_table(rows(isp=[0.90, 0.91]), planned, failed))[1]
    assert cells[1] == ["imp", "failed", "not run yet", "not run yet", "not run yet"]
    existing = [*rows(isp=[0.9]), record("imp", 0, 0.5, dataset="d_2")]  # runs without a plan
    assert [row[2] for row in table_lines(score_table(existing))[1]] == ["missing", "50.0"]


def test_a_row_or_dataset_with_seeds_of_its_own_lacks_none() -> None:
    column, other = ("bert", "d_1", 0.5), ("bert", "d_2", 0.5)
    seeds = {("isp", column): (0, 1, 2), ("imp", column): (0, 1, 2), ("isp", other): (0, 1), ("imp", other): (0, 1)}
    planned = [(row, place, seed) for (row, place), own in seeds.items() for seed in own]
    scores = {"isp": 0.9, "imp": 0.5}
    done = [record(row, s, scores[row] + 0.01 * s**2, dataset=place[1]) for row, place, s in planned]
    found = score_table(done, planned)
    mean = "90.5 ± 0.7 (2 of 3)"  # of the seeds that both have
    assert table_lines(found)[1][0][1:4] == ["91.7 ± 2.1", "90.5 ± 0.7", mean]
    assert (
        significantly_best(found, [column])
        == significantly_best(found, [other])
        == significantly_best(found, found.columns)
        == "isp"
    )
    assert "over 2 to 3 seeds" in markdown_table(found)
    short = score_table(done[:-1], planned)
    assert table_lines(short)[1][1][2:4] == ["50.0 (1 of 2)", "incomplete"]
    assert significantly_best(short, [other]) is None


def test_a_place_that_nobody_asked_for_is_left_open_and_wins_nothing() -> None:
    column, other = ("bert", "d_1", 0.5), ("bert", "d_1", 0.7)
    planned = [(row, c, s) for row, c in (("isp", column), ("isp", other), ("imp", column)) for s in (0, 1)]
    done = [record(row, s, 0.9 if row == "imp" else 0.5 + 0.001 * s, place[2]) for row, place, s in planned]
    found = score_table(done, planned)
    assert table_lines(found)[1][1][1:4] == ["90.0 ± 0.0", "-", "-"]
    assert significantly_best(found, [column]) == "imp"
    assert significantly_best(found, found.columns) is None


def test_a_dense_run_and_a_seed_count_once_however_many_sparsities_they_stand_beside() -> None:
    scores = {0: (0.80, 0.70, 0.60), 1: (0.82, 0.71, 0.61), 2: (0.79, 0.75, 0.62)}
    dense = {0: 0.9, 1: 0.85, 2: 0.91}
    done = [record("isp", s, v, 0.5 + k / 10) for s, values in scores.items() for k, v in enumerate(values)]
    done += [record("imp", s, v - 0.1, 0.5 + k / 10) for s, values in scores.items() for k, v in enumerate(values)]
    done += [record("dense", s, v, None) for s, v in dense.items()]
    told = {gap["row"]: gap for gap in compare_to_best(score_table(done))}
    assert {gap["pairs"] for gap in told.values()} == {3}
    differences = [100 * (statistics.fmean(scores[s]) - dense[s]) for s in scores]
    assert told["dense"]["mean"] == pytest.approx(statistics.fmean(differences))
    width = stats.t.ppf(0.975, 2) * statistics.stdev(differences) / 3**0.5
    assert told["dense"]["half"] == pytest.approx(width)


def test_a_row_of_given_tickets_says_what_its_cost_leaves_out() -> None:
    moved = record("moved", 0, 0.5, method="ticket")
    assert "not in the row that it was given to (moved)" in markdown_table(score_table([moved, *rows(isp=[0.5])]))
    assert "given" not in markdown_table(score_table(rows(isp=[0.5])))


def test_costs_are_held_against_the_dense_runs_of_the_same_seeds() -> None:
    dense = [record("dense", s, 0.9, None, cost={"main": {"flops": 100 + 10 * s}}) for s in (0, 1, 2)]
    random = [record("random", 2, 0.1, cost={"main": {"flops": 120}})]
    assert [row[-1] for row in table_lines(score_table([*dense, *random]))[1]] == ["1.00", "1.00"]
    elsewhere = [record("random", 7, 0.1, cost={"main": {"flops": 120}})]
    assert [row[-1] for row in table_lines(score_table([*dense, *elsewhere]))[1]] == ["1.00", "1.09"]


def test_costs_are_told_beside_the_dense_row() -> None:
    found = score_table(rows(dense=[0.9, 0.9], isp=[0.8, 0.8], magnitude=[0.7, 0.7]))
    assert [row[-1] for row in table_lines(found)[1]] == ["1.00", "1.50", "1.00"]
    heads, (alone,), _ = table_lines(
        score_table([record("isp", s, 0.8, cost={"main": {"flops": 2e12 + s * 1e12}}) for s in (0, 1)])
    )
    assert (heads[-1], alone[-1]) == ("PFLOP", "0.0025")


def test_a_dense_row_stands_in_every_column_and_the_mean_is_over_columns() -> None:
    more = [record("isp", seed, 0.6 + 0.1 * seed, 0.9) for seed in (0, 1)]
    found = score_table([*rows(dense=[0.9, 0.8], isp=[0.8, 0.9]), *more])
    heads, cells, _ = table_lines(found)
    assert heads == ["method", "d_1 at 50 %", "d_1 at 90 %", "mean", "FLOPs (dense = 1)"]
    assert cells[0][1:4] == ["85.0 ± 7.1"] * 3
    assert cells[1][1:4] == ["85.0 ± 7.1", "65.0 ± 7.1", "75.0 ± 7.1"]


def test_as_long_as_a_run_is_untested_the_table_is_of_validation() -> None:
    found = score_table([record("isp", 0, 0.9), record("isp", 1, None)])
    assert found.split == "validation"
    assert found.scores["isp", found.columns[0]] == {0: 0.5, 1: 0.5}


def test_several_test_sets_count_by_their_mean() -> None:
    parts = {"matched": {"accuracy": 0.8, "f1": 0.1}, "mismatched": {"accuracy": 0.6, "f1": 0.1}}
    found = score_table([record("isp", 0, 0.0) | {"test": parts}])
    assert found.scores["isp", found.columns[0]] == {0: pytest.approx(0.7)}


def test_latex_is_escaped_and_whole() -> None:
    text = latex_table(score_table(rows(isp=[0.90, 0.91, 0.89], magnitude=[0.80, 0.81, 0.79])))
    assert r"d\_1 at 50 \%" in text
    assert r"isp & \textbf{90.0 $\pm$ 1.0} & 1.5e-13 \\" in text
    assert text.count(r"\\") == 3
    assert text.startswith(r"\begin{tabular}{lrr}")


def test_any_name_of_a_row_leaves_the_tables_whole() -> None:
    found = score_table([record(r"a|b^2~{c}\d<e>", seed, 0.5 + 0.1 * seed) for seed in (0, 1)])
    assert r"a\textbar{}b\textasciicircum{}2\textasciitilde{}\{c\}\textbackslash{}d\textless{}e\textgreater{} &" in (
        latex_table(found)
    )
    assert r"| a\|b^2\~{c}\\d&lt;e&gt; |" in markdown_table(found)


def test_no_line_of_a_latex_table_begins_with_what_the_one_before_takes_for_an_option() -> None:
    for name in ("[tuned] isp", "*", " [2pt]"):
        found = latex_table(score_table([*rows(dense=[0.9]), record(name, 0, 0.5), record("isp", 0, 0.6)]))
        assert f"\n{{}}{name} & " in found
        assert not re.search(r"^\s*[\[*]", found, re.MULTILINE)


def test_sparsities_that_differ_are_told_apart() -> None:
    found = score_table([record("isp", 0, 0.5, asked) for asked in (0.9, 0.905, 0.07)])
    assert table_lines(found)[0][1:4] == ["d_1 at 90 %", "d_1 at 90.5 %", "d_1 at 7 %"]
    assert "90 \\% & 90.5 \\% & 7 \\%" in latex_table(found)


def test_the_row_that_others_are_held_against_stands_in_most_columns() -> None:
    easy = [record("easy", seed, 0.95 + 0.01 * seed) for seed in (0, 1)]  # at 0.5 alone, where all are good
    both = [record("isp", s, x - 0.01 * s, asked) for s in (0, 1) for asked, x in ((0.5, 0.9), (0.9, 0.4))]
    assert {gap["best"] for gap in compare_to_best(score_table([*easy, *both]))} == {"isp"}


def test_entries_are_in_points() -> None:
    assert format_entry({}, 3) == "missing"
    assert format_entry({0: 0.5}, 1) == "50.0"
    assert format_entry({0: 0.5}, 3) == "50.0 (1 of 3)"


def test_the_verdicts_of_the_page_have_the_sign_of_the_difference() -> None:
    found = score_table(rows(dense=[0.95, 0.96, 0.94], isp=[0.90, 0.91, 0.89], magnitude=[0.80, 0.81, 0.79]))
    told = {gap["row"]: gap for gap in compare_to_best(found)}
    assert {row: gap["word"] for row, gap in told.items()} == {"dense": "worse", "magnitude": "better"}
    assert told["magnitude"]["mean"] == pytest.approx(10.0)


@given(st.dictionaries(st.text("abc", max_size=3), st.tuples(st.floats(0.1, 9), st.floats(0, 1)), min_size=1))
def test_nothing_beats_the_front_and_all_else_is_beaten(points: dict[str, tuple[float, float]]) -> None:
    best = pareto_front(points)
    for row, (cost, quality) in points.items():
        beaten = any((c <= cost and q > quality) or (c < cost and q >= quality) for c, q in points.values())
        twin = any(points[other] == (cost, quality) for other in best if other != row)
        assert (row in best) == (not beaten and not twin)


@given(st.dictionaries(st.text("abcd", max_size=3), st.tuples(st.floats(0.5, 4), st.floats(0, 1)), min_size=1))
def test_names_of_neighbouring_points_are_apart_and_never_below_them(points: dict[str, tuple[float, float]]) -> None:
    found = spread_labels(points, 0.1)
    assert found.keys() == points.keys()
    for one, y in found.items():
        assert y >= points[one][1]
        for other, z in found.items():
            if one != other and abs(math.log(points[one][0] / points[other][0])) < 0.1:
                assert abs(y - z) >= 0.1 - 1e-9


def test_the_page_draws_what_each_two_tickets_share(tmp_path: Path) -> None:
    keep = {"imp": {0, 1, 2}, "isp": {1, 2, 3}, "snip": {3, 4, 5}}
    for row, places in keep.items():
        save_masks(tmp_path / row, {"w": torch.tensor([k in places for k in range(6)])}, {})
    records = [record(row, 0, 0.5, run=row) for row in keep]
    found = score_table([*records, record("gone", 0, 0.5, run="gone")])  # its ticket is no longer there
    pairs = ticket_agreement(found, records, tmp_path)
    told = {(pair["one"], pair["other"]): pair["share"] for pair in pairs}
    assert told == pytest.approx({("imp", "isp"): 2 / 4, ("imp", "snip"): 0.0, ("isp", "snip"): 1 / 5})
    assert [pair["chance"] for pair in pairs] == pytest.approx([(1 / 4) / (3 / 4)] * 3)  # p q / (p + q - p q) of halves
    (drawn,) = (chart for chart in study_charts(found, [], pairs) if "share" in chart["title"])
    assert drawn["title"] == "Weights that two tickets share, %: d_1 at 50 %"
    words = re.findall(r">([^<>]+)</text>", drawn["svg"])
    assert sorted(words) == sorted([*keep, *keep, *2 * ["50", "0", "20"]])


def drawn_names(svg: str) -> dict[str, tuple[float, float]]:
    """The words of a chart -> where they begin, as shares of its width and height."""
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert found
    width, height = map(float, found.groups())
    words = re.findall(r'<text [^>]*?(?:translate\(| x=")([-\d.]+)(?: |" y=")([-\d.]+)[^>]*>([^<]+)</text>', svg)
    return {html.unescape(word): (float(x) / width, float(y) / height) for x, y, word in words}


@pytest.mark.filterwarnings("error:constrained_layout")
def test_every_row_of_a_long_study_has_its_name_inside_the_charts() -> None:
    names = ["_tuned", *(f"row {i}" for i in range(34)), "imp of four rounds, each of which trains for a third of T"]
    more = {"cost": {"main": {"flops": 100}}, "matrices": []}
    records = [
        record(row, 0, 0.5 + i / 100, asked, **more) for i, row in enumerate(names) for asked in (0.5, 0.9)
    ] + [record("dense", 0, 0.9, None, **more)]  # fmt: skip
    quality = [chart for chart in study_charts(score_table(records), []) if chart["title"].startswith("Quality")]
    assert len(quality) == 3
    for chart in quality:
        places = drawn_names(chart["svg"])
        assert places.keys() >= {*names[:-1], "dense", "imp of four roun…or a third of T"}
        assert all(0 <= x < 1 and 0 < y <= 1 for x, y in places.values())


def test_a_point_of_the_front_is_not_hidden_by_one_of_the_same_cost_and_quality() -> None:
    records = [record(row, 0, 0.8, asked, cost={"main": {"flops": 100}}, matrices=[])
               for row, asked in (("dense", None), ("isp", 0.5), ("imp", 0.5))]  # fmt: skip
    (chart,) = study_charts(score_table(records), [])
    red, blue = (chart["svg"].rindex(colour) for colour in ("#d62728", "#1f77b4"))
    assert red > blue


def test_the_page_breaks_long_paths_of_a_failed_run_and_counts_in_words(tmp_path: Path) -> None:
    records = [record("dense", 0, 0.5, None, run="dense", sparsity={"reached": 0.0}, seconds=1.0)]
    failed = {"run": "imp", "error": f"no such file: /{'x' * 300}"}
    page = draw_page("small", score_table(records), records, tmp_path, {"failed": [failed]})
    assert "<b>1 run failed</b> and has no score" in page
    assert "small: 1 method, 1 run, scored on test" in page
    assert "li { overflow-wrap: anywhere; }" in page


def thin(scores: list[float], removed: float = 0.6) -> list[dict[str, Any]]:
    """The records of a row of low rank, which stands in no column of its own."""
    low = {"compression": 2.0, "weights": 100, "left": round(100 * (1 - removed)), "removed": removed}
    notes = {"method": "pela", "notes": {"low_rank": low}}
    return [record("pela", seed, value, None) | notes for seed, value in enumerate(scores)]


def test_a_row_of_low_rank_is_pruned_by_the_share_that_it_removes() -> None:
    """It is compared with rows of at most that sparsity, shown beside all, and drawn where it belongs."""
    worse = rows(dense=[0.99, 0.98, 0.97], isp=[0.80, 0.81, 0.79])
    sparser = [record("isp", seed, 0.5 + 0.01 * seed, 0.9) for seed in range(3)]
    found = score_table([*worse, *sparser, *thin([0.90, 0.91, 0.89])])
    text = markdown_table(found)
    assert found.unpruned == {"dense"}
    assert "| pela (60.0 % removed by rank) | **90.0 ± 1.0** | 90.0 ± 1.0 | 90.0 ± 1.0 |" in text
    assert "A row of low rank counts as pruned in the columns whose sparsity is at most" in text
    assert "low rank" not in markdown_table(score_table(worse))
    assert compare_to_best(found) == []  # isp alone is pruned as far as the last column
    half = score_table([*worse, *thin([0.90, 0.91, 0.89])])
    assert {gap["row"]: gap["word"] for gap in compare_to_best(half)} == {"dense": "worse", "isp": "better"}
    figure = Figure()
    _over_sparsity(figure, found, found.columns)
    drawn = [list(line.get_xdata()) for line in figure.axes[0].lines]
    assert sorted(map(tuple, drawn)) == [(50.0, 90.0), (50.0, 90.0), (60.0,)]
    assert (
        flatten_record(
            thin([0.9])[0]
            | {"steps": 6, "sparsity": {"reached": 0.0, "kept": 9}, "run": "r", "command": "c", "cost": {}}
        )["removed_by_rank"]
        == 0.6
    )
    latex = latex_table(found)
    assert latex.index("dense") < latex.index(r"\midrule", latex.index("dense")) < latex.index("isp")
    assert r"pela (60.0 \% removed by rank)" in latex


def test_a_row_of_low_rank_names_the_least_share_of_its_models() -> None:
    two = [*thin([0.9], 0.62), *[r | {"model": "vit"} for r in thin([0.8], 0.6)]]
    assert "| pela (60.0 % removed by rank) |" in markdown_table(score_table(two))
