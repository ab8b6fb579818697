"""Write the generated pages of the site: a page a method, the command line, the API, and files of the root.

Run by mkdocs through the plugin gen-files; nothing is written into docs/.
"""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import mkdocs_gen_files
from docstring_parser import parse

import sparsesoup
from sparsesoup.methods import TABLE, MethodInfo

ROOT = Path(__file__).parents[1]
COMMANDS = ("prune", "test", "show", "methods", "apply", "export", "benchmark", "push", "compare", "completion")
API = {
    "Commands": "prune evaluate_on_test compare export apply push benchmark",
    "Runs and tickets": "Run Ticket load_masks Problem UserError",
    "In your own code": "prune_model prune_trainer PrunedModel PruningCallback attach Pruner prune_once Observer",
    "Settings": "TrainingConfig DistillConfig TrainingOverrides",
    "Load and fine-tune": "load_packed load_compact load_low_rank load_semi_structured hold_zeros SparsityCallback "
    "from_open_clip",
    "Table of methods": "METHODS Method MethodInfo Phase RunSize",
}


def write(path: str, *parts: str) -> None:
    with mkdocs_gen_files.open(path, "w") as page:
        page.write("\n\n".join(part for part in parts if part) + "\n")


def in_table(text: object) -> str:
    """A text as it may stand in a cell of a table: no bar, and no tag."""
    return " ".join(str(text).split()).replace("<", "&lt;").replace("|", "&#124;")


def code(text: str) -> str:
    """A text as code in a cell of a table; between backticks an escaped bar would be shown with its escape."""
    return f"<code>{in_table(text)}</code>"


def plain_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "; ".join(map(plain_value, value)) or "none"
    if hasattr(value, "__dataclass_fields__"):
        return ", ".join(f"{f.name} {getattr(value, f.name)}" for f in fields(value))
    return str(value) if value != "" else '""'


def papers_section(name: str) -> str:
    """The anchor of a method's section in papers.md; that of its family's first method where it has none."""
    for heading in re.findall(r"^##+ (.+)$", (ROOT / "docs" / "papers.md").read_text(encoding="utf-8"), re.M):
        if name in re.split(r",\s*", heading):
            return "#" + re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()))
    return papers_section("isp") if name.startswith("isp") else ""


def method_page(name: str, row: MethodInfo) -> None:
    method: Any = row.method
    text = parse(type(method).__doc__ or "")
    meaning = {p.arg_name: p.description or "" for p in text.params}
    facts = {"family": in_table(row.family), "score": code(row.score), "cost, in T": in_table(row.cost),
             "source": in_table(row.source or "plain fine-tuning")}  # fmt: skip
    listed = [f"- {key}: {value}" for key, value in facts.items()]
    settings = ["| setting | default | meaning |", "|---|---|---|"]
    for f in fields(method):
        value, flag = getattr(method, f.name), f"--method.{f.name.replace('_', '-')}"
        fixed = " (fixed)" if f.name in row.fixed else ""
        settings.append(f"| `{flag}`{fixed} | {in_table(plain_value(value))} | {in_table(meaning.get(f.name, ''))} |")
    write(
        f"methods/{name}.md",
        f"# {name}",
        f"{row.summary[0].upper()}{row.summary[1:]}.",
        "\n".join(listed),
        text.short_description or "",
        text.long_description or "",
        "## Settings",
        "\n".join(settings) if len(settings) > 2 else "This method has no settings of its own.",
        f"Settings of the training (`--train.*`) are in the [CLI reference](../cli.md#prune). The source of each "
        f"setting, and our departures from it: [papers](../papers.md{papers_section(name)}).",
        f"From Python: `sparsesoup.METHODS[\"{name}\"]`, a `sparsesoup.{type(method).__name__}`.",
    )  # fmt: skip


def method_index() -> None:
    lines = ["| method | family | score | cost in T | source |", "|---|---|---|---|---|"]
    for name, row in TABLE.items():
        cells = (f"[{name}]({name}.md)", row.family, code(row.score), in_table(row.cost), in_table(row.source))
        lines.append("| " + " | ".join(cells) + " |")
    write("methods/index.md", "# Methods", "T is the number of steps of one normal fine-tuning.", "\n".join(lines))
    write("methods/SUMMARY.md", "\n".join(["* [Table](index.md)", *(f"* [{name}]({name}.md)" for name in TABLE)]))


def help_of(*words: str) -> str:
    """What a command prints on --help."""
    command = [sys.executable, "-m", "sparsesoup", *words, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "95"})
    return done.stdout.rstrip()


def cli_page() -> None:
    parts = ["# CLI reference", f"```text\n{help_of()}\n```"]
    for command in COMMANDS:
        parts += [f"## {command}", f"```text\n{help_of(command)}\n```"]
    write("cli.md", *parts)


def api_page() -> None:
    methods = sorted({type(row.method).__name__ for row in TABLE.values()} & {*sparsesoup.__all__})
    parts = [
        "# API reference",
        "All names here are imported from `sparsesoup`. They are public; see [what may change](stability.md).",
    ]
    for title, names in {**API, "Methods": " ".join(methods)}.items():
        parts += [f"## {title}", *(f"::: sparsesoup.{name}" for name in names.split())]
    write("api.md", *parts)


for name, row in TABLE.items():
    method_page(name, row)
method_index()
cli_page()
api_page()
for page, source in (("contributing.md", "CONTRIBUTING.md"), ("changelog.md", "CHANGELOG.md")):
    write(page, (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](").rstrip())
