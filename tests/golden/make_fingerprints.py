"""Digests of what every method makes of small problems, to see whether a change of the code changes a result.

    export PYTHONPATH=tests
    python tests/golden/make_fingerprints.py --out before.json      (before a change, on one machine)
    python tests/golden/make_fingerprints.py --against before.json  (after it, on the same machine)

Masks, weights and scores hold on one machine alone. `fingerprints.json` beside this file holds what is the same on
every CPU: how many weights are kept and what the run cost; `--counts` writes it anew.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tiny_hub
import tiny_images
from sparsesoup import prune
from sparsesoup.core.masks import count_kept
from sparsesoup.methods import METHODS, TABLE
from sparsesoup.runs.config import config_from_dict
from tiny_hub import masks_of, weights_of
from tiny_runs import run

HERE = Path(__file__).parent
HUB: dict[str, dict[str, Any]] = {  # runs of the whole way, each by what is not the default
    "isp": {"method": {"stages": 2, "weak_masks": 2, "look_ahead": 0.05}},
    "imp": {"method": {"cut": 0.5}},
    "gradual": {},
    "movement": {},
    "hybrid-movement": {"method": {"score_rate": 0.5, "tile": {"rows": 8, "cols": 8}}},
    "one-shot-structured": {"method": {"structure": "heads-and-units"}},
    "pins": {"method": {"every_steps": 5, "window": 5}},
    "snip": {},
    "lottery-pools": {"method": {"cut": 0.5, "neighbours": 2}},
    "gmp-star": {},
}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return twelve hex digits of names, shapes, dtypes and bytes."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def counts(name: str, sparsity: float, folder: Path) -> dict[str, Any]:
    """Return how many weights a run keeps and what it was charged, which hold on every CPU."""
    done = run(name, sparsity, folder)
    cost = {
        label: {key: value for key, value in each.items() if key != "seconds"}
        for label, each in done.problem.meter.to_json().items()
    }
    return {"kept": count_kept(done.ticket.masks), "cost": cost}


def digests(name: str, sparsity: float, folder: Path) -> dict[str, Any]:
    """Return digests of a run's masks and weights, beside its counts."""
    ticket = run(name, sparsity, folder).ticket
    return {"masks": digest(ticket.masks), "weights": digest(ticket.weights)} | counts(name, sparsity, folder)


def of_tiny(folder: Path, what: Any) -> dict[str, Any]:
    """Return `what` of every method on the tiny problem, by name of the method."""
    return {name: what(name, 0.0 if row.dense else 0.5, folder) for name, row in TABLE.items()}


def of_keys() -> dict[str, str]:
    """Return the key of a run of every method."""
    table = {"model": "bert", "dataset": "reviews", "sparsity": 0.7, "steps": 300, "train": {"batch_size": 8}}
    return {name: config_from_dict(name, table).run_key() for name in METHODS if name != "ticket"}


def of_hub(folder: Path) -> dict[str, Any]:
    """Return digests of runs from a checkpoint and a dataset to a saved model: text, questions, images."""
    tiny_hub.checkpoint(folder / "bert")
    tiny_hub.reviews(folder / "reviews")
    tiny_hub.squad(folder / "squad")
    tiny_images.checkpoint(folder / "vit")
    tiny_images.photos(folder / "photos")
    plain = {"sparsity": 0.5, "steps": 60, "train": {"batch_size": 8, "learning_rate": 0.003}}
    asked = {f"text/{name}": (name, "bert", "reviews", own) for name, own in HUB.items()}
    asked |= {"questions/gradual": ("gradual", "bert", "squad", {}), "images/isp": ("isp", "vit", "photos", HUB["isp"])}
    found = {}
    for key, (name, model, dataset, own) in asked.items():
        table = plain | own | {"model": str(folder / model), "dataset": str(folder / dataset)}
        done = prune(name, out=folder / "runs", progress=False, **table)
        parts = {"masks": digest(masks_of(done.path)), "weights": digest(weights_of(done.path / "model"))}
        found[key] = parts | {"validation": done.report["validation"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write the digests to")
    parser.add_argument("--against", type=Path, help="file of digests to compare with; differences end with code 1")
    parser.add_argument("--counts", action="store_true", help="write fingerprints.json anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.counts:
            text = json.dumps(of_tiny(folder, counts), indent=1, sort_keys=True)
            (HERE / "fingerprints.json").write_text(text + "\n", encoding="utf-8")
            return
        found = {"tiny": of_tiny(folder, digests), "keys": of_keys(), "hub": of_hub(folder)}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if options.against:
        before = json.loads(options.against.read_text(encoding="utf-8"))
        changed = [
            f"{part} {key}"
            for part in found
            for key in sorted({*found[part], *before[part]})
            if found[part].get(key) != before[part].get(key)
        ]
        print("\n".join(changed) or "the same")
        sys.exit(bool(changed))


if __name__ == "__main__":
    main()
