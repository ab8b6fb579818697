"""Peak memory and disk of runs beside plain fine-tuning, and what the dry run says of them beforehand.

    python benchmarks/memory.py --model FOLDER

Each figure is of a fresh process: what `prune` takes, as the kernel counts it, and what `prune --dry-run` predicts. The
committed ones are of all-mpnet-base-v2, which has the sizes of BERT-base, with 8 rows of up to 32 tokens: with so few
activations a method's copies weigh most.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from pairs import Memory
from sparsesoup.cli.main import main as run_command
from sparsesoup.cli.prune import parse_arguments
from sparsesoup.core.masking import topk_masks
from sparsesoup.hub.build import build_problem, open_task
from sparsesoup.methods.scores import magnitude
from sparsesoup.runs.run import fill_default_sparsity
from sparsesoup.study.cost.estimate import CostEstimator
from sparsesoup.training import checkpoint
from sparsesoup.training.loop import train
from sparsesoup.training.state_files import open_state, save_state

RESULT = Path(__file__).parent / "results" / "memory.json"
COMMON = ["--steps", "8", "--train.batch-size", "8", "--max-length", "32", "--sparsity", "0.9"]
ISP = ["isp", "--method.stages", "2", "--method.weak-masks", "2"]
CASES: dict[str, tuple[list[str], float | None]] = {  # arguments, and the bound over plain fine-tuning
    "dense": (["dense"], None),
    "gradual": (["gradual"], 1.15),
    "movement": (["movement"], None),
    "isp": (ISP, 1.85),
    "isp, snapshots on disk": ([*ISP, "--snapshots", "disk"], 1.3),
}
PARTS = ("saved state", "disk")
WITHIN = 0.15  # of what is measured, a prediction must lie


def measure(name: str, model: str) -> dict[str, Any]:
    """Return what a run takes, measured and predicted, each in a fresh process."""
    words, bound = CASES[name]
    words = [*words, *COMMON, "--model", model]
    told = subprocess.run([sys.executable, __file__, "--predict", *words], capture_output=True, check=True, text=True)
    predicted = json.loads(told.stdout.splitlines()[-1])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sparsesoup", "prune", *words, "--out", folder, "--save-every", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as run:
            assert run.stderr is not None
            said = run.stderr.read()
            _, status, used = os.wait4(run.pid, 0)
            run.returncode = os.waitstatus_to_exitcode(status)
        if run.returncode:
            raise SystemExit(said.decode()[-2000:])
    memory = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"memory": memory, "predicted_memory": predicted["memory"], "memory_bound": bound}


def measure_disk(name: str, model: str) -> dict[str, int]:
    """Return the most bytes in the directory of a run that saves its state after every step, and those predicted."""
    words = [*CASES[name][0], *COMMON, "--model", model]
    told = subprocess.run([sys.executable, __file__, "--predict", *words], capture_output=True, check=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--saving", *words, "--out", folder, "--save-every", "0"]
        with DiskPeak(Path(folder)) as disk:
            subprocess.run(command, capture_output=True, check=True)
        stays = size_of(Path(folder))
    return {"disk": disk.peak, "predicted_disk": json.loads(told.stdout.splitlines()[-1])["disk"], "stays": stays}


def predict(words: list[str]) -> dict[str, Any]:
    """Return what the dry run says of a run."""
    settings, options = parse_arguments(words)
    found = CostEstimator(snapshots=options.snapshots).estimate_run(fill_default_sparsity(settings))
    return {"memory": found.memory, "disk": found.disk[0]}


def saved_state(model: str) -> dict[str, Any]:
    """Return the bytes of saved states for each weight that is kept, and the memory that writing and reading add."""
    place = parse_arguments(["dense", *COMMON, "--model", model])[0].model_data
    problem = build_problem(place, open_task(place), steps=8)
    state = train(problem.start_run(), problem, 1)
    found: dict[str, Any] = {"bound": 12.2}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        for sparsity in (0.0, 0.9):
            state.set_masks_(topk_masks(magnitude(state.prunable_parameters()), sparsity))
            with Memory() as writing:
                save_state(path, state.tensors(), state.facts())
            with Memory() as reading, open_state(path) as (tensors, facts):
                state.load_state_(tensors, facts)
            pruned = sum(int((~mask).sum()) for mask in state.masks.values())
            kept = sum(p.numel() for p in state.model.parameters()) - pruned
            size, whole = path.stat().st_size, sum(t.nbytes for t in state.tensors().values())
            found[f"sparsity {sparsity}"] = {
                "bytes": size,
                "bytes_per_kept_weight": (size - pruned / 8) / kept,
                "writing_over_state": writing.peak / whole,
                "reading_over_state": reading.peak / whole,
            }
    return found


def size_of(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # renamed or removed meanwhile
            continue
    return total


class DiskPeak:
    """The most bytes in a folder while the block runs, looked at ten times a second."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.peak, self._over = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "DiskPeak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.1):
            self.peak = max(self.peak, size_of(self.folder))


def show(found: dict[str, Any]) -> None:
    """Print what was measured beside its bounds, and beside what was predicted."""
    plain = found["peaks"]["dense"]["memory"]
    for name, row in found["peaks"].items():
        row["over_plain"] = row["memory"] / plain
        bound = f"; bound {row['memory_bound']:.2f}" if row["memory_bound"] else ""
        print(
            f"{name}: {row['memory'] / 1e9:.2f} GB, {row['over_plain']:.2f} of plain{bound}; predicted "
            f"{row['predicted_memory'] / row['memory']:.2f} of it; bound within {WITHIN:.2f}"
        )
    for name, row in found.get("disk", {}).items():
        share = row["predicted_disk"] / row["disk"]
        print(f"disk of {name}: {row['disk'] / 1e9:.2f} GB, predicted {share:.2f} of it; bound within {WITHIN:.2f}")
    for name, row in found.get("saved_state", {}).items():
        if isinstance(row, dict):
            print(
                f"saved state at {name}: {row['bytes_per_kept_weight']:.2f} B a kept weight; bound 12.20; memory "
                f"{row['writing_over_state']:.2f} of it to write, {row['reading_over_state']:.2f} to read"
            )


def main() -> None:
    if sys.argv[1:2] == ["--predict"]:
        print(json.dumps(predict(sys.argv[2:])))
        return
    if sys.argv[1:2] == ["--saving"]:
        checkpoint.SHARE = 0
        raise SystemExit(run_command(["prune", *sys.argv[2:]]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="folder or id of the model; default the embedded one")
    parser.add_argument("--only", choices=[*CASES, *PARTS], nargs="*", help="keep the other committed figures")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"peaks": {}}
    for name in options.only or [*CASES, *PARTS]:
        if name == "saved state":
            found["saved_state"] = saved_state(options.model)
        elif name == "disk":
            found["disk"] = {case: measure_disk(case, options.model) for case in ("dense", "isp, snapshots on disk")}
        else:
            found["peaks"][name] = measure(name, options.model)
        found |= {
            "model": Path(options.model).name,
            "within": WITHIN,
            "command": "python benchmarks/memory.py --model FOLDER",
        }
        found["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    show(found)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
