"""Soups on gradual-obs against their controls: validation scores at equal FLOPs, and the rule that decides.

    pip install -e benchmarks/soup_methods
    python benchmarks/soup_search.py --seeds 0 1 2 3 4

MiniLM, T = 300 steps of 16 rows in bf16, the weak steps of a soup included in T. Resumable: a run that is complete is
read; several processes may share the work by --seeds or --beds. No test row is scored.

The rule, written before the first run: a soup stays if it is above each of its controls on two of the three beds beyond
Student's 95 % interval over five paired seeds, and below one on none.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from sparsesoup import prune
from sparsesoup.study.results.tables import paired_interval

RESULT = Path(__file__).parent / "results" / "soups.json"
BEDS = {  # dataset and sparsity: peak rate, of the search in results/tuning/rates.json
    ("glue/stsb", 0.9): 1e-4,
    ("glue/sst2", 0.9): 2e-4,
    ("glue/mrpc", 0.9): 1e-4,
}
CONTROLS = {  # row: what it must beat
    "obs-scores": ("gradual-obs", "obs-shuffled"),
    "obs-votes": ("gradual-obs", "obs-shuffled"),
    "obs-weights": ("gradual-obs", "obs-shuffled"),
    "obs-forecast": ("gradual-obs", "obs-shuffled"),
    "obs-taste": ("gradual-obs",),
    "obs-bursts": ("gradual-obs", "obs-mean-rate"),
    "obs-drops": ("gradual-obs", "obs-mean-drop"),
}
ROWS = ("gradual-obs", "obs-shuffled", "obs-mean-rate", "obs-mean-drop", *CONTROLS)


def trial(row: str, dataset: str, sparsity: float, seed: int, out: Path) -> dict[str, Any]:
    """Return the validation scores and the cost of one run."""
    train = {"batch_size": 16, "learning_rate": BEDS[dataset, sparsity], "precision": "bf16"}
    run = prune(row, dataset=dataset, sparsity=sparsity, steps=300, seed=seed, train=train, out=out, progress=False)
    flops = sum(cost["flops"] for label, cost in run.report["cost"].items() if label != "validation")
    return {"row": row, "dataset": dataset, "sparsity": sparsity, "seed": seed, "FLOPs": flops} | {
        "validation": run.report["validation"], "steps": {k: c["steps"] for k, c in run.report["cost"].items()}
    }  # fmt: skip


def main_score(trial: dict[str, Any]) -> float:
    """The first metric of a trial, in points."""
    return 100 * float(next(iter(trial["validation"].values())))


def verdicts(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each soup against each of its controls on each bed, paired by seed."""
    found = []
    for row, controls in CONTROLS.items():
        for control in controls:
            for dataset, sparsity in BEDS:
                one, other = (
                    {t["seed"]: main_score(t) for t in trials if (t["row"], t["dataset"], t["sparsity"]) == key}
                    for key in ((row, dataset, sparsity), (control, dataset, sparsity))
                )
                if len(one.keys() & other.keys()) > 1:
                    difference, interval, pairs = paired_interval(one, other)
                    found.append({
                        "row": row, "control": control, "dataset": dataset, "sparsity": sparsity,
                        "difference": difference, "interval": interval, "pairs": pairs,
                    })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--beds", nargs="+", default=[dataset for dataset, _ in BEDS])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/scratch/soups"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trials = []
    for seed in options.seeds:
        for dataset, sparsity in (bed for bed in BEDS if bed[0] in options.beds):
            for row in ROWS:
                trials.append(trial(row, dataset, sparsity, seed, options.out))
                print(row, dataset, sparsity, seed, f"{main_score(trials[-1]):.2f}", flush=True)
    command = f"python benchmarks/soup_search.py --seeds {' '.join(map(str, options.seeds))}"
    facts = {"command": command, "T": 300, "trials": trials, "verdicts": verdicts(trials)}
    options.results.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
