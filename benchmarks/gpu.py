"""What a step and a selection take on a GPU beside their plain counterparts, in turn in one process.

    python benchmarks/gpu.py --out FOLDER

BERT-base of random weights on rows of random words: no data, no download. `benchmarks/gpu.sh` runs it with the tests.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from host_work import STEPS, _loop_of, bert_problem, plain_loop
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.timing import time_interleaved
from sparsesoup.runs.results import library_versions
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.device import choose_device

ROUNDS, BATCH, TOKENS = 4, 32, 128
LOOPS = ("dense", "masked", "movement", "l0")
SCORES = 84_934_656  # of the matrices of BERT-base


def step_ratios(precision: Any) -> dict[str, Any]:
    """Return the time of a step over that of a bare loop, in the same precision; and the milliseconds of the latter."""
    problem = bert_problem(transformers.BertConfig(), TOKENS, TrainingConfig(batch_size=BATCH, precision=precision))
    bare = problem.start_run()
    works: list[Callable[[], Any]] = [partial(plain_loop, problem, bare.model, bare.optimizer, STEPS)]
    works += [_loop_of(name, problem) for name in LOOPS]
    plain, *others = time_interleaved(works, ROUNDS)
    found: dict[str, Any] = {"bare_ms": 1e3 * statistics.median(plain) / STEPS}
    for name, taken in zip(LOOPS, others, strict=True):
        ratios = [one / two for one, two in zip(taken, plain, strict=True)]
        found[name] = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return found


def selections() -> dict[str, Any]:
    """Return the milliseconds of a plain read of the scores, of torch.topk, and of each scope."""
    scores = {str(i): torch.rand(768, SCORES // 768 // 12, device="cuda") for i in range(12)}
    flat = torch.cat([score.flatten() for score in scores.values()])
    works: dict[str, Callable[[], Any]] = {"read": lambda: flat.sum(), "topk": lambda: flat.topk(len(flat) // 2)}
    for scope in ("global", "tensor", "row", "2:4"):
        works[scope] = partial(topk_masks, scores, 0.5, scope=scope)
    taken = time_interleaved(list(works.values()), ROUNDS)
    return {name: 1e3 * statistics.median(times) for name, times in zip(works, taken, strict=True)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device is there, so nothing is measured", file=sys.stderr)
        return 2
    choose_device("cuda:0")
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "versions": library_versions(), "steps": {}}
    works: dict[str, Callable[[], Any]] = {p: partial(step_ratios, p) for p in ("bf16", "no")}
    for name, work in {**works, "selection_ms": selections}.items():
        (found["steps"] if name in works else found)[name] = work()
        print(name, json.dumps(found["steps"].get(name, found.get(name))), flush=True)
        (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")  # after each part: a lease may end
    return 0


if __name__ == "__main__":
    sys.exit(main())
