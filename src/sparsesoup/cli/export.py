"""The command line of exports: flags from the table of formats, and the terminal summary."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from docstring_parser import parse
from rich.console import Console
from rich.text import Text

from sparsesoup.core.errors import UserError
from sparsesoup.exports import FORMATS
from sparsesoup.report.console import text_table
from sparsesoup.report.format import format_percent
from sparsesoup.report.terminal import flatten_scores
from sparsesoup.runs.config_parser import CommandParser

ABOUT = "Export a pruned model to another format; export.json has sizes before and after, and the removed weights."
EXAMPLES = """
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


def read_export_arguments(arguments: Sequence[str]) -> tuple[Path, str, Path, dict[str, Any], bool]:
    """Return (run, format, output folder, the format's settings, verify) from a command line.

    Raises: UserError naming the invalid flag; SystemExit after help.
    """
    given = vars(export_parser().parse_args(arguments))
    run, to, out, verify = given.pop("RUN"), given.pop("to"), given.pop("out"), given.pop("verify")
    known = {f.name for f in fields(FORMATS[to].format)}
    if foreign := sorted(given.keys() - known):
        owners = [name for name, row in FORMATS.items() if foreign[0] in {f.name for f in fields(row.format)}]
        raise UserError(
            f"--{foreign[0].replace('_', '-')} is a setting of --to {' and '.join(owners)}, not of {to}; leave it out"
        )
    return run, to, out, given, verify


def export_parser() -> CommandParser:
    """Return the parser of all formats' flags together; flags that are not set are absent."""
    forms = "\n".join(f"  {name:15} {row.summary}: {row.gain}" for name, row in FORMATS.items())
    made = CommandParser(
        prog="sparsesoup export", description=ABOUT, allow_abbrev=False,
        epilog=f"formats:\n{forms}\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("RUN", type=Path, help="a run directory, a model folder with pruning/, or another export")
    made.add_argument("--to", required=True, choices=[*FORMATS], metavar="FORMAT", help=" or ".join(FORMATS))
    made.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; an earlier export there "
                      "is replaced, anything else refused")  # fmt: skip
    made.add_argument("--verify", action="store_true", help="load the export in a fresh process, run it on the whole "
                      "test split and compare with the run's own predictions")  # fmt: skip
    for name, options in _format_settings().items():
        made.add_argument(f"--{name.replace('_', '-')}", dest=name, **options)
    return made


def _format_settings() -> dict[str, dict[str, Any]]:
    """Return setting -> argparse options; a setting shared by several formats appears once."""
    found: dict[str, dict[str, Any]] = {}
    for name, row in FORMATS.items():
        meaning = {p.arg_name: p.description or "" for p in parse(row.format.__doc__ or "").params}
        hints = get_type_hints(row.format)
        for f in fields(row.format):
            told = f"{name}: {' '.join(meaning.get(f.name, '').split()).rstrip('.')}{_describe_default(f)}"
            if f.name in found:
                found[f.name]["help"] += f". {told}"
            else:
                found[f.name] = {"help": told, "default": argparse.SUPPRESS, **_argparse_type(hints[f.name])}
    return found


def _describe_default(f: "Field[Any]") -> str:
    return "" if f.default is MISSING or isinstance(f.default, bool) else f" (default {f.default})"


def _argparse_type(hint: Any) -> dict[str, Any]:
    if hint is bool:
        return {"action": "store_true"}
    return {"choices": get_args(hint)} if get_origin(hint) is Literal else {"type": hint}


def print_export(facts: Mapping[str, Any], console: Console) -> None:
    """Print a summary of an export: sizes before and after, weights removed by layer, how to load it."""
    names = {"weights": "weights on disk, bytes", "encoder": "  of its blocks, bytes", "parameters": "parameters",
             "nonzero": "  not zero"}  # fmt: skip
    rows = [
        (names[key], f"{before:,}", f"{after:,}", format_percent(after / before) if before else "")
        for key, (before, after) in facts["sizes"].items()
    ]
    console.print(text_table(("", "before", "after", "left"), rows))
    columns = [key for key in (facts["layers"] or [{}])[0] if key != "layer"]
    layers = [
        (row["layer"], *(f"{row[key][1]:,} of {row[key][0]:,}" if key in row else "" for key in columns))
        for row in facts["layers"]
    ]
    if layers:
        console.print()
        console.print(text_table(("layer", *columns), layers))
    for note in facts["notes"]:
        console.print(Text(f"{note}."))
    if "verified" in facts:
        console.print(Text(verification_sentence(facts["verified"])))
    console.print(Text(f"load    {facts['load']}"), soft_wrap=True)  # one line, for copying


def verification_sentence(found: Mapping[str, Any]) -> str:
    """Return the result of a verification in one sentence."""
    one, other = (
        ", ".join(f"{name} {value:.4f}" for name, value in flatten_scores(found[key]).items())
        for key in ("scores", "scores_of_source")
    )
    where = "in a fresh process" + (" without sparsesoup" if found["without_sparsesoup"] else "")
    return (
        f"Verified {where}: {found['same']:,} of {found['rows']:,} predictions on the test split are those of the "
        f"source, outputs differ by {found['largest_difference']:.3g} at most; {one}, of the source {other}."
    )
