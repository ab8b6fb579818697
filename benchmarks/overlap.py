"""What tickets have in common: of the weights that a row keeps, the share that one-shot magnitude keeps too.

    python benchmarks/overlap.py benchmarks/results/cola.json

Reads the masks of the runs that study.py has drawn and left in its folder. Beside it stands the share that two seeds of
a row have in common. A random mask shares its density.
"""

import argparse
import json
import shlex
import statistics
from itertools import combinations
from pathlib import Path
from typing import Any

from sparsesoup.core.files import write_json
from sparsesoup.core.masks import Masks, count_kept, count_total
from sparsesoup.core.ticket import load_masks
from sparsesoup.runs import config as recipe
from sparsesoup.runs.run import fill_default_sparsity, run_folder

HERE = Path(__file__).parent
REFERENCE = "magnitude"


def drawn(result: dict[str, Any], out: Path) -> dict[str, list[Path]]:
    """row -> its tickets, of the runs that are there."""
    found: dict[str, list[Path]] = {}
    for cell in (cell for cell in result["cells"] if not cell.get("missing")):
        path = out / (cell.get("run") or where(result["study"]["dataset"], cell["command"])) / "model"
        if (path / "pruning").is_dir():
            found.setdefault(cell["row"], []).append(path)
    return found


def where(dataset: str, command: str) -> Path:
    """The run that a command made; the first results do not say it."""
    return run_folder(dataset, fill_default_sparsity(recipe.parse_arguments(shlex.split(command)[2:])[0]))


def shared(one: Masks, other: Masks) -> float:
    """Share of what `one` keeps that `other` keeps too."""
    return sum(int((mask & other[name]).sum()) for name, mask in one.items()) / count_kept(one)


def measured(result: dict[str, Any], out: Path) -> dict[str, Any]:
    """Per row: what each seed shares with the reference, and each two seeds with each other."""
    paths = drawn(result, out)
    reference, _ = load_masks(paths[REFERENCE][0])
    rows = {}
    for row, tickets in paths.items():
        masks = [load_masks(path)[0] for path in tickets]
        if count_kept(masks[0]) == count_total(masks[0]):
            continue  # of a dense product
        rows[row] = {
            "with magnitude": [shared(m, reference) for m in masks],
            "between seeds": [shared(a, b) for a, b in combinations(masks, 2)],
        }
        print(row, *(f"{key} {statistics.mean(value):.3f}" for key, value in rows[row].items() if value), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "scratch")
    options = parser.parse_args()
    result = json.loads(options.result.read_text(encoding="utf-8"))
    command = f"python benchmarks/overlap.py {options.result}"
    found = {"overlap": measured(result, options.out), "command": command}
    write_json(HERE / "results" / f"overlap-{options.result.stem}.json", found)


if __name__ == "__main__":
    main()
