"""Quality against measured speed: the runs of an experiment, cut compact and timed against their dense form.

    python benchmarks/curve.py benchmarks/experiments/curve-mrpc.yaml
    python benchmarks/curve.py benchmarks/experiments/curve-mrpc.yaml --time        # what was drawn, on a quiet machine
    python benchmarks/curve.py benchmarks/experiments/curve-mrpc.yaml --steps 20    # a trial, into scratch/

A row is a method at a sparsity, with the settings that differ from its defaults. It is drawn by `prune` and scored on
the test split once. A cell that the result holds is not done again, and a killed one goes on; start it twice to use
two cores. Timings want both for themselves, so they are a command of their own, which can be repeated.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from drawing import axes, label
from sparsesoup.exports.benchmark import BenchmarkConfig, run_benchmark
from sparsesoup.exports.benchmark.backends import BACKENDS
from sparsesoup.runs.results import machine_name
from sparsesoup.study.results.tables import format_entry, paired_interval
from study import add, cells, do, finished, read

HERE = Path(__file__).parent
ON = ("torch", "onnxruntime")
GOAL = 2.0  # times as fast


def timed(run: Path, threads: int, rounds: int) -> dict[str, Any]:
    """What a cell holds of its run's speed: by runtime, how many times as fast as dense it is, cut compact."""
    how = BenchmarkConfig(batch=32, length=128, threads=threads, rounds=rounds, backends=ON)
    (table,) = run_benchmark([run], how)
    best = {row["on"]: row for row in table["rows"]}  # the smallest form of a run is measured last
    speed = {name: {key: row[key] for key in ("form", "faster", "quartiles", "promise")} for name, row in best.items()}
    facts = {key: table[key] for key in ("batch", "length", "threads", "rounds", "notes", "failed")}
    return {"timed": {**facts, "on": machine_name()}, "speed": speed}


def is_one(result: dict[str, Any]) -> bool:
    """Whether a result is a curve: its rows have a sparsity each, not one in common."""
    return "sparsity" not in result["study"]


def seeds_of(result: dict[str, Any], row: str) -> dict[int, dict[str, Any]]:
    """Seed -> the row's cell, of those that are there."""
    return {c["seed"]: c for c in result["cells"] if c["row"] == row and not c.get("missing")}


def scores(cells: dict[int, dict[str, Any]], split: str) -> dict[int, float]:
    """Seed -> the score in points."""
    return {seed: 100 * next(iter(cell[split].values())) for seed, cell in cells.items()}


def times(cells: dict[int, dict[str, Any]], on: str) -> float | None:
    """How many times as fast as dense, the mean over seeds; None if none was timed."""
    found = [cell["speed"][on]["faster"] for cell in cells.values() if on in cell.get("speed", {})]
    return statistics.mean(found) if found else None


def points(result: dict[str, Any]) -> list[str]:
    """The curve as a Markdown table: mean scores in points, distance from dense on test paired by seed, speed."""
    labels = [BACKENDS[on].label for on in ON]
    lines = [
        f"| row | pruned | validation | test | against dense | {' | '.join(f'times as fast, {x}' for x in labels)} |"
    ]
    lines.append("|---" * (5 + len(ON)) + "|")
    dense, whole = scores(seeds_of(result, "dense"), "test"), len(result["study"]["seeds"])
    for row in result["study"]["rows"]:
        cells = seeds_of(result, row)
        if not cells:
            lines.append(f"| {row} " + "| missing " * (4 + len(ON)) + "|")
            continue
        test, validation = scores(cells, "test"), scores(cells, "validation")
        mean, half, pairs = paired_interval(test, dense)
        apart = f"{mean:+.1f} ± {half:.1f}" if pairs > 1 and row != "dense" else "-"
        gone = 100 * statistics.mean(cell["sparsity"]["reached"] for cell in cells.values())
        fast = [f"{speed:.2f}" if (speed := times(cells, on)) else "not timed" for on in ON]
        shown = [format_entry({s: v / 100 for s, v in split.items()}, whole) for split in (validation, test)]
        lines.append(f"| {row} | {gone:.1f} % | {' | '.join([*shown, apart, *fast])} |")
    return lines


def figure(result: dict[str, Any], path: Path) -> None:
    """Test score over measured speed, a point a row, on the first runtime that all were timed on."""
    study, found = result["study"], {row: seeds_of(result, row) for row in result["study"]["rows"]}
    on = [name for name in ON if all(times(cells, name) for cells in found.values())]
    if not on:
        return
    kinds = [*dict.fromkeys(row.partition("-")[0] for row in found)]  # a colour for each first word of a row
    place: dict[str, tuple[float, float]] = {}
    with axes(path, f"{study['dataset']}, T = {study['steps']:,}, {len(study['seeds'])} seeds") as drawn:
        for row, cells in found.items():
            test = [*scores(cells, "test").values()]
            place[row] = (times(cells, on[0]) or 0.0, statistics.mean(test))
            error = statistics.stdev(test) if len(test) > 1 else 0.0
            drawn.errorbar(*place[row], yerr=error, fmt="o", capsize=3, color=f"C{kinds.index(row.partition('-')[0])}")
        drawn.axvline(GOAL, linestyle=":", color="grey")
        drawn.set(xlabel=f"times as fast as dense, {BACKENDS[on[0]].label}", ylabel="test score, points")
        label(drawn, place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "scratch")
    parser.add_argument("--threads", type=int, default=1, help="one is fastest to draw; take all to time")
    parser.add_argument("--rounds", type=int, default=11, help="pairs of answers that a speed is told from")
    parser.add_argument("--seed", type=int, help="this one alone; by default all of the study")
    parser.add_argument("--time", action="store_true", help="time the cells that are there, and draw none")
    parser.add_argument("--steps", type=int, help="a trial of so many steps and one seed; its result goes to --out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = read(options.study)
    result = HERE / "results" / f"{options.study.stem}.json"
    if options.steps:
        study |= {"steps": options.steps, "seeds": study["seeds"][:1]}
        result = options.out / f"{options.study.stem}-trial.json"
    for row, own, seed in sorted(cells(study), key=lambda cell: cell[2]):  # all points early, of one seed
        there = finished(study, result).get((row, seed))
        if options.seed not in (None, seed):
            continue
        if options.time and there:
            add(study, result, there | timed(options.out / there["run"], options.threads, options.rounds))
        elif not options.time and not there:
            do(study, result, (row, own, seed), options.out)
    add(study, result, None)
    print("\n".join(points(json.loads(result.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
