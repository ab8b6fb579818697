"""Commands on exports: `export`, `benchmark`, `push`."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from sparsesoup.cli.command import Command, CommandParser, add_settings, read_settings
from sparsesoup.cli.tables import print_benchmark, print_export
from sparsesoup.core.errors import UserError
from sparsesoup.core.settings import fill_settings, flag_of, settings_of
from sparsesoup.exports import FORMATS, write_export
from sparsesoup.exports.benchmark import BenchmarkConfig, run_benchmark, write_tables
from sparsesoup.exports.benchmark.backends import BACKENDS
from sparsesoup.exports.push import push_to_hub
from sparsesoup.exports.verify import verified_export
from sparsesoup.report.escaping import SafeConsole, print_line

EXPORT_EXAMPLES = """
examples:
  sparsesoup export runs/glue/sst2/isp-0123456789/seed-0 --to packed --dtype bf16 --out small
  sparsesoup export runs/glue/mrpc/hybrid-movement-0123456789/seed-0 --to compact --out fast --verify
  sparsesoup export runs/glue/mrpc/hybrid-movement-0123456789/seed-0 --to onnx --out graph

Which one? `packed` for unstructured pruning: the file shrinks, the computation does not. `compact` for pruned heads and
units (hybrid-movement): file, memory and time shrink. `onnx` and `openvino` are the compact model for engines without
torch (pip install 'sparsesoup[onnx]', 'sparsesoup[openvino]'). `semi-structured` (experimental) for models pruned with
--method.scope 2:4, on a GPU. `dense` for all other tools.
Python: sparsesoup.export(run, "packed", "small"), sparsesoup.load_packed("small"), sparsesoup.load_compact("fast").
"""
BENCHMARK_EXAMPLES = f"""
examples:
  sparsesoup benchmark runs/glue/mrpc/hybrid-movement-0123456789/seed-0
  sparsesoup benchmark small fast graph --batch 1 --length 32 --threads 2 --backends torch,onnxruntime

backends: {", ".join(BACKENDS)}. One that is not installed, or fails on a model, says so; the others still run.
Results are written to benchmark.json, in the export or the run, and to the run's report.html.
Python: sparsesoup.benchmark("fast", batch=1)
"""
PUSH_EXAMPLES = """
examples:
  sparsesoup push runs/glue/sst2/isp-0123456789/seed-0 me/sparse-sst2 --dry-run --out look
  sparsesoup push small me/sparse-sst2-packed --private --license apache-2.0

The token is that of HF_TOKEN, or of `hf auth login`. Local paths in a run's files are not uploaded.
"""


def export_parser() -> CommandParser:
    """Return the parser of `export`, with the settings of each format."""
    forms = "\n".join(f"  {name:15} {row.summary}: {row.gain}" for name, row in FORMATS.items())
    about = "Export a pruned model to another format; export.json has sizes before and after, and the removed weights."
    made = CommandParser("export", about, f"formats:\n{forms}\n{EXPORT_EXAMPLES}")
    add = made.add_argument
    add("RUN", type=Path, help="a run directory, a model folder with pruning/, or another export")
    add("--to", required=True, choices=[*FORMATS], metavar="FORMAT", help=" or ".join(FORMATS))
    add("--out", required=True, type=Path, metavar="DIR", help="folder to write; an earlier export there is replaced, "
        "anything else refused")  # fmt: skip
    add("--verify", action="store_true", help="load the export in a fresh process, run it on the whole test split and "
        "compare with the run's own predictions")  # fmt: skip
    for name, row in FORMATS.items():
        taken = made._option_string_actions
        own = [s for s in settings_of(row.format()) if flag_of(s.name) not in taken]  # formats may share a setting
        add_settings(made, own, f"--to {name}")
    return made


def run_export(options: Any) -> None:
    """Write the export, then print sizes and how to load it."""
    given, own = vars(options), {f.name for f in fields(FORMATS[options.to].format)}
    every = {s.name: s for row in FORMATS.values() for s in settings_of(row.format())}
    if foreign := sorted((given.keys() & every.keys()) - own):
        owners = [name for name, row in FORMATS.items() if foreign[0] in {f.name for f in fields(row.format)}]
        raise UserError(
            f"this is a setting of --to {' and '.join(owners)}, not of {options.to}; leave it out", foreign[0]
        )
    settings = vars(fill_settings(FORMATS[options.to].format(), read_settings(given, every.values())))
    written = (verified_export if options.verify else write_export)(options.RUN, options.to, options.out, settings)
    print_export(written.facts, SafeConsole())
    print_line(f"{options.to:7} {written.path}")


def benchmark_parser() -> CommandParser:
    """Return the parser of `benchmark`."""
    about = "Benchmark pruned models: size, FLOPs, and the time of a batch relative to the dense model, interleaved."
    made = CommandParser("benchmark", about, BENCHMARK_EXAMPLES)
    made.add_argument("RUN", type=Path, nargs="+", help="a run directory, a model folder with pruning/, or an export")
    add_settings(made, settings_of(BenchmarkConfig()))
    return made


def run_benchmark_command(options: Any) -> None:
    """Measure, print and save."""
    how = fill_settings(BenchmarkConfig(), read_settings(vars(options), settings_of(BenchmarkConfig())))
    with SafeConsole(stderr=True).status("measuring") as status:
        tables = run_benchmark(options.RUN, how, note=status.update)
    print_benchmark(tables, SafeConsole())
    for path in write_tables(options.RUN, tables):
        print_line(f"tables  {path}")


def push_parser() -> CommandParser:
    """Return the parser of `push`."""
    about = "Upload a model to the Hub: its weights, its masks in pruning/, and a model card with scores and cost."
    made = CommandParser("push", about, PUSH_EXAMPLES)
    add = made.add_argument
    add("RUN", type=Path, help="a finished run's directory, or an export")
    add("REPO", help="its name on the Hub: owner/name")
    add("--dry-run", action="store_true", help="write the folder and upload nothing")
    add("--out", type=Path, metavar="DIR", help="with --dry-run: the folder to write (default: ./name)")
    add("--private", action="store_true", help="make a new repository private")
    add("--license", default="unknown", help="as the Hub calls it, such as apache-2.0 (default: unknown)")
    add("--token-from-env", default="", metavar="NAME", help="environment variable that holds the token (default: "
        "HF_TOKEN, else the one of `hf auth login`)")  # fmt: skip
    return made


def run_push(options: Any) -> None:
    """Upload, or write what would be uploaded."""
    if options.out is not None and not options.dry_run:
        raise UserError("--out is where --dry-run writes the folder; add --dry-run, or leave --out out")
    folder = options.out or Path(options.REPO.rpartition("/")[2] or options.REPO)
    out = folder if options.dry_run else None
    rest = {"private": options.private, "license": options.license, "token_from_env": options.token_from_env}
    print_line(f"model   {push_to_hub(options.RUN, options.REPO, out=out, **rest)}")
    if options.dry_run:
        kind = "the private" if options.private else "the"
        print_line(f"upload  nothing; without --dry-run, to {kind} repository {options.REPO}")


COMMANDS = {
    "export": Command(parser=export_parser, run=run_export),
    "benchmark": Command(parser=benchmark_parser, run=run_benchmark_command),
    "push": Command(parser=push_parser, run=run_push),
}
