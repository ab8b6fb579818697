"""Run directories as `prune` leaves them, with made-up numbers, for what only reads them."""

import json
import random
from pathlib import Path
from typing import Any

ROLES = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "output": "attention.output.dense", "feed-forward in": "intermediate.dense", "feed-forward out": "output.dense",
}  # fmt: skip


def cost(steps: int, rows: int = 16) -> dict[str, float]:
    return {"steps": steps, "examples": steps * rows, "tokens": steps * rows * 20, "padding": steps * rows * 5,
            "flops": steps * 7_000_000_000, "seconds": steps * 0.31}  # fmt: skip


def matrices(gone: float, layers: int) -> list[dict[str, Any]]:
    found = []
    for layer in range(layers):
        for number, (role, path) in enumerate(ROLES.items()):
            kept = round(147456 * (1 - gone) * (1 + 0.1 * (number - layer % 4))) if gone else 147456
            name = f"bert.encoder.layer.{layer}.{path}.weight"
            found.append({"name": name, "role": role, "shape": [384, 384], "kept": kept, "total": 147456})
    return found


def log(method: str, steps: int, draw: random.Random) -> list[dict[str, Any]]:
    """Made-up lines: isp looks ahead and comes back, imp begins each round anew."""
    lines: list[dict[str, Any]] = []

    def stretch(label: str, begin: int, count: int, gone: float) -> None:
        for step in range(begin + 1, begin + count + 1):
            loss = 0.35 + 0.4 * 0.99 ** (400 * step / steps) + draw.gauss(0, 0.06) + (0.1 if label == "weak" else 0)
            lines.append({"step": step, "label": label, "loss": loss, "rate": 1e-4, "sparsity": gone})

    if method == "isp":
        for stage in range(6):
            stretch("main", stage * steps // 12, steps // 12, 0.9 * (1 - (1 - stage / 6) ** 3))
            for _ in range(4):
                stretch("weak", (stage + 1) * steps // 12, max(1, steps // 100), 0.9 * (1 - (1 - stage / 6) ** 3))
        stretch("main", steps // 2, steps // 4, 0.9)
    else:
        for number in range(11 if method == "imp" else 0):
            stretch("search", 0, steps, 1 - 0.8**number)
        stretch("main", 0, steps, 0.9 if method == "imp" else 0.0)
    return lines


def write_run(run: Path, method: str = "isp", steps: int = 120, layers: int = 3, **changes: Any) -> dict[str, Any]:
    """A run directory as `prune` leaves it, with made-up numbers; what its report.json says."""
    gone, lines = 0.0 if method == "dense" else 0.9, log(method, steps, random.Random(1))
    stages = [
        {"step": 10 * i, "sparsity": 0.9 * (1 - (1 - i / 6) ** 3), "weak_masks": 4, "changed": 0.0131 + 0.001 * i,
         "same": 0.981 + 0.001 * i, "unanimous": 0.962 + 0.001 * i, "overlap": 0.953 - 0.011 * i}
        for i in range(1, 7)
    ]  # fmt: skip
    counts = {label: sum(line["label"] == label for line in lines) for label in ("search", "weak", "main")}
    parts = matrices(gone, layers)
    kept, size = sum(m["kept"] for m in parts), sum(m["total"] for m in parts)
    notes = {"isp": {"stages": stages, "budget": "included", "weak_share": 0.24}, "imp": {"rounds": 11}}
    facts: dict[str, Any] = {
        "format": 1, "method": method, "model": "minilm", "dataset": "glue/cola", "seed": 0, "steps": steps,
        "settings": {"method": {"name": method, "weak_masks": 4}, "train": {"learning_rate": 3.25e-4}, "epochs": 3.0},
        "sparsity": {"target": gone, "reached": 1 - kept / size, "kept": kept, "total": size},
        "validation": {"matthews": 0.4127}, "test": None,
        "cost": {label: cost(n) for label, n in counts.items() if n} | {"validation": cost(0) | {"flops": 5 * 10**10}},
        "matrices": parts, "notes": notes.get(method, {}), "command": f"sparsesoup prune {method} --dataset glue/cola",
        "versions": {"sparsesoup": "0.1.0", "torch": "2.13.0"}, "machine": "x86_64, 2 threads, cpu",
        "head": "classifier.weight newly initialised with seed 0", "train_rows": 7696, "validation_rows": 855,
    } | changes  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    (run / "report.json").write_text(json.dumps(facts))
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return facts
