"""The command line: prune, test, show, methods, apply, export, benchmark, push, compare."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import disk_full, is_disk_full
from sparsesoup.report.console import SafeConsole, print_line

NO_WRITING = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EPERM, errno.ENAMETOOLONG,
              errno.ELOOP)  # fmt: skip
RESUMED = ("prune", "compare")  # commands that save their work and can resume
USAGE = """sparsesoup: lottery-ticket-quality sparse subnetworks of pre-trained transformers

  sparsesoup prune METHOD [--model M] [--dataset D] [--sparsity S] [--steps N | --epochs X] [--seed N] [--out DIR]
                          [--config recipe.yaml] [--method.FIELD V] [--train.FIELD V] ...
                          prune a model of texts or images; repeat the command to resume after a kill
  sparsesoup test RUN     score on the test split, written into the run's report once
  sparsesoup show RUN     sparsity by matrix, cost by label, agreement, where it came from
  sparsesoup methods [NAME]                      table of methods; one method with its settings, defaults, source
  sparsesoup apply TICKET --model M --out DIR    apply a ticket's masks to any copy of the base model
  sparsesoup export RUN --to FORMAT --out DIR    dense, packed (small), compact (small, fast), onnx, ...
  sparsesoup benchmark RUN_OR_EXPORT ...         size, FLOPs and speed relative to the dense model, by backend
  sparsesoup push RUN REPO [--dry-run]           upload a run or an export to the Hub, with a model card

  sparsesoup compare --config study.yaml [--workers N] | RUN RUN ...
                          many methods, sparsities, seeds and datasets as one resumable study: a table and a page

`sparsesoup prune --help` has the common settings, `sparsesoup prune isp --help` also those of isp. D is text or
images: a name on the Hub, a file or folder of parquet, csv, tsv or jsonl, or a folder of images with a folder a class.
With only a method it prunes the embedded model on the embedded dataset (pip install 'sparsesoup[demo]').
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 for a study with failed runs, 2 for bad input, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if given else 2
    if given[0] == "--version":
        print(f"sparsesoup {version('sparsesoup')}")
        return 0
    try:
        _check_text(given)
        return _run_command(given[0], given[1:])
    except KeyboardInterrupt:
        way = "resume from the last save" if given[0] in RESUMED else "start over"
        return _print_error(f"interrupted; repeat the command to {way}", 130)
    except BrokenPipeError:
        # The reader of a pipe (head) has closed it; flushing the rest at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        from sparsesoup.cli.messages import as_settings

        return _print_error(as_settings(given[0], str(error)))
    except Exception as error:
        # In a copy the second name is the file written.
        where = getattr(error, "filename2", None) or getattr(error, "filename", None)
        if is_disk_full(error):
            return _print_error(disk_full(where or "while writing", error))
        if isinstance(error, OSError) and error.errno in NO_WRITING:
            return _print_error(f"cannot write {where}: {error.strerror}; name a place that can be written to")
        raise


def _check_text(arguments: Sequence[str]) -> None:
    """Raise a UserError for file names that are not text: they cannot be written to a recipe or a report."""
    for word in arguments:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{word!r} holds bytes that are no text (UTF-8); rename the file or folder") from error


def _run_command(command: str, arguments: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int | None]] = {
        "prune": _prune_command,
        "test": _test_command,
        "show": _show_command,
        "methods": _methods_command,
        "apply": _apply_command,
        "export": _export_command,
        "benchmark": _benchmark_command,
        "push": _push_command,
        "compare": _compare_command,
    }
    if command not in commands:
        raise UserError(f"unknown command {command!r}; allowed: {', '.join(commands)} (see `sparsesoup --help`)")
    return commands[command](arguments) or 0


def _prune_command(arguments: list[str]) -> None:
    from sparsesoup.report.format import run_warnings
    from sparsesoup.runs.config import parser_for
    from sparsesoup.runs.run import from_arguments

    if arguments and arguments[0] in ("-h", "--help"):
        print(parser_for(None).format_help(), end="")
        return
    run = from_arguments(arguments, SafeConsole(stderr=True))
    report, scores = run.report, _format_scores(run.report["validation"])
    reached = report["sparsity"]
    for line in run_warnings(report):
        print_line(f"note: {line}", sys.stderr)
    print_line(f"{report['method']}: {reached['kept']} of {reached['total']} weights kept, validation {scores}")
    print_line(f"report  {run.path / 'report.html'}")
    print_line(f"model   {run.path / 'model'}")


def _test_command(arguments: list[str]) -> None:
    from sparsesoup.runs.run import evaluate_finished_run

    options = _parse_options(
        "test", "Score a run on the test split, once; later calls read what was written.", arguments
    )
    run = evaluate_finished_run(options.RUN, SafeConsole(stderr=True))
    scores = run.report["test"]
    if all(isinstance(value, dict) for value in scores.values()):
        for part, table in scores.items():
            print_line(f"test {part}: {_format_scores(table)}")
    else:
        print_line(f"test: {_format_scores(scores)}")


def _show_command(arguments: list[str]) -> None:
    from sparsesoup.report.terminal import show_run

    options = _parse_options("show", "Print what a run found: sparsity by matrix, cost, agreement, origin.", arguments)
    show_run(options.RUN, SafeConsole())


def _apply_command(arguments: list[str]) -> None:
    from sparsesoup.hub.models.apply_ticket import apply_ticket
    from sparsesoup.hub.models.weights import LoadingNotes

    options = _parse_options(
        "apply", "Make a copy of the base model sparse by a ticket's masks.", arguments, apply=True
    )
    account = LoadingNotes()
    kept, total = apply_ticket(options.RUN, options.model, options.out, options.other_weights, account)
    for note in account.notes:
        print_line(f"note: {note}", sys.stderr)
    print_line(f"{kept} of {total} prunable weights kept; model written to {options.out}")


def _export_command(arguments: list[str]) -> None:
    from sparsesoup.cli.export import print_export, read_export_arguments
    from sparsesoup.exports import write_export
    from sparsesoup.exports.verify import verified_export

    run, to, out, settings, verify = read_export_arguments(arguments)
    written = (verified_export if verify else write_export)(run, to, out, settings)
    print_export(written.facts, SafeConsole())
    print_line(f"{to:7} {written.path}")


def _benchmark_command(arguments: list[str]) -> None:
    from sparsesoup.cli.benchmark import run_benchmark_command

    run_benchmark_command(arguments)


def _push_command(arguments: list[str]) -> None:
    from sparsesoup.exports.push import push_to_hub, read_push_arguments

    settings = read_push_arguments(arguments)
    written = push_to_hub(settings.pop("run"), settings.pop("repo"), **settings)
    print_line(f"model   {written}")


def _compare_command(arguments: list[str]) -> int:
    from sparsesoup.cli.study_flags import read_study_arguments

    options = read_study_arguments(arguments)  # before slow imports, which take seconds
    from sparsesoup.cli.study import run_study_command

    return run_study_command(options)


def _parse_options(command: str, about: str, arguments: list[str], apply: bool = False) -> Any:
    from pathlib import Path

    from sparsesoup.runs.config_parser import CommandParser

    parser = CommandParser(prog=f"sparsesoup {command}", description=about)
    parser.add_argument("RUN", type=Path, metavar="TICKET" if apply else "RUN", help="a run directory")
    if apply:
        parser.add_argument("--model", required=True, help="the base model: Hub id, folder, or minilm")
        parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
        parser.add_argument(
            "--other-weights", action="store_true", help="also on a model whose weights differ from the ticket's base"
        )
    return parser.parse_args(arguments)


def _methods_command(arguments: list[str]) -> None:
    from sparsesoup.runs.config import method_named

    console = SafeConsole()
    if arguments and arguments[0] in ("-h", "--help"):
        print("sparsesoup methods [NAME]: the table of methods; one method with its settings, defaults and source")
    elif arguments:
        if arguments[1:]:
            raise UserError(f"methods takes one name, got {' '.join(arguments)}")
        method_named(arguments[0])
        _one_method(arguments[0], console)
    else:
        _all_methods(console)


def _all_methods(console: Console) -> None:
    from sparsesoup.methods import TABLE

    wide = console.width >= 130  # otherwise every summary would take five lines
    columns = ("method", "family", "score", "cost in T", "source", *(["what it does"] if wide else []))
    table = Table(box=None, pad_edge=False)
    table.add_column(columns[0], no_wrap=True, min_width=max(map(len, TABLE)))
    for column in columns[1:]:
        table.add_column(column, overflow="fold")  # wrap long formulas instead of cutting them
    for name, row in TABLE.items():
        table.add_row(name, row.family, row.score, row.cost, row.source, *([row.summary] if wide else []))
    console.print(table)
    console.print(
        "\nT: the steps of one normal fine-tuning. `sparsesoup methods NAME` says what one does, with its settings."
    )
    structured = ", ".join(name for name, row in TABLE.items() if hasattr(row.method, "structure"))
    console.print(
        f"--method.structure (whole rows, columns, heads or units, for --to compact) is taken by {structured}."
    )


def _one_method(name: str, console: Console) -> None:
    from docstring_parser import parse

    from sparsesoup.methods import METHODS, TABLE

    method, row = METHODS[name], TABLE[name]
    text = parse(type(method).__doc__ or "")
    meaning = {p.arg_name: p.description or "" for p in text.params}
    console.print(f"[bold]{name}[/bold]: {row.summary}\n", highlight=False)
    console.print(f"{text.short_description}\n{text.long_description or ''}".strip(), highlight=False)
    facts = {"family": row.family, "score": row.score, "cost": f"{row.cost} (in T)"}
    facts["source"] = row.source or "plain fine-tuning"
    console.print("\n" + "\n".join(f"{key:7} {value}" for key, value in facts.items()) + "\n", highlight=False)
    settings = fields(cast(Any, method))
    table = Table("setting", "default", "meaning", box=None, pad_edge=False)
    for f in settings:
        value, flag = getattr(method, f.name), f"--method.{f.name.replace('_', '-')}"
        inner = fields(value) if hasattr(value, "__dataclass_fields__") else ()
        table.add_row(flag if not inner else f"{flag}.*", "" if inner else _plain_value(value), meaning.get(f.name, ""))
        for part in inner:
            table.add_row(f"  {flag}.{part.name.replace('_', '-')}", _plain_value(getattr(value, part.name)), "")
    console.print(table if settings else "no settings of its own")


def _plain_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "\n".join(_plain_value(v) for v in value)
    if hasattr(value, "__dataclass_fields__"):
        return ", ".join(f"{f.name} {getattr(value, f.name)}" for f in fields(value))
    return str(value)


def _format_scores(table: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in table.items())


def _print_error(message: str, code: int = 2) -> int:
    print_line(f"sparsesoup: {' '.join(message.split())}", sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
