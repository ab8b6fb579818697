"""Figures of the documents, the same bytes for the same data."""

import contextlib
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from curve import BACKENDS
from sparsesoup.exports.benchmark.backends import BACKENDS as LABELS
from sparsesoup.study.results.html import spread_labels
from tables import DOCUMENTS, ROOT, Runs, mean_flops, read_results, scores_by_seed, speed_of, whole_rows

GOAL = 2.0  # times as fast


@contextlib.contextmanager
def saved_axes(path: Path, title: str, widths: tuple[int, ...] = (1,), height: float = 3.8) -> Iterator[Any]:
    """Provide axes, or some side by side of these relative widths; save them to an SVG file at the end."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "sparsesoup", "font.size": 10})
    from matplotlib import pyplot

    shape = {"width_ratios": widths}
    shown, drawn = pyplot.subplots(1, len(widths), figsize=(6.4, height), sharey=True, gridspec_kw=shape)
    shown.suptitle(title)
    for each in shown.axes:
        each.spines[["top", "right"]].set_visible(False)
    yield drawn
    shown.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    shown.savefig(path, metadata={"Date": None})
    pyplot.close(shown)


def draw_scores(recipe: dict[str, Any], rows: Runs, path: Path) -> None:
    """Draw the rows by their test score, and beside it what each cost."""
    dense = mean_flops(rows["dense"])
    tests = {name: [*scores_by_seed(runs, "test").values()] for name, runs in rows.items()}
    order = sorted(rows, key=lambda name: statistics.mean(tests[name]))
    title = f"{recipe['datasets']}, sparsity {recipe['sparsities']}, {len(recipe['seeds'])} seeds"
    with saved_axes(path, title, widths=(3, 2), height=1.4 + 0.19 * len(rows)) as (score, cost):
        for y, name in enumerate(order):
            colour = "C3" if name.startswith("isp") else "C7" if name.startswith("dense") else "C0"
            error = 100 * statistics.stdev(tests[name]) if len(tests[name]) > 1 else 0.0
            score.errorbar(100 * statistics.mean(tests[name]), y, xerr=error, fmt="o", capsize=2.5, color=colour)
            times = mean_flops(rows[name]) / dense
            cost.barh(y, times, height=0.6, color=colour)
            place = {"xytext": (3, 0), "textcoords": "offset points"}
            cost.annotate(f"{times:.2f}", (times, y), **place, fontsize=7, va="center")
        score.set_yticks(range(len(order)), order, fontsize=8)
        score.grid(axis="y", color="0.92")
        score.set(xlabel="test score, points", ylim=(-0.7, len(order) - 0.3))
        cost.set(xlabel="cost, FLOPs of all steps\nand scoring (dense = 1)")
        cost.margins(x=0.2)


def draw_curve(recipe: dict[str, Any], rows: Runs, path: Path) -> None:
    """Draw test score over measured speed, a point a row, on the first backend that all rows were timed on."""
    backend = next((name for name in BACKENDS if all(speed_of(runs, name) for runs in rows.values())), None)
    if backend is None:
        return
    kinds = [*dict.fromkeys(row.partition("-")[0] for row in rows)]  # a colour for each first word of a row
    points: dict[str, tuple[float, float]] = {}
    title = f"{recipe['datasets']}, T = {recipe['steps']:,}, {len(recipe['seeds'])} seeds"
    with saved_axes(path, title) as drawn:
        for row, runs in rows.items():
            test = [100 * score for score in scores_by_seed(runs, "test").values()]
            points[row] = (speed_of(runs, backend) or 0.0, statistics.mean(test))
            error = statistics.stdev(test) if len(test) > 1 else 0.0
            drawn.errorbar(*points[row], yerr=error, fmt="o", capsize=3, color=f"C{kinds.index(row.partition('-')[0])}")
        drawn.axvline(GOAL, linestyle=":", color="grey")
        drawn.set(xlabel=f"times as fast as dense, {LABELS[backend].label}", ylabel="test score, points")
        low, high = drawn.get_ylim()
        for name, y in spread_labels(points, (high - low) / 22).items():
            place = {"xytext": (6, 0), "textcoords": "offset points"}
            drawn.annotate(name, (points[name][0], y), **place, fontsize=8, va="center")


def main() -> None:
    shown = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    for name, result in read_results().items():
        figure = Path("figures") / f"{name}.svg"
        if "runs" in result and str(figure) in shown:
            draw = draw_scores if "sparsities" in result["recipe"] else draw_curve
            draw(result["recipe"], whole_rows(result), ROOT / "docs" / figure)


if __name__ == "__main__":
    main()
