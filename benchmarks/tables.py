"""Redraw every table of README and docs from benchmarks/results/: `make tables`. Needs no GPU.

A table in the documents comes from here and nowhere else: what stands between `<!-- NAME -->` and `<!-- end -->` is
replaced. A result with runs is the `study.json` of a study, copied here.
"""

import json
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cells import cell_rows, comparisons, complete_cells
from curve import BACKENDS
from kinds import KINDS, markdown
from sparsesoup.exports.benchmark.backends import BACKENDS as LABELS
from sparsesoup.study.results.scores import selecting_score
from sparsesoup.study.results.tables import format_entry, paired_interval

HERE = Path(__file__).parent
ROOT = HERE.parent
PUBLISHED = ("dense", "random", "magnitude", "snip", "grasp", "gradual", "early-bird", "lottery-pools", "imp",
             "imp-rewind", "isp-no-soup", "isp")  # rows of the tables of the ISP paper  # fmt: skip
SAME_COST = 1.02  # at most, over a dense run's: validation and a few batches for a score are within it
EQUAL = "-equal"  # ends the name of a result whose rows are cut down to one training
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
Runs = dict[str, list[dict[str, Any]]]  # row -> its runs


def read_results() -> dict[str, dict[str, Any]]:
    """Return name -> result; beside rows that are cut down to one training stand those that cost no more anyway."""
    paths = sorted((HERE / "results").glob("*.json"))
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    for name in (name for name in found if name.endswith(EQUAL)):
        found[name] = _at_one_cost(found[name.removesuffix(EQUAL)], found[name])
    return found


def _at_one_cost(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    rows = whole_rows(base)
    most = SAME_COST * mean_flops(rows["dense"])
    cheap = {name: None for name, runs in rows.items() if mean_flops(runs) <= most}
    runs = [run for run in base["runs"] if run["row"] in cheap.keys() - own["recipe"]["methods"].keys()]
    return {"recipe": own["recipe"] | {"methods": cheap | own["recipe"]["methods"]}, "runs": runs + own["runs"]}


def rows_of(result: Mapping[str, Any]) -> Runs:
    """Return row -> its runs, for every row of the recipe."""
    return {row: [run for run in result["runs"] if run["row"] == row] for row in result["recipe"]["methods"]}


def whole_rows(result: Mapping[str, Any]) -> Runs:
    """Return the rows with all seeds."""
    return {row: runs for row, runs in rows_of(result).items() if len(runs) == len(result["recipe"]["seeds"])}


def scores_by_seed(runs: Iterable[Mapping[str, Any]], split: str) -> dict[int, float]:
    """Return seed -> first score on a split."""
    return {run["seed"]: selecting_score(run, split) for run in runs}


def mean_flops(runs: Iterable[Mapping[str, Any]]) -> float:
    """Return the FLOPs of a run, all labels together."""
    return statistics.mean(sum(cost["flops"] for cost in run["cost"].values()) for run in runs)


def speed_of(runs: Iterable[Mapping[str, Any]], backend: str) -> float | None:
    """Return how many times as fast as dense a row is; None if no run was timed."""
    found = [run["speed"][backend]["faster"] for run in runs if backend in run.get("speed", {})]
    return statistics.mean(found) if found else None


def score_rows(result: Mapping[str, Any], rows: Runs) -> str:
    """Return the table of these rows of a study."""
    seeds, dense = len(result["recipe"]["seeds"]), rows.get("dense")
    table = []
    for name, runs in rows.items():
        scores = [format_entry(scores_by_seed(runs, split), seeds) for split in ("validation", "test")]
        steps = [sum(cost["steps"] for cost in run["cost"].values()) for run in runs]
        cost = f"{mean_flops(runs) / mean_flops(dense):.2f}" if runs and dense else "missing"
        table.append([name, *scores, f"{statistics.mean(steps):.0f}" if steps else "missing", cost])
    return markdown(["method", "validation", "test", "steps", "FLOPs (dense = 1)"], table)


def verdicts(result: Mapping[str, Any], ours: str) -> str:
    """Return how far a row is from the others on test, paired by seed; within Student's 95 % it is noise."""
    lines, tests = [], {row: scores_by_seed(runs, "test") for row, runs in rows_of(result).items()}
    for name in [name for name in tests if name != ours]:
        mean, half, pairs = paired_interval(tests[ours], tests[name])
        if pairs > 1:
            word = "noise" if abs(mean) <= half else "better" if mean > 0 else "worse"
            points = f"{100 * mean:+.1f} ± {100 * half:.1f} points over {pairs} seeds"
            lines.append(f"- {ours} against {name}: {points}: {word}")
    return "\n".join(lines)


def curve_rows(result: Mapping[str, Any]) -> str:
    """Return quality against speed: mean scores, distance from dense on test paired by seed, times as fast as dense."""
    rows, seeds = rows_of(result), len(result["recipe"]["seeds"])
    heads = ["row", "pruned", "validation", "test", "against dense"]
    heads += [f"times as fast, {LABELS[backend].label}" for backend in BACKENDS]
    table = []
    for row, runs in rows.items():
        if not runs:
            table.append([row, *["missing"] * (len(heads) - 1)])
            continue
        mean, half, pairs = paired_interval(scores_by_seed(runs, "test"), scores_by_seed(rows["dense"], "test"))
        apart = f"{100 * mean:+.1f} ± {100 * half:.1f}" if pairs > 1 and row != "dense" else "-"
        gone = f"{100 * statistics.mean(run['sparsity']['reached'] for run in runs):.1f} %"
        fast = [f"{speed:.2f}" if (speed := speed_of(runs, backend)) else "not timed" for backend in BACKENDS]
        scores = [format_entry(scores_by_seed(runs, split), seeds) for split in ("validation", "test")]
        table.append([row, gone, *scores, apart, *fast])
    return markdown(heads, table)


def pieces() -> dict[str, str]:
    """Return marker -> the text behind it, of every committed result."""
    found: dict[str, str] = {}
    for name, result in read_results().items():
        if "runs" not in result:
            found[name] = next(draw for key, draw in KINDS.items() if key in result)(result)
        elif "sparsities" not in result["recipe"]:  # a curve: each row has its own
            found[name] = curve_rows(result)
        else:
            rows = whole_rows(result)
            found[name], found[f"{name}-whole"] = score_rows(result, rows_of(result)), score_rows(result, rows)
            found[f"{name}-published"] = score_rows(result, {row: rows[row] for row in PUBLISHED if row in rows})
            found |= {f"{name}-{row}-verdicts": verdicts(result, row) for row in result["recipe"]["methods"]}
            if len(complete_cells(result)) > 1:
                found[f"{name}-cells"] = markdown(*cell_rows(result))
                found |= {f"{name}-{row}-comparisons": comparisons(result, row) for row in result["recipe"]["methods"]}
    return found


def redrawn(text: str, found: dict[str, str]) -> str:
    """Return a document with every piece in its place."""
    for name, piece in found.items():
        between = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = between.sub(lambda m, piece=piece: f"{m.group(1)}{piece}\n{m.group(2)}", text)
    return text


def main() -> None:
    found = pieces()
    for document in DOCUMENTS:
        document.write_text(redrawn(document.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"redrew the tables of {len(DOCUMENTS)} documents")


if __name__ == "__main__":
    main()
