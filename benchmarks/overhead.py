"""What a study costs beside training and evaluation, and what a second worker gains; MiniLM on the embedded rows.

    python benchmarks/overhead.py

*Overhead*: 1 - (seconds in `train` and `evaluate`) / (seconds of the study), one cell after the other in this process.
Bound: 0.05. *Two workers*: seconds of `compare --workers 2` over a grid of single-thread cells, beside those of two
plain processes that each prune and test half of the same grid. Bound: 1.1. No two of these cells share a training.
What was measured under the same settings stands, so a stopped command goes on.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from sparsesoup.core.files import write_json
from sparsesoup.hub import build
from sparsesoup.runs.results import machine_name
from sparsesoup.runs.run import RuntimeOptions, evaluate_finished_run, run_method
from sparsesoup.study.compare import run_study
from sparsesoup.study.execute.executors import InProcess, JobExecutor, ProcessExecutor
from sparsesoup.study.execute.jobs import TrialOptions
from sparsesoup.study.recipe.plan import StudyPlan, read_plan
from sparsesoup.study.recipe.trial import Trial

RESULT = Path(__file__).parent / "results" / "study" / "overhead.json"
BOUNDS = {"overhead": 0.05, "two workers": 1.1}


def plan(folder: Path, steps: int, cells: int) -> StudyPlan:
    """A grid of cells that have nothing in common: every seed has its own head."""
    recipe = {"models": "minilm", "datasets": "docstrings", "sparsities": 0.9, "seeds": list(range(cells))}
    recipe |= {"steps": steps, "methods": ["gradual"]}
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return read_plan(path)


def quiet() -> Console:
    return Console(quiet=True)


def studied(grid: StudyPlan, out: Path, executor: JobExecutor) -> float:
    """Seconds that a study takes, from its recipe to its page."""
    began = time.perf_counter()
    run_study(grid, out, quiet(), executor, TrialOptions(threads=1))
    return time.perf_counter() - began


def overhead(grid: StudyPlan, folder: Path) -> dict[str, float]:
    """The share of a local study that is neither training nor evaluation."""
    spent: list[float] = []

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*args, **more)
            finally:
                spent.append(time.perf_counter() - began)

        return inner

    kept = build.evaluate_model
    build.evaluate_model = timed(kept)  # of the test split, which is on no meter
    try:
        whole = studied(grid, folder / "alone", InProcess())
    finally:
        build.evaluate_model = kept
    records = [json.loads(path.read_text()) for path in (folder / "alone").glob("studies/*/study.json")]
    metered = sum(cost["seconds"] for record in records for cell in record["runs"] for cost in cell["cost"].values())
    return {
        "seconds": whole,
        "training and evaluation": metered + sum(spent),
        "ratio": 1 - (metered + sum(spent)) / whole,
    }


def plain(cells: list[Trial], out: Path) -> None:
    """Prune and test these cells as a script would."""
    torch.set_num_threads(1)
    for cell in cells:
        evaluate_finished_run(run_method(cell.settings, out, RuntimeOptions(quiet())).path, quiet())


def two_plain(grid: StudyPlan, out: Path) -> float:
    """Seconds that two processes take for the cells, every second one each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sparsesoup.study.execute.jobs"])
    began = time.perf_counter()
    processes = [context.Process(target=plain, args=(grid.trials[i::2], out)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a plain process failed")
    return time.perf_counter() - began


def pair(grid: StudyPlan, folder: Path, number: int) -> dict[str, float]:
    """Seconds of a study in two processes and of two plain processes, every second time the other one first."""
    order = [("study", lambda at: studied(grid, at, ProcessExecutor(2))), ("plain", lambda at: two_plain(grid, at))]
    return {name: work(folder / f"{name}-{number}") for name, work in (order if number % 2 else order[::-1])}


def command(options: argparse.Namespace) -> str:
    """How the same is measured again."""
    words = f"python benchmarks/overhead.py --steps {options.steps} --runs {options.runs} --rounds {options.rounds}"
    return words if options.out == RESULT else f"{words} --out {options.out}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    settings = {
        "steps": options.steps,
        "runs": options.runs,
        "machine": f"{machine_name()}, torch {torch.__version__}",
    }
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    if found.get("settings") != settings:
        found = {"settings": settings, "command": command(options), "pairs": []}
    with tempfile.TemporaryDirectory() as name:
        grid = plan(Path(name), options.steps, options.runs)
        if "overhead" not in found:
            write_json(options.out, found | {"overhead": overhead(grid, Path(name))})
            found = json.loads(options.out.read_text(encoding="utf-8"))
        while len(found["pairs"]) < options.rounds:
            found["pairs"].append(pair(grid, Path(name), len(found["pairs"])))
            write_json(options.out, found)
    ratio = statistics.median(p["study"] / p["plain"] for p in found["pairs"])
    print(f"overhead     {found['overhead']['ratio']:.3f}; bound {BOUNDS['overhead']:.2f}")
    print(f"two workers  {ratio:.3f}; bound {BOUNDS['two workers']:.2f}")


if __name__ == "__main__":
    main()
