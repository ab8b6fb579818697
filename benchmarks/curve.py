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
import yaml

from sparsesoup import score_on_test
from sparsesoup.errors import UserError
from sparsesoup.measuring import How, measure
from sparsesoup.show import read_report
from sparsesoup.study.tables import paired
from sparsesoup.summary import machine
from study import KEPT, add, cells, draw, finished

HERE = Path(__file__).parent
ON = ("torch", "onnxruntime")


def timed(run: Path, threads: int, rounds: int) -> dict[str, Any]:
    """What a cell holds of its run's speed: by runtime, how many times as fast as dense it is, cut compact."""
    how = How(batch=32, length=128, threads=threads, rounds=rounds, on=ON)
    (table,) = measure([run], how)
    best = {row["on"]: row for row in table["rows"]}  # the smallest form of a run is measured last
    speed = {name: {key: row[key] for key in ("form", "faster", "quartiles", "promise")} for name, row in best.items()}
    facts = {key: table[key] for key in ("batch", "length", "threads", "rounds", "notes", "failed")}
    return {"timed": {**facts, "on": machine()}, "speed": speed}


def drawn(study: dict[str, Any], row: str, own: dict[str, Any], seed: int, out: Path) -> dict[str, Any]:
    """A cell: the run and its scores."""
    run = draw({**study, "sparsity": own.get("sparsity", 0.0)}, row, own, seed, out)
    score_on_test(run)
    report = read_report(run)
    return {"row": row, "seed": seed, **{key: report[key] for key in KEPT}, "run": str(run.relative_to(out))}


def points(result: dict[str, Any]) -> list[str]:
    """The curve, a line a row: mean scores in points, distance from dense on test paired by seed, times as fast."""
    there = [c for c in result["cells"] if not c.get("missing")]
    test = {(c["row"], c["seed"]): 100 * next(iter(c["test"].values())) for c in there}
    by_row = {name: {seed: v for (row, seed), v in test.items() if row == name} for name in result["study"]["rows"]}
    lines = [f"{'row':28} {'pruned':>7} {'validation':>10} {'test':>6} {'against dense':>14}  times as fast"]
    for name, own in by_row.items():
        mine = [c for c in there if c["row"] == name]
        if not mine:
            lines.append(f"{name:28} missing")
            continue
        mean, half, pairs = paired(own, by_row.get("dense", {}))
        apart, score = f"{mean:+.1f} ± {half:.1f}" if pairs > 1 else "-", statistics.mean(own.values())
        gone = statistics.mean(c["sparsity"]["reached"] for c in mine)
        validation = statistics.mean(100 * next(iter(c["validation"].values())) for c in mine)
        lines.append(f"{name:28} {100 * gone:6.1f}% {validation:10.1f} {score:6.1f} {apart:>14}  {times(mine)}")
    return lines


def times(mine: list[dict[str, Any]]) -> str:
    """How many times as fast the cells of a row are, by runtime."""
    fast = {on: [c["speed"][on]["faster"] for c in mine if on in c.get("speed", {})] for on in ON}
    return ", ".join(f"{statistics.mean(found):.2f} on {on}" for on, found in fast.items() if found) or "not timed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "scratch")
    parser.add_argument("--threads", type=int, default=1, help="one is fastest to draw; take all to time")
    parser.add_argument("--rounds", type=int, default=11, help="pairs of answers that a speed is told from")
    parser.add_argument("--time", action="store_true", help="time the cells that are there, and draw none")
    parser.add_argument("--steps", type=int, help="a trial of so many steps and one seed; its result goes to --out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = yaml.safe_load(options.study.read_text(encoding="utf-8"))
    result = HERE / "results" / f"{options.study.stem}.json"
    if options.steps:
        study |= {"steps": options.steps, "seeds": study["seeds"][:1]}
        result = options.out / f"{options.study.stem}-trial.json"
    for row, own, seed in sorted(cells(study), key=lambda cell: cell[2]):  # all points early, of one seed
        there = finished(study, result).get((row, seed))
        try:
            if options.time and there:
                add(study, result, there | timed(options.out / there["run"], options.threads, options.rounds))
            elif not options.time and not there:
                add(study, result, drawn(study, row, own, seed, options.out))
        except UserError as error:
            print(f"{row}, seed {seed}: {error}", flush=True)
    add(study, result, None)
    print("\n".join(points(json.loads(result.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
