"""Run the cells of an experiment, resumable and in parallel, and collect them into a committed result.

    python benchmarks/study.py benchmarks/experiments/sst2.yaml

Start it twice to use two cores: a cell that another process works on is left to it. A cell that the result holds
under the same settings is not run again, so a study goes on elsewhere from what is committed. The test split is opened
once a cell, at its end: what an experiment runs is fixed in its file, and nothing is chosen while it runs.
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

from sparsesoup import evaluate_on_test, prune
from sparsesoup.core.errors import UserError
from sparsesoup.core.files import write_text
from sparsesoup.report.terminal import read_report
from sparsesoup.runs.config import method_named

HERE = Path(__file__).parent
FIXED = ("model", "dataset", "sparsity", "steps", "train")  # what decides a cell beside its row and seed
KEPT = ("method", "validation", "test", "sparsity", "cost", "steps", "notes", "command", "machine", "versions")


def read(path: Path) -> dict[str, Any]:
    """An experiment; one that is `like` another one says only what differs."""
    study: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return read(path.parent / study.pop("like")) | study if "like" in study else study


def cells(study: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(row, its settings, seed): all seeds of a row before the next row, so that the rows that are there are whole."""
    for (row, own), seed in itertools.product(study["rows"].items(), study["seeds"]):
        yield row, own or {}, seed


def sparsity(study: dict[str, Any], own: dict[str, Any]) -> float:
    """What a row is drawn at: its own, or that of all rows."""
    return float(own.get("sparsity", study.get("sparsity", 0.0)))


def draw(study: dict[str, Any], row: str, own: dict[str, Any], seed: int, out: Path, quiet: bool = False) -> Path:
    """The finished run of a cell; what rows have in common is trained once and charged to each."""
    name = own.get("name", row)
    method_named(name)
    steps = round(own.get("times", 1) * study["steps"])
    train = {**(study.get("train") or {}), **(own.get("train") or {})}
    run = prune(
        name, out=out, method=own.get("method"), train=train, model=study["model"], seed=seed,
        dataset=study["dataset"], sparsity=sparsity(study, own), steps=steps, progress=not quiet,
        cache_dir=out / "cache",
    )  # fmt: skip
    return run.path


def finished(study: dict[str, Any], path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The cells that the result at `path` holds and that this study would run alike."""
    if not path.exists():
        return {}
    there = json.loads(path.read_text(encoding="utf-8"))
    same = {k: v for k, v in there["study"].items() if k in FIXED} == {k: v for k, v in study.items() if k in FIXED}
    alike = {row for row, own in study["rows"].items() if same and there["study"]["rows"].get(row, ...) == own}
    return {(c["row"], c["seed"]): c for c in there["cells"] if c["row"] in alike and not c.get("missing")}


def add(study: dict[str, Any], path: Path, cell: dict[str, Any] | None) -> None:
    """Put a cell into the result, beside what other processes have put there meanwhile; missing ones are marked."""
    path.parent.mkdir(exist_ok=True)
    with open(path.parent / f".{path.stem}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = finished(study, path) | ({(cell["row"], cell["seed"]): cell} if cell else {})
        rows = [found.get((row, seed), {"row": row, "seed": seed, "missing": True}) for row, _, seed in cells(study)]
        write_text(path, json.dumps({"study": study, "cells": rows}, indent=1) + "\n")
    print(f"{len(found)} of {len(rows)} cells in {path}", flush=True)


def do(study: dict[str, Any], result: Path, cell: tuple[str, dict[str, Any], int], out: Path) -> bool:
    """Draw a cell, score it on the test split and put it into the result; False if it is refused, or another's."""
    row, own, seed = cell
    try:
        run = draw(study, row, own, seed, out)
        evaluate_on_test(run)
    except UserError as error:
        print(f"{row}, seed {seed}: {error}", flush=True)
        return False
    report = read_report(run)
    facts = {key: report[key] for key in KEPT} | {"run": str(run.relative_to(out))}
    add(study, result, {"row": row, "seed": seed, **facts})
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "scratch")
    parser.add_argument("--threads", type=int, default=1, help="one per process is fastest on small models")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = read(options.study)
    result = HERE / "results" / f"{options.study.stem}.json"
    for row, own, seed in cells(study):
        if (row, seed) not in finished(study, result):
            do(study, result, (row, own, seed), options.out)
    add(study, result, None)


if __name__ == "__main__":
    main()
