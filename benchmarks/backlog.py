"""Draw the unfinished cells of all experiments, the cheapest first, as long as one more ends in time.

    python benchmarks/backlog.py --seconds 3600

Several may run at once: a cell that another one works on is left to it. What a cell takes is told by its FLOPs and by
how fast those before it went.
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from sparsesoup.core.errors import UserError
from sparsesoup.runs.config import RunConfig, config_from_dict
from sparsesoup.runs.run import fill_default_sparsity
from sparsesoup.study.cost.estimate import CostEstimator
from study import HERE, cells, do, finished, read, sparsity

SPARE = 1.3  # how much longer than those before it a cell may take
FIRST = 1e12  # FLOP a second that are hoped for before anything is known


class Entry(NamedTuple):
    """A cell that is to be drawn."""

    flops: float
    name: str
    study: dict[str, Any]
    cell: tuple[str, dict[str, Any], int]


def backlog(experiments: Path, results: Path) -> list[Entry]:
    """The unfinished cells of the experiments in a folder, the cheapest first."""
    estimator, found = CostEstimator(timed=False), []
    for path in sorted(experiments.glob("*.yaml")):
        study = read(path)
        if "rows" not in study:
            continue  # what the small CLIP is made by
        there = finished(study, results / f"{path.stem}.json")
        for row, own, seed in cells(study):
            if (row, seed) not in there and (flops := cost(estimator, study, row, own, seed)):
                found.append(Entry(flops, path.stem, study, (row, own, seed)))
    return sorted(found, key=lambda entry: entry.flops)


def settings(study: dict[str, Any], row: str, own: dict[str, Any], seed: int) -> RunConfig:
    """What a cell is drawn with. Raises: UserError where it would be refused."""
    table = {"model": study["model"], "dataset": study["dataset"], "sparsity": sparsity(study, own), "seed": seed}
    table |= {"steps": round(own.get("times", 1) * study["steps"]), "method": own.get("method") or {}}
    table["train"] = {**(study.get("train") or {}), **(own.get("train") or {})}
    return config_from_dict(own.get("name", row), table)


def cost(estimator: CostEstimator, study: dict[str, Any], row: str, own: dict[str, Any], seed: int) -> float:
    """FLOPs of a cell; 0 where it would be refused."""
    try:
        return estimator.estimate_uncached(fill_default_sparsity(settings(study, row, own, seed))).total_cost.flops
    except UserError as error:
        print(f"{row} on {study['dataset']}: {error}", flush=True)
        return 0.0


def work(entries: list[Entry], results: Path, out: Path, until: float, copy: Path | None) -> None:
    """Draw one after the other until none is left that ends in time."""
    speed, done = FIRST, 0.0
    began = time.monotonic()
    for entry in entries:
        result = results / f"{entry.name}.json"
        row, _, seed = entry.cell
        if (row, seed) in finished(entry.study, result):
            continue
        if SPARE * entry.flops / speed > until - time.monotonic():
            print(f"the next cell takes about {entry.flops / speed:.0f} s: too long for what is left", flush=True)
            return
        if do(entry.study, result, entry.cell, out):
            done += entry.flops
            speed = done / (time.monotonic() - began)
            if copy is not None:
                copy.mkdir(parents=True, exist_ok=True)
                shutil.copy(result, copy / result.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell that would end later")
    parser.add_argument("--experiments", type=Path, default=HERE / "experiments")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE / "scratch")
    parser.add_argument("--copy", type=Path, help="folder for a copy of each result that has grown")
    parser.add_argument("--late", type=int, default=1, help="number of this process among several")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    entries = backlog(options.experiments, options.results)
    # Several processes begin at different cells, so that they do not meet at each.
    first = min(options.late - 1, max(len(entries) - 1, 0))
    work(entries[first:] + entries[:first], options.results, options.out, until, options.copy)


if __name__ == "__main__":
    main()
