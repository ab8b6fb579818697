"""Images prepared ahead by threads: the share of the time that a training waits for them.

    python benchmarks/image_workers.py --out benchmarks/results/image_workers.json

Photos of 500 x 375 pixels as JPEG, decoded, resized to 224 x 224 by the processor of ViT and cropped at random, none of
them kept in memory, in batches of 32. A step is simulated by sleeping half as long as one thread prepares a batch; that
is measured anew in each round, before and after, since other processes of the machine take their part. The batches must
be those of one thread.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, Features, Image
from transformers import ViTImageProcessorPil

from sparsesoup.hub.tasks import images
from sparsesoup.training.batching import RowBatches
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.prefetch import StepBatches

ROWS, BATCH, SIDE = 640, 32, (500, 375)
NONE = torch.device("cpu")


def photos(folder: Path) -> RowBatches:
    """Rows of photos on the disk, each of its own."""
    draw = np.random.default_rng(0)
    for number in range(ROWS):
        small = draw.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        PIL.Image.fromarray(small).resize(SIDE, PIL.Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    columns = {"image": [str(folder / f"{i}.jpg") for i in range(ROWS)], "label": [i % 2 for i in range(ROWS)]}
    features = Features({"image": Image(), "label": ClassLabel(names=["one", "other"])})
    task = images.ImageTask(("image",), "label", ("one", "other"), ("accuracy",))
    rows, _ = images.encode_images(Dataset.from_dict(columns, features=features), task, ViTImageProcessorPil())
    return rows


def orders(data: RowBatches, steps: int) -> list[list[int]]:
    """Rows of so many steps."""
    return [indices for _, indices in zip(range(steps), data.train_batches(BATCH, 0, 0), strict=False)]


def batches_of(data: RowBatches, steps: int, workers: int) -> StepBatches:
    """Batches of a training, as the loop has them."""
    training = TrainingConfig(batch_size=BATCH, dataloader_num_workers=workers)
    return StepBatches(data, orders(data, steps), 0, (0, "look"), training, NONE)


def preparation(data: RowBatches, steps: int) -> float:
    """Return the seconds that one thread takes for a batch."""
    batches, began = batches_of(data, steps, 0), time.monotonic()
    for step, indices in enumerate(batches.steps):
        batches.view_of(step, indices).batch(indices)
    return (time.monotonic() - began) / steps


def waiting(data: RowBatches, steps: int, workers: int, sleep: float, warm: int = 4) -> dict[str, float]:
    """Return the share of the time waited, after the first steps, and the seconds of a step."""
    batches = batches_of(data, steps + warm, workers)
    waited = whole = 0.0
    for step, indices in enumerate(batches.steps):
        began = time.monotonic()
        batches.view_of(step, indices).batch(indices)
        ready = time.monotonic()
        time.sleep(sleep)
        if step >= warm:
            waited, whole = waited + ready - began, whole + time.monotonic() - began
    batches.close()
    return {"share waited": waited / whole, "seconds of a step": whole / steps}


def same_bits(data: RowBatches, steps: int = 4) -> bool:
    """Return True if two threads make the batches that one makes."""
    one, two = batches_of(data, steps, 0), batches_of(data, steps, 2)
    pairs = ((one.view_of(s, i).batch(i), two.view_of(s, i).batch(i)) for s, i in enumerate(orders(data, steps)))
    found = all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)
    two.close()
    return found


def measure(data: RowBatches, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Return a row for each number of workers: medians over the rounds, which take turns."""
    found: dict[int, list[dict[str, float]]] = {}
    for number in range(rounds):
        for workers in (0, 1, 2, 3):
            before = preparation(data, 4)
            sleep = before / 2
            row = waiting(data, steps, workers, sleep) | {"seconds of a preparation": before}
            row["the same after"] = preparation(data, 4)
            found.setdefault(workers, []).append(row)
            print(number, workers, json.dumps(row), flush=True)
    return [
        {"workers": workers, **{name: statistics.median(row[name] for row in rows) for name in rows[0]},
         "least share waited": min(row["share waited"] for row in rows)}
        for workers, rows in found.items()
    ]  # fmt: skip


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images.HELD = 0
    with tempfile.TemporaryDirectory() as name:
        data = photos(Path(name))
        facts = {"command": " ".join(sys.argv), "machine": platform.machine(), "cores": os.cpu_count(),
                 "load at the beginning": os.getloadavg()[0], "batch": BATCH, "same bits": same_bits(data),
                 "rows": measure(data, options.rounds, options.steps)}  # fmt: skip
    facts["load at the end"] = os.getloadavg()[0]
    if options.out:
        options.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
