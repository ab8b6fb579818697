"""Run the cells of an experiment, resumable and in parallel, and collect them into a committed result.

    python benchmarks/study.py benchmarks/experiments/sst2.yaml            runs what is missing, then collects
    python benchmarks/study.py benchmarks/experiments/sst2.yaml --collect  collects what is there

Start it twice to use two cores: a cell that another process works on is left to it. The test split is opened for a cell
only when every cell of the experiment has been drawn.
"""

import argparse
import fcntl
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from sparsesoup import prune, score_on_test
from sparsesoup.errors import UserError
from sparsesoup.files import write_json, write_text
from sparsesoup.recipe import method_named
from sparsesoup.show import read_report

HERE = Path(__file__).parent


def cells(study: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(row, its settings, seed): all seeds of a row before the next row, so that the rows that are there are whole."""
    for (row, own), seed in itertools.product(study["rows"].items(), study["seeds"]):
        yield row, own or {}, seed


def draw(study: dict[str, Any], row: str, own: dict[str, Any], seed: int, out: Path, quiet: bool = False) -> Path:
    """The finished run of a cell."""
    name = own.get("name", row)
    method_named(name)
    steps = round(own.get("times", 1) * study["steps"])
    run = prune(
        name, out=out, method=own.get("method"), train=study.get("train"), model=study["model"], seed=seed,
        dataset=study["dataset"], sparsity=study["sparsity"], steps=steps, progress=not quiet,
    )  # fmt: skip
    return run.path


def collect(study: dict[str, Any], found: dict[tuple[str, int], Path], path: Path) -> None:
    """Write the result: a row of each cell, missing ones marked."""
    rows = []
    for row, _, seed in cells(study):
        if (row, seed) not in found:
            rows.append({"row": row, "seed": seed, "missing": True})
            continue
        report = read_report(found[row, seed])
        keys = ("method", "validation", "test", "sparsity", "cost", "steps", "notes", "command", "machine", "versions")
        rows.append({"row": row, "seed": seed, **{k: report[k] for k in keys}})
    write_text(path, json.dumps({"study": study, "cells": rows}, indent=1) + "\n")
    print(f"{len(found)} of {len(rows)} cells in {path}")


def add(index: Path, cell: str, run: str) -> dict[str, str]:
    """Note where a cell lies, beside what other processes have noted meanwhile."""
    with open(index.with_suffix(".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        places = (json.loads(index.read_text()) if index.exists() else {}) | {cell: run}
        write_json(index, places)
    return places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "scratch")
    parser.add_argument("--threads", type=int, default=1, help="one per process is fastest on small models")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = yaml.safe_load(options.study.read_text(encoding="utf-8"))
    index = options.out / f"{options.study.stem}.json"
    places: dict[str, str] = json.loads(index.read_text()) if index.exists() else {}
    for row, own, seed in [] if options.collect else cells(study):
        try:
            run = draw(study, row, own, seed, options.out)
        except UserError as error:
            print(f"{row}, seed {seed}: {error}")
            continue
        places = add(index, f"{row} {seed}", str(run))
    found = {(row, seed): Path(places[f"{row} {seed}"]) for row, _, seed in cells(study) if f"{row} {seed}" in places}
    if len(found) == len(list(cells(study))):
        for run in found.values():
            score_on_test(run)
    collect(study, found, HERE / "results" / f"{options.study.stem}.json")


if __name__ == "__main__":
    main()
