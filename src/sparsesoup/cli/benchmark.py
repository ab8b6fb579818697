"""`sparsesoup benchmark RUN_OR_EXPORT ...`: flags, tables in the terminal, benchmark.json, and the run's page."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sparsesoup.exports.benchmark import BenchmarkConfig, run_benchmark, write_tables
from sparsesoup.exports.benchmark.backends import BACKENDS
from sparsesoup.exports.benchmark.explain import format_megabytes, format_milliseconds
from sparsesoup.report.console import SafeConsole, print_line, text_table
from sparsesoup.report.format import format_count
from sparsesoup.runs.config_parser import CommandParser

ABOUT = "Benchmark pruned models: size, FLOPs, and the time of a batch relative to the dense model, interleaved."
EXAMPLES = f"""
examples:
  sparsesoup benchmark runs/glue/mrpc/hybrid-movement-0123456789/seed-0
  sparsesoup benchmark small fast graph --batch 1 --length 32 --threads 2 --backends torch,onnxruntime

backends: {", ".join(BACKENDS)}. One that is not installed, or fails on a model, says so and stops no other.
Results go into benchmark.json, beside an export or in the run, and into the run's report.html.
Python: sparsesoup.benchmark("fast", batch=1)
"""


def read_arguments(arguments: Sequence[str]) -> tuple[list[Path], BenchmarkConfig]:
    """Return (paths to measure, settings) from a command line.

    Raises: UserError naming the invalid flag; SystemExit after help.
    """
    given = vars(benchmark_parser().parse_args(arguments))
    paths = given.pop("RUN")
    if "backends" in given:
        given["backends"] = tuple(name for name in given["backends"].split(",") if name)
    return paths, BenchmarkConfig(**given)


def benchmark_parser() -> CommandParser:
    """Return the parser of `benchmark`; flags that are not set are absent."""
    made = CommandParser(prog="sparsesoup benchmark", description=ABOUT, epilog=EXAMPLES, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument("RUN", type=Path, nargs="+", help="a run directory, a model folder with pruning/, or an export")
    default = {f.name: f.default for f in fields(BenchmarkConfig)}
    for name, meaning in (
        ("batch", "texts or images in a batch"), ("length", "tokens of a text"), ("rounds", "measurements of each"),
        ("threads", "threads of each backend"),
    ):  # fmt: skip
        told = default[name] or "as many as torch takes"
        made.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS, help=f"{meaning} (default {told})")
    made.add_argument(
        "--backends", default=argparse.SUPPRESS, metavar="A,B", help="backends, with commas (default all)"
    )
    return made


def run_benchmark_command(arguments: Sequence[str]) -> None:
    """Measure, print and save."""
    paths, how = read_arguments(arguments)
    console = SafeConsole()
    with SafeConsole(stderr=True).status("measuring") as status:
        tables = run_benchmark(paths, how, note=status.update)
    print_benchmark(tables, console)
    for path in write_tables(paths, tables):
        print_line(f"tables  {path}")


def print_benchmark(tables: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the results: sizes and FLOPs, times relative to the dense model, and a summary."""
    first = tables[0]
    shape = f"batches of {first['batch']}" + (f", {first['length']} tokens" if first["length"] else "")
    console.print(Text(f"{shape}, {first['threads']} threads, {first['rounds']} rounds by turns\n", style="bold"))
    # Numbers instead of paths, which would take too much space.
    names = [str(i) for i in range(1, len(tables) + 1)] if len(tables) > 1 else ["this"]
    sizes, times = size_rows(tables, names), time_rows(tables, names)
    console.print(text_table(("", "parameters", "not zero", "on disk", "packed", "zstd", "FLOP"), sizes))
    console.print()
    columns = ("", "backend", "form", "batch", "per s", "dense", "by FLOPs", "speed-up")
    console.print(text_table(columns, times, left=3))
    meaning = (
        "batch, dense: time of a batch, and of one of the dense model. per s: texts or images. by FLOPs: dense FLOPs "
        "over those of this model. speed-up: median and quartiles."
    )
    console.print(Text(meaning, style="dim"))
    for name, table in zip(names, tables, strict=True):
        console.print()
        if len(tables) > 1:
            console.print(Text(f"{name}  {table['path']}", style="bold"), soft_wrap=True)
        for sentence in table["said"]:
            console.print(Text(sentence))
        for label, reason in table["failed"].items():
            console.print(Text(f"{label} was not measured: {reason}."))


def size_rows(tables: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return a row for the dense model and one for each candidate."""
    found: list[tuple[str, ...]] = []
    for i, table in enumerate(tables):
        dense, own = table["sizes"]["dense"], table["sizes"]["this"]
        if i == 0 or dense != tables[i - 1]["sizes"]["dense"]:
            parameters, size = f"{dense['parameters']:,}", format_megabytes(dense["raw"])
            found.append(("dense", parameters, parameters, size, "", "", format_count(table["flops"]["dense"])))
        count = [value for key, value in table["flops"].items() if key not in ("dense", "csr", "bsr")][-1]
        disk = [format_megabytes(own[key]) if key in own else "" for key in ("raw", "packed", "zstd")]
        found.append((names[i], f"{own['parameters']:,}", f"{own['nonzero']:,}", *disk, format_count(count)))
    return found


def time_rows(tables: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return a row for each backend and variant of each candidate."""
    return [
        (name if len(names) > 1 else "", row["label"], row["form"], format_milliseconds(row["seconds"]),
         f"{row['per_second']:,.0f}", format_milliseconds(row["dense_seconds"]), f"{row['promise']:.2f}",
         "{:.2f} ({:.2f}-{:.2f})".format(row["faster"], *row["quartiles"]))
        for name, table in zip(names, tables, strict=True) for row in table["rows"]
    ]  # fmt: skip
