"""Files that are written whole or not at all."""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sparsesoup.errors import UserError

UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary file or folder beside `path` that takes its place when the block ends well, and is removed if not.

    >>> with whole(Path("report.json")) as temporary:  # doctest: +SKIP
    ...     temporary.write_text("{}")
    """
    if path.is_symlink() and not path.is_file():
        path = path.resolve()  # what it points to is replaced, or made: on another disk, for instance
    make_folder(path.parent)
    # A number of this process would not do: on another machine that shares the folder one may have the same.
    # Nor would the name of the file: with anything added, a long one is too long.
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        yield temporary
        for file in [temporary] if temporary.is_file() else temporary.rglob("*"):
            _readable(file)
            _flush(file)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        remove(temporary)


def _readable(file: Path) -> None:
    """As readable as any file of this user: safetensors keeps what it writes from all others."""
    if file.is_file():
        file.chmod(0o666 & ~UMASK)


def locked(path: Path, patient: bool) -> IO[str]:
    """A lock file, open and locked; closing it gives it free. The folder is made if need be.

    Args:
        path: of the lock file; its folder is what is locked.
        patient: wait for who holds it.
    Raises: UserError if another process holds it and `patient` is not set.
    """
    make_folder(path.parent)
    file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - it is the caller's to close: that gives the lock free
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if patient else fcntl.LOCK_NB))
    except OSError as error:
        file.close()
        raise UserError(f"another process works on {path.parent}; wait for it or give another --out") from error
    if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
        return file
    file.close()  # who held it has removed it
    return locked(path, patient)


def make_folder(path: Path, flag: str = "--out") -> None:
    """Make a folder and those above it; `flag` is what places it.

    Raises: UserError if something is in the way, or the place takes no folders.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
        raise UserError(
            f"cannot make the folder {path}: {error.strerror} ({error.filename}); give another {flag}"
        ) from error


def _flush(path: Path) -> None:
    # Without fsync a power cut can leave the new name on an empty file.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def from_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises: ValueError if it is none, or if its lists and tables are nested deeper than they can be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("lists and tables are nested too deep") from error


def read_table(path: Path, what: str = "file", remedy: str = "make it again") -> dict[str, Any]:
    """A table in JSON.

    Raises: UserError if it cannot be read or is no table; `what` it is and the `remedy` are named.
    """
    try:
        found = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"damaged {what}: {path} cannot be read ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"damaged {what}: {path} holds no table; {remedy}")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; NaN is refused, since it is no JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
