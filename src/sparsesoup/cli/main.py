"""The command line: `sparsesoup COMMAND ...`."""

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

from sparsesoup.core.errors import Interrupted, UserError
from sparsesoup.core.files import disk_full, is_disk_full
from sparsesoup.core.single_process import require_single_process
from sparsesoup.report.escaping import print_line

NO_WRITING = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EPERM, errno.ENAMETOOLONG,
              errno.ELOOP)  # fmt: skip
COMMANDS = {  # name -> (module with its Command, arguments, summary)
    "prune": ("prune", "METHOD [--model M] [--dataset D] [--sparsity S] ...",
              "prune a model of texts or images; repeat the command to resume after a kill"),
    "test": ("runs", "RUN", "score on the test split, written into the run's report once"),
    "show": ("runs", "RUN", "sparsity by matrix, cost by label, agreement, where it came from"),
    "methods": ("runs", "[NAME]", "table of methods; one method with its settings, defaults, source"),
    "apply": ("runs", "TICKET --model M --out DIR", "apply a ticket's masks to any copy of the base model"),
    "export": ("exports", "RUN --to FORMAT --out DIR", "dense, packed (small), compact (small, fast), onnx, ..."),
    "benchmark": ("exports", "RUN_OR_EXPORT ...", "size, FLOPs and speed relative to the dense model, by backend"),
    "push": ("exports", "RUN REPO [--dry-run]", "upload a run or an export to the Hub, with a model card"),
    "compare": ("compare", "--config study.yaml | RUN RUN ...",
                "many methods, sparsities, seeds and datasets as one resumable study: a table and a page"),
    "completion": ("completion", "bash|zsh|fish", "print the completion script of a shell"),
}  # fmt: skip
ABOUT = "sparsesoup: lottery-ticket-quality sparse subnetworks of pre-trained transformers\n"
EXAMPLE = """
  sparsesoup prune isp --dataset glue/cola --model bert-base-uncased --sparsity 0.7    prints where the run is,
  sparsesoup test RUN; sparsesoup export RUN --to packed --out small                   RUN in what comes next

`sparsesoup COMMAND --help` has the flags of a command, `sparsesoup prune isp --help` also the settings of isp. D is
texts or images: a name on the Hub, a file or folder of parquet, csv, tsv or jsonl, or a folder of images with a folder
per class. With only a method it prunes the embedded model on the embedded dataset (pip install 'sparsesoup[demo]').
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 for a study with failed runs, 2 for bad input, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        lines = [f"  sparsesoup {name} {usage}\n      {summary}\n" for name, (_, usage, summary) in COMMANDS.items()]
        print("\n".join([ABOUT, "".join(lines)]) + EXAMPLE, end="")
        return 0 if given else 2
    if given[0] == "--version":
        print(f"sparsesoup {version('sparsesoup')}")
        return 0
    try:
        _check_text(given)
        require_single_process()
        command = load_command(given[0])
        return command.run(command.parse_words(given[1:])) or 0
    except Interrupted:
        return _print_error("interrupted; repeat the command to resume from the last save", 130)
    except KeyboardInterrupt:
        return _print_error("interrupted, and nothing new is saved; repeat the command to run it again", 130)
    except BrokenPipeError:
        # The reader of a pipe (head) has closed it; flushing the rest at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        return _print_error(error.with_names(lambda name: _spell_setting(given[0], name)))
    except Exception as error:
        # In a copy the second name is the file written.
        where = getattr(error, "filename2", None) or getattr(error, "filename", None)
        if is_disk_full(error):
            return _print_error(disk_full(where or "while writing", error))
        if isinstance(error, OSError) and error.errno in NO_WRITING:
            return _print_error(f"cannot write {where}: {error.strerror}; name a place that can be written to")
        raise


def load_command(name: str) -> Any:
    """Return the Command of that name; its module is imported now, since torch takes seconds.

    Raises: UserError if there is none.
    """
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; allowed: {', '.join(COMMANDS)} (see `sparsesoup --help`)")
    return import_module(f"sparsesoup.cli.{COMMANDS[name][0]}").COMMANDS[name]


def _spell_setting(command: str, name: str) -> str:
    """Return the flag of a setting; its name for a command that reads it from a file and has no such flag."""
    flag = f"--{name.replace('_', '-')}"
    known = {flag} if command == "prune" else load_command(command).parser()._option_string_actions
    return flag if flag in known else name


def _check_text(arguments: Sequence[str]) -> None:
    """Raise a UserError for file names that are not text: they cannot be written to a recipe or a report."""
    for word in arguments:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{word!r} holds bytes that are no text (UTF-8); rename the file or folder") from error


def _print_error(message: str, code: int = 2) -> int:
    print_line(f"sparsesoup: {' '.join(message.split())}", sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
