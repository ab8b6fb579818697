"""Time the runs of a study, cut compact, against their dense form, and keep the speeds beside the scores.

    sparsesoup compare --config benchmarks/experiments/curve-mrpc.yaml --out benchmarks/scratch --workers 2
    python benchmarks/curve.py curve-mrpc --seed 0 --threads 2 --rounds 5       # on a quiet machine

Writes benchmarks/results/NAME.json; the runs of other seeds keep the speeds that they have there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from sparsesoup.core.files import write_json
from sparsesoup.exports.benchmark import BenchmarkConfig, run_benchmark
from sparsesoup.runs.results import machine_name

HERE = Path(__file__).parent
BACKENDS = ("torch", "onnxruntime")


def run_speed(run: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Return how a run was timed, and by backend how many times as fast as dense its smallest form is."""
    how = BenchmarkConfig(batch=32, length=128, threads=threads, rounds=rounds, backends=BACKENDS)
    (table,) = run_benchmark([run], how)
    best = {row["on"]: row for row in table["rows"]}  # the smallest form of a run is measured last
    speed = {
        name: {key: row[key] for key in ("form", "faster", "quartiles", "flops_ratio")} for name, row in best.items()
    }
    facts = {key: table[key] for key in ("batch", "length", "threads", "rounds", "notes", "failed")}
    return {"timed": {**facts, "on": machine_name()}, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the study, which is finished")
    parser.add_argument("--out", type=Path, default=HERE / "scratch", help="folder of all runs")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--threads", type=int, default=1, help="of a timing")
    parser.add_argument("--rounds", type=int, default=11, help="pairs of answers that a speed is taken from")
    parser.add_argument("--seed", type=int, help="this one alone; by default all of the study")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = json.loads((options.out / "studies" / options.name / "study.json").read_text(encoding="utf-8"))
    result = options.results / f"{options.name}.json"
    before = json.loads(result.read_text(encoding="utf-8"))["runs"] if result.exists() else []
    known = {run["run"]: {key: run[key] for key in ("timed", "speed") if key in run} for run in before}
    for run in study["runs"]:
        timed = options.seed in (None, run["seed"])
        path = options.out / run["run"]
        run |= run_speed(path, options.threads, options.rounds) if timed else known.get(run["run"], {})
        write_json(result, study)


if __name__ == "__main__":
    main()
