"""What tickets have in common: of the weights that a row keeps, the share that one-shot magnitude keeps too.

    python benchmarks/overlap.py benchmarks/results/cola.json

Reads the masks of the study's runs, where they are. Beside it stands the share that two seeds of a row have in common.
A random mask shares its density.
"""

import argparse
import json
import shlex
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from sparsesoup.core.files import write_json
from sparsesoup.core.masks import Masks, count_kept
from sparsesoup.core.ticket import load_masks

HERE = Path(__file__).parent
REFERENCE = "magnitude"


def tickets_of(result: dict[str, Any], out: Path) -> dict[str, list[Masks]]:
    """Return row -> the masks of its runs that are there, without rows that keep every weight."""
    found: dict[str, list[Masks]] = {}
    for run in result["runs"]:
        if run["target"] is not None and (ticket := out / run["run"] / "model" / "pruning").is_dir():
            found.setdefault(run["row"], []).append(load_masks(ticket.parent)[0])
    return found


def shared(one: Masks, other: Masks) -> float:
    """Return the share of what `one` keeps that `other` keeps too."""
    return sum(int((mask & other[name]).sum()) for name, mask in one.items()) / count_kept(one)


def overlaps(tickets: dict[str, list[Masks]]) -> dict[str, Any]:
    """Return by row what each seed shares with the reference's first, and each two seeds with each other."""
    return {
        row: {
            "with magnitude": [shared(mask, tickets[REFERENCE][0]) for mask in masks],
            "between seeds": [shared(one, other) for one, other in combinations(masks, 2)],
        }
        for row, masks in tickets.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="the study.json of a study")
    parser.add_argument("--out", type=Path, default=HERE / "scratch", help="folder of all runs")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    result = json.loads(options.result.read_text(encoding="utf-8"))
    found = {"overlap": overlaps(tickets_of(result, options.out)), "command": shlex.join(["python", *sys.argv])}
    write_json(options.results / f"overlap-{result['name']}.json", found)


if __name__ == "__main__":
    main()
