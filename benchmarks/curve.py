"""Quality against measured speed: the runs of an experiment, cut compact and timed against their dense form.

    python benchmarks/curve.py benchmarks/experiments/curve-mrpc.yaml
    python benchmarks/curve.py benchmarks/experiments/curve-mrpc.yaml --time        # only the timings, once more
    python benchmarks/curve.py benchmarks/experiments/curve-mrpc.yaml --steps 20    # a trial, into scratch/

A row is a method at a sparsity, with the settings that differ from its defaults. It is drawn by `prune`, scored on the
test split once, exported compact and timed. A cell that the result holds is not done again, and a killed one goes on;
started twice it uses two cores, which timings do not like: repeat them with --time when the machine is quiet.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from sparsesoup import export, score_on_test
from sparsesoup.errors import UserError
from sparsesoup.hub.models import load_as_saved
from sparsesoup.hub.sample import sample
from sparsesoup.meter import CountFlops
from sparsesoup.show import read_report
from sparsesoup.study.tables import paired
from sparsesoup.summary import machine
from study import KEPT, add, cells, draw, finished

HERE = Path(__file__).parent
BATCH, LENGTH = 32, 128  # rows and tokens of what is timed
Answer = Callable[[], object]


def torch_eager(folder: Path) -> Answer:
    """A function that answers the batch that is timed, by the model in a folder."""
    model = load_as_saved(str(folder)).eval()
    batch = sample(model, BATCH, LENGTH)

    def answer() -> object:
        with torch.no_grad():  # FLOPs are not counted in inference mode
            return model(**batch)

    return answer


RUNTIMES = {"torch eager": torch_eager}  # another one is a function from a folder to what answers


def speed(dense: Path, compact: Path, rounds: int) -> dict[str, dict[str, float]]:
    """By runtime: how many times as fast the compact model is, told from pairs of answers in this process."""
    found = {}
    for name, opened in RUNTIMES.items():
        pair = [opened(dense), opened(compact)]
        flops = [_flops(answer) for answer in pair]  # and the warm-up
        seconds = [[_timed(answer) for answer in pair] for _ in range(rounds)]
        ratios = sorted(one / other for one, other in seconds)
        found[name] = {
            "times": statistics.median(ratios), "low": ratios[rounds // 10], "high": ratios[-1 - rounds // 10],
            "dense_seconds": statistics.median(one for one, _ in seconds), "flops_times": flops[0] / flops[1],
            "rounds": rounds,
        }  # fmt: skip
    return found


def _flops(answer: Answer) -> int:
    with CountFlops() as count:
        answer()
    return count.flops


def _timed(answer: Answer) -> float:
    began = time.perf_counter()
    answer()
    return time.perf_counter() - began


def timed(run: Path, out: Path, rounds: int) -> dict[str, Any]:
    """What a cell holds of its run's speed; a run with nothing to cut out is as fast as it was."""
    facts: dict[str, Any] = {"batch": BATCH, "length": LENGTH, "timed_on": machine()}
    try:
        written = export(run, "compact", out / "compact" / run.relative_to(out))
    except UserError as error:
        return facts | {"export": str(error).replace(f"{run}/", ""), "speed": {}}
    told = {key: written.facts[key] for key in ("sizes", "layers", "largest_difference")}
    return facts | {"export": told, "speed": speed(run / "model", written.path, rounds)}


def drawn(study: dict[str, Any], row: str, own: dict[str, Any], seed: int, out: Path, rounds: int) -> dict[str, Any]:
    """A cell: the run, its scores, its speed."""
    run = draw({**study, "sparsity": own.get("sparsity", 0.0)}, row, own, seed, out)
    score_on_test(run)
    report = read_report(run)
    return {"row": row, "seed": seed, **{key: report[key] for key in KEPT}, **timed(run, out, rounds)}


def points(result: dict[str, Any]) -> list[str]:
    """The curve, a line a row: mean scores in points, distance from dense on test paired by seed, times as fast."""
    there = [c for c in result["cells"] if not c.get("missing")]
    test = {(c["row"], c["seed"]): 100 * next(iter(c["test"].values())) for c in there}
    by_row = {name: {seed: v for (row, seed), v in test.items() if row == name} for name in result["study"]["rows"]}
    lines = [f"{'row':28} {'pruned':>7} {'validation':>10} {'test':>6} {'against dense':>14} {'times as fast':>14}"]
    for name, own in by_row.items():
        mine = [c for c in there if c["row"] == name]
        if not mine:
            lines.append(f"{name:28} missing")
            continue
        mean, half, pairs = paired(own, by_row.get("dense", {}))
        apart, score = f"{mean:+.1f} ± {half:.1f}" if pairs > 1 else "-", statistics.mean(own.values())
        fast = [s["times"] for c in mine for s in list(c["speed"].values())[:1]]
        gone = statistics.mean(c["sparsity"]["reached"] for c in mine)
        validation = statistics.mean(100 * next(iter(c["validation"].values())) for c in mine)
        times = f"{statistics.mean(fast):.2f}" if fast else "1 (nothing cut)"
        lines.append(f"{name:28} {100 * gone:6.1f}% {validation:10.1f} {score:6.1f} {apart:>14} {times:>14}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "scratch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11, help="pairs of answers that a speed is told from")
    parser.add_argument("--time", action="store_true", help="time the finished cells once more, and draw none")
    parser.add_argument("--steps", type=int, help="a trial of so many steps and one seed; its result goes to --out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = yaml.safe_load(options.study.read_text(encoding="utf-8"))
    result = HERE / "results" / f"{options.study.stem}.json"
    if options.steps:
        study |= {"steps": options.steps, "seeds": study["seeds"][:1]}
        result = options.out / f"{options.study.stem}-trial.json"
    for row, own, seed in cells(study):
        if ((row, seed) in finished(study, result)) != options.time:
            continue
        try:
            add(study, result, drawn(study, row, own, seed, options.out, options.rounds))
        except UserError as error:
            print(f"{row}, seed {seed}: {error}", flush=True)
    add(study, result, None)
    print("\n".join(points(json.loads(result.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
