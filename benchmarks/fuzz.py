"""Hundreds of damaged files: states, models, masks, tickets, exports. Each is told in one line, or changes nothing.

    python benchmarks/fuzz.py --out benchmarks/results/study/fuzz.json

Tiny models, the real commands. A file of a copy loses a bit, its end or a block, grows, is that of another run, is
gone, or has a value of its JSON or of its safetensors header changed; then the copy is resumed, pruned again, exported,
pushed or loaded. The trials of a number are the same on every machine.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.extend(map(str, (Path(__file__).parents[1] / "tests").glob("**/")))
import torch

from mutations import SAME, SILENT, TOLD, TRACE, subjects, trial, undamaged
from tiny_hub import checkpoint, reviews


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=700)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint(folder / "place" / "bert")
        reviews(folder / "place" / "reviews")
        found, wrong = Counter[tuple[str, str]](), []
        kinds = subjects(folder / "place", folder)
        whole = [undamaged(kind, folder / "scratch") for kind in kinds]
        for number in range(options.first, options.first + options.count):
            kind = number % len(kinds)
            came, told = trial(kinds[kind], whole[kind], folder / "scratch", number)
            found[kinds[kind].name, came] += 1
            if came in (SILENT, TRACE):
                wrong.append(told)
                print(came, told, flush=True)
            elif sys.stderr.isatty():
                print(came, told, file=sys.stderr)
    table = {kind.name: {c: found[kind.name, c] for c in (SAME, TOLD, SILENT, TRACE)} for kind in kinds}
    total = {came: sum(row[came] for row in table.values()) for came in (SAME, TOLD, SILENT, TRACE)}
    report = {"trials": options.count, "first": options.first, "came": total, "kinds": table,
              "command": " ".join(["python", *sys.argv]), "machine": platform.machine()}  # fmt: skip
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if wrong:
        raise SystemExit(f"{len(wrong)} of {options.count} trials ended with a silent change or a traceback")


if __name__ == "__main__":
    main()
