"""What cutting out gains: MiniLM without half of its feed-forward units and a third of its heads, at random, untrained.

`make bench` prints it and writes benchmarks/results/speed.json. A backend that stands there for the same settings is
not measured again, so a stopped command goes on.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from sparsesoup.core.files import write_json
from sparsesoup.core.ticket import save_masks
from sparsesoup.exports.benchmark import BenchmarkConfig, run_benchmark
from sparsesoup.exports.benchmark.backends import BACKENDS
from sparsesoup.exports.source import masks_from_zeros
from sparsesoup.hub.models.layer_layouts import prunable_layers
from sparsesoup.hub.models.loading import load_as_saved
from sparsesoup.hub.quiet import quiet_libraries
from sparsesoup.runs.results import machine_name

RESULT = Path(__file__).parent / "results" / "speed.json"
UNITS, HEADS = 1 / 2, 1 / 3  # the shares that go
BOUND = 0.25  # by which the speed may miss what FLOPs say


@torch.no_grad()
def cut_at_random(folder: Path) -> Path:
    """MiniLM's folder with the rows that lead to random units and heads zero, and its masks."""
    model, draw = load_as_saved("minilm"), torch.Generator().manual_seed(0)
    for layer in prunable_layers(model):
        units = torch.randperm(layer.num_units, generator=draw)[: round(UNITS * layer.num_units)]
        heads = torch.randperm(layer.num_heads, generator=draw)[: round(HEADS * layer.num_heads)]
        layer.module_of("up").weight[units] = 0
        layer.module_of("value").weight.view(layer.num_heads, layer.head_size, -1)[heads] = 0
    with quiet_libraries():
        model.save_pretrained(folder)
    save_masks(folder / "pruning", masks_from_zeros(model), {"method": "random", "model": "minilm", "seed": 0})
    return folder


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a result depends on."""
    command = "make bench" if options.out == RESULT else "python benchmarks/speed.py"
    return {
        "batch": options.batch, "length": options.length, "threads": options.threads, "rounds": options.rounds,
        "machine": f"{machine_name()}, torch {torch.__version__}", "command": command,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    asked = settings(options)
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    if found.get("settings") != asked:
        found = {"settings": asked, "backends": {}, "failed": {}}
    with tempfile.TemporaryDirectory() as folder:
        source = cut_at_random(Path(folder) / "model")
        for name in options.backends.split(","):
            if name in found["backends"]:
                continue
            how = BenchmarkConfig(
                batch=options.batch,
                length=options.length,
                threads=options.threads,
                rounds=options.rounds,
                backends=(name,),
            )
            (table,) = run_benchmark([source], how)
            found["backends"][name], found["failed"] = table["rows"], found["failed"] | table["failed"]
            write_json(options.out, found)
    for row in (row for rows in found["backends"].values() for row in rows):
        low, high = row["quartiles"]
        print(f"{row['label']}, {row['form']}: {row['faster']:.2f} times as fast as dense ({low:.2f} to {high:.2f}); "
              f"by FLOPs {row['flops_ratio']:.2f}" + (f": {row['why']}" if row["why"] else ""))  # fmt: skip
    for label, reason in found["failed"].items():
        print(f"{label}: {reason}")


if __name__ == "__main__":
    main()
