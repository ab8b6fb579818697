"""Digests of the files of a run and of an export, stored in report.json and export.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsesoup.core.files import DIGESTS, check_digests, digests_of, read_table

REPORT, EXPORT, LOG = "report.json", "export.json", "log.jsonl"
CHANGED = "if it was changed on purpose, keep it in a separate folder"


def digests_of_run(run: Path) -> dict[str, str]:
    """Return name -> digest for the files of a finished run beside report.json: its log and all of model/."""
    files = [path for path in (run / "model").rglob("*") if path.is_file()]
    names = [str(path.relative_to(run)) for path in files]
    return digests_of(run, [*names, *([LOG] if (run / LOG).is_file() else [])])


def check_run(run: Path, report: Mapping[str, Any]) -> bool:
    """Verify the files of a finished run; return False for a run of an older version without digests.

    Raises: UserError naming the first file that is missing or has changed. The log alone may be missing.
    """
    if DIGESTS not in report:
        return False
    remedy = f"put it back, or remove {run} and repeat the `prune` command, which runs it again; {CHANGED}"
    check_digests(run, report[DIGESTS], REPORT, remedy, "run", optional=[LOG])
    return True


def check_export(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Verify the files of an export as `check_run` does for a run; its model card may be edited."""
    if DIGESTS not in facts:
        return False
    table = facts[DIGESTS]
    if isinstance(table, Mapping):
        table = {name: digest for name, digest in table.items() if not str(name).endswith(".md")}
    remedy = f"export it again; {CHANGED}, without {EXPORT}"
    check_digests(folder, table, EXPORT, remedy, "export")
    return True


def check_model(folder: Path) -> None:
    """Verify the files of a model folder written by a run or an export; other folders are not checked.

    Raises: UserError naming the first file that is missing or has changed.
    """
    folder = folder.resolve()
    if (folder / EXPORT).is_file():
        check_export(folder, read_table(folder / EXPORT, "export", "export it again"))
    elif folder.name == "model" and (folder.parent / REPORT).is_file():
        check_run(folder.parent, read_table(folder.parent / REPORT, "report", "put it back"))
