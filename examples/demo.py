"""The main job on the embedded default: dense, gradual and gradual-obs at one sparsity, with quality and cost.

Needs nothing but PyPI: the model and the texts come with installed packages. `make demo` runs it.
"""

import argparse
import time
from pathlib import Path

from rich.console import Console

from sparsesoup import evaluate_on_test, prune
from sparsesoup.report.escaping import text_table
from sparsesoup.report.format import format_percent
from sparsesoup.report.terminal import flops_by_label, format_main_score, total_cost

SPARSITY = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="T, the steps of one fine-tuning")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    console, began, rows, dense = Console(), time.monotonic(), [], 0.0
    for method in ("dense", "gradual", "gradual-obs"):
        sparsity = 0.0 if method == "dense" else SPARSITY
        run = prune(method, sparsity=sparsity, steps=options.steps, train={"learning_rate": 3e-4}, out=options.out)
        report = run.report | {"test": evaluate_on_test(run.path)}
        cost, flops = total_cost(report, but="validation"), sum(flops_by_label(report).values())
        dense = dense or flops
        scores = (format_main_score(report[split]) for split in ("validation", "test"))
        share = format_percent(report["sparsity"]["reached"])
        rows.append((method, share, *scores, str(cost["steps"]), f"{flops / dense:.2f} x", f"{cost['seconds']:.1f}"))
    console.print(text_table(("method", "sparsity", "validation", "test", "steps", "FLOPs", "seconds"), rows))
    console.print(
        "Which library does a docstring sentence come from, 8 classes. FLOPs count all weights as if they were there;\n"
        f"a difference of a point or two is noise at one seed. {time.monotonic() - began:.0f} seconds in all.",
        highlight=False,
    )
    console.print(f"report  {run.path / 'report.html'}\nmodel   {run.path / 'model'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
