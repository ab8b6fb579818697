"""Commands on runs and methods: `test`, `show`, `methods`, `apply`."""

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from docstring_parser import parse

from sparsesoup.cli.command import Command, CommandParser, help_of
from sparsesoup.core.settings import Setting, flag_of, settings_of
from sparsesoup.methods import METHODS, TABLE, Method
from sparsesoup.report.escaping import SafeConsole, print_line, text_table
from sparsesoup.runs.config import method_named
from sparsesoup.runs.summary import format_scores


def test_parser() -> CommandParser:
    """Return the parser of `test`."""
    made = CommandParser("test", "Score a run on the test split, once; later calls print the recorded scores.")
    made.add_argument("RUN", type=Path, help="a run directory")
    made.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:<number> or mps (default: the first "
        "accelerator, else cpu)")  # fmt: skip
    return made


def run_test(options: Any) -> None:
    """Score a run on its test split."""
    from sparsesoup.runs.run import evaluate_finished_run
    from sparsesoup.training.device import choose_device

    if options.device:
        choose_device(options.device)
    scores = evaluate_finished_run(options.RUN, SafeConsole(stderr=True)).report["test"]
    several = all(isinstance(value, dict) for value in scores.values())
    for part, table in scores.items() if several else [("", scores)]:
        print_line(f"test{f' {part}' if part else ''}: {format_scores(table)}")


def show_parser() -> CommandParser:
    """Return the parser of `show`."""
    made = CommandParser("show", "Print the result of a run: sparsity by matrix, cost, agreement of masks, origin.")
    made.add_argument("RUN", type=Path, help="a run directory")
    return made


def run_show(options: Any) -> None:
    """Print the report of a run."""
    from sparsesoup.report.terminal import show_run

    show_run(options.RUN, SafeConsole())


def apply_parser() -> CommandParser:
    """Return the parser of `apply`."""
    example = "example:\n  sparsesoup apply runs/glue/sst2/isp-0123456789/seed-0 --model bert-base-uncased --out sparse"
    made = CommandParser("apply", "Make a copy of the base model sparse by a ticket's masks.", example)
    made.add_argument("TICKET", type=Path, help="run directory, model folder or pruning folder")
    made.add_argument("--model", required=True, help="the base model: Hub id, folder, or minilm")
    made.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; must not exist")
    made.add_argument("--other-weights", action="store_true", help="allow a model whose weights differ from the "
                      "ticket's base")  # fmt: skip
    return made


def run_apply(options: Any) -> None:
    """Write a model pruned by a ticket's masks."""
    from sparsesoup.hub.models.tickets import apply_ticket
    from sparsesoup.hub.models.weights import LoadingNotes

    account = LoadingNotes()
    kept, total = apply_ticket(options.TICKET, options.model, options.out, options.other_weights, account)
    for note in account.notes:
        print_line(f"note: {note}", sys.stderr)
    print_line(f"{kept:,} of {total:,} prunable weights kept; model written to {options.out}")


def methods_parser() -> CommandParser:
    """Return the parser of `methods`."""
    about = "Print the table of methods; or one method with its settings, defaults and source."
    made = CommandParser("methods", about)
    made.add_argument("NAME", nargs="?", help="of a method, such as isp")
    return made


def run_methods(options: Any) -> None:
    """Print the table of methods, or one method."""
    if options.NAME is not None:
        method_named(options.NAME)
        return print_method(options.NAME)
    console = SafeConsole()
    wide = console.width >= 130  # otherwise every summary would take five lines
    columns = ("method", "family", "score", "cost in T", "source", *(["what it does"] if wide else []))
    rows = [(name, r.family, r.score, r.cost, r.source, *([r.summary] if wide else [])) for name, r in TABLE.items()]
    console.print(text_table(columns, rows, left=len(columns)))
    structured = ", ".join(name for name, row in TABLE.items() if hasattr(row.method, "structure"))
    console.print(
        "\nT: the steps of one normal fine-tuning. `sparsesoup methods NAME` says what one does, with its settings.\n"
        f"--method.structure (whole rows, columns, heads or units, for --to compact) is taken by {structured}."
    )


def print_method(name: str) -> None:
    """Print what a method does, with its settings, their defaults and meaning."""
    console, method, row = SafeConsole(), METHODS[name], TABLE[name]
    text = parse(type(method).__doc__ or "")
    console.print(f"[bold]{name}[/bold]: {row.summary}\n", highlight=False)
    console.print(f"{text.short_description}\n{text.long_description or ''}".strip(), highlight=False)
    facts = {"family": row.family, "score": row.score, "cost": f"{row.cost} (in T)"}
    facts["source"] = row.source or "plain fine-tuning"
    console.print("\n" + "\n".join(f"{key:7} {value}" for key, value in facts.items()) + "\n", highlight=False)
    if rows := list(_setting_rows(method)):
        console.print(text_table(("setting", "default", "meaning"), rows, left=3))
    else:
        console.print("no settings of its own")


def _setting_rows(method: Method) -> Iterator[tuple[str, str, str]]:
    """Yield (flag, default, meaning) of the settings of a method; of a group of settings its meaning first."""
    settings, seen = list(settings_of(method, "method")), {"method"}
    owners = {s.name.rpartition(".")[0]: s.owner for s in settings}
    for setting in settings:
        group = setting.name.rpartition(".")[0]
        above = group.rpartition(".")[0]
        if group not in seen:
            seen.add(group)
            meaning = help_of(Setting(group, None, None, owners.get(above)))
            yield "  " * above.count(".") + f"{flag_of(group)}.*", "", meaning
        yield "  " * group.count(".") + flag_of(setting.name), _plain_value(setting.value), help_of(setting)


def _plain_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "\n".join(map(_plain_value, value))
    return ", ".join(f"{f.name} {getattr(value, f.name)}" for f in fields(value)) if is_dataclass(value) else str(value)


COMMANDS = {
    "test": Command(parser=test_parser, run=run_test),
    "show": Command(parser=show_parser, run=run_show),
    "apply": Command(parser=apply_parser, run=run_apply),
    "methods": Command(parser=methods_parser, run=run_methods),
}
