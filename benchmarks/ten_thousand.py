"""A study of 10,000 trials on two local nodes of Ray: what its first process costs, and what a kill of it loses.

    RAY_worker_niceness=0 nice -n 5 python benchmarks/ten_thousand.py --out benchmarks/results/study/ten_thousand.json

Scheduling, records and tables are real; a trial is a sleep. The first process of the study is killed half-way, and the
same command is said again. CPU seconds are those of the first process with all its threads, when so many trials were
done and at the end; what it takes to import is told apart.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.extend(map(str, (Path(__file__).parents[1] / "tests").glob("**/")))

MARKS = (0.1, 0.25, 0.5, 0.75, 1.0)  # shares of the trials
ROWS, SPARSITIES = 5, 20
NODES, SLOTS = 2, 2
BEGUN = time.process_time()


def recipe(trials: int) -> dict[str, Any]:
    """A study of so many trials, at least 100, on a tiny model."""
    rows = {f"row {i}": {"name": "magnitude", "train": {"batch_size": 8 + i}} for i in range(ROWS)}
    shares = [(i + 1) / 25 for i in range(SPARSITIES)]
    seeds = [*range(trials // ROWS // SPARSITIES)]
    return {"models": "bert", "datasets": "reviews", "sparsities": shares, "seeds": seeds, "steps": 2, "methods": rows}


def drive(trials: int, address: str, seconds: float) -> None:
    """Run the study as `sparsesoup compare` does, with jobs that sleep; write what that took to a file."""
    from rich.console import Console

    from sparsesoup.core.files import read_table, write_table
    from sparsesoup.study.compare import run_study
    from sparsesoup.study.execute.jobs import JobRunner, TrialJob, TrialOptions, trial_record
    from sparsesoup.study.execute.ray_executor import TrialResources, ray_executor
    from sparsesoup.study.recipe.plan import read_plan

    imported = time.process_time()
    plan = read_plan(recipe(trials), None, "many", Path("runs"), True)
    template = Path("record.json")
    if not template.exists():  # that of a real run
        first = plan.trials[0]
        JobRunner()(TrialJob(first, Path("first"), Path("first/studies/many"), TrialOptions(threads=1)))
        write_table(template, trial_record(first, Path("first") / first.path))
    record = read_table(template)

    class SleepingRunner:
        """Do as if a trial was run: sleep, then write its record."""

        def __call__(self, job: TrialJob) -> None:
            time.sleep(seconds)
            model, dataset, sparsity = job.trial.column_of
            own = {"row": job.trial.row, "model": model, "dataset": dataset, "target": sparsity, "seed": job.trial.seed}
            score = {"accuracy": int(job.trial.trial_key[:4], 16) / 2**16}
            own |= {"run": str(job.trial.path), "validation": score, "test": score}
            with open("done.txt", "a", encoding="utf-8") as file:  # one short line: whole or not at all
                file.write(f"{job.trial.trial_key}\n")
            write_table(job.record_path, record | own)

    planned = time.process_time()
    where = (address, Path("runs"), TrialResources(cpus=1))
    with open("said.txt", "a", encoding="utf-8") as said, ray_executor(*where, runner=SleepingRunner) as executor:
        began = time.time()
        run_study(plan, Path("runs"), Console(file=said, width=200), executor)
    took = {"imports": imported - BEGUN, "plan": planned - imported, "all": time.process_time()}
    Path("took.json").write_text(json.dumps(took | {"seconds of the study": time.time() - began}), encoding="utf-8")


def cpu_seconds(process: int) -> float:
    """CPU seconds of a process so far, with all its threads."""
    numbers = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


def run_driver(
    folder: Path, trials: int, address: str, seconds: float, before: float, marks: dict[int, float], kill_at: int = 0
) -> tuple[float, float]:
    """Run the first process of a study, maybe until so many trials are done; return its CPU and wall seconds.

    Args:
        before: CPU seconds of the process that was killed.
        marks: gets the number of trials done -> CPU seconds of both.
    """
    line = [sys.executable, __file__, "--drive", str(trials), "--address", address, "--seconds", str(seconds)]
    began, process = time.monotonic(), subprocess.Popen(line, cwd=folder)
    while not (ended := os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
        done = count_lines(folder / "done.txt")
        for mark in [round(trials * share) for share in MARKS]:
            if done >= mark and mark not in marks:
                marks[mark] = before + cpu_seconds(process.pid)
        if kill_at and done >= kill_at:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.5)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if ended and process.returncode != (-signal.SIGKILL if kill_at else 0):
        raise SystemExit(f"the study ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - began


def count_lines(path: Path) -> int:
    """Lines of a file, 0 if there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check_study(folder: Path, trials: int) -> dict[str, Any]:
    """Return what the study holds; each trial must be in its tables once."""
    import pandas

    study = folder / "runs" / "studies" / "many"
    runs = json.loads((study / "study.json").read_text(encoding="utf-8"))["runs"]
    parquet = pandas.read_parquet(study / "study.parquet")
    assert len(runs) == len(parquet) == trials
    assert [json.loads(text) for text in parquet["record"]] == runs
    assert len({(run["row"], run["target"], run["seed"]) for run in runs}) == trials
    times = Counter((folder / "done.txt").read_text(encoding="utf-8").split())
    assert len(times) == trials
    return {"trials": trials, "done twice": sum(times.values()) - trials}


def measure_study(folder: Path, trials: int, address: str, seconds: float) -> dict[str, Any]:
    """Run the study, and return what it took."""
    marks = dict[int, float]()
    first, wall = run_driver(folder, trials, address, seconds, 0.0, marks, trials // 2)
    before = count_lines(folder / "done.txt")
    second, more = run_driver(folder, trials, address, seconds, first, marks)
    took = json.loads((folder / "took.json").read_text(encoding="utf-8"))
    cpu, wall = first + second, wall + more
    return {**check_study(folder, trials), "killed after": before, "cpu seconds": cpu, "wall seconds": wall,
            "share of a core": cpu / wall, "cpu seconds of imports": 2 * took["imports"],
            "cpu seconds of the plan": took["plan"], "cpu seconds when so many trials were done": marks,
            "trials a second": trials / wall}  # fmt: skip


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=0.4, help="duration of a trial")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--drive", type=int)
    parser.add_argument("--address")
    options = parser.parse_args()
    if options.drive:
        drive(options.drive, options.address, options.seconds)
        return
    from sparsesoup.study.execute.ray_connect import QUICK, STORE
    from tiny_hub import checkpoint, reviews

    os.environ |= QUICK
    from ray.cluster_utils import Cluster

    node = {"num_cpus": SLOTS, "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    for _ in range(NODES - 1):
        cluster.add_node(**node)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            checkpoint(folder / "bert")
            reviews(folder / "reviews")
            found = measure_study(folder, options.trials, cluster.address, options.seconds)
    finally:
        cluster.shutdown()
    facts = {"command": " ".join(sys.argv), "machine": platform.machine(), "cores": os.cpu_count(), "nodes": NODES,
             "workers": NODES * SLOTS, "seconds of a trial": options.seconds, "python": platform.python_version(),
             "load of the machine": os.getloadavg()[2], "study": found}  # fmt: skip
    print(json.dumps(facts, indent=2))
    if options.out:
        options.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
