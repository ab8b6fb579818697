"""Atomic writes and verified reads of files."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from sparsesoup.core.errors import UserError

UMASK = os.umask(0)  # reading it requires setting it
os.umask(UMASK)
DIGEST, DIGESTS = "digest", "digests"  # JSON keys: the digest of the table itself, and of the files it lists
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file or folder that replaces `path` if the block succeeds and is removed if it fails.

    An existing folder stays and its contents are replaced: it may be a mount point, or belong to the user.

    >>> with atomic_write(Path("report.json")) as temporary:  # doctest: +SKIP
    ...     temporary.write_text("{}")
    """
    with atomic_writes([path]) as (temporary,):
        yield temporary


@contextlib.contextmanager
def atomic_writes(paths: Sequence[Path]) -> Iterator[tuple[Path, ...]]:
    """Yield temporaries as `atomic_write` does for several paths; none is replaced before all are written.

    Raises: UserError if the disk is full; it names the file that did not fit.
    """
    # Replace or create the target of a symbolic link; it may be on another disk.
    destinations = [path.resolve() if path.is_symlink() and not path.is_file() else path for path in paths]
    for path in destinations:
        make_folder(path.parent)
    temporaries = tuple(_temporary_path(path) for path in destinations)
    try:
        yield temporaries
        for temporary in temporaries:
            for file in [temporary] if temporary.is_file() else temporary.rglob("*"):
                if file.is_file():
                    file.chmod(0o666 & ~UMASK)  # safetensors restricts its files to the owner
                _flush_folder(file)
        for temporary, path in zip(temporaries, destinations, strict=True):
            _replace_whole(temporary, path)
            _flush_folder(path.parent)
    except Exception as error:
        if listed_in := _message_of(error, dict(zip(temporaries, paths, strict=True))):
            raise UserError(listed_in) from error
        raise
    finally:
        for temporary in temporaries:
            remove_path(temporary)


@contextlib.contextmanager
def append_text(path: Path) -> Iterator[IO[str]]:
    """Open a text file to append to.

    Raises: UserError naming the file if the disk is full.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            yield file
    except OSError as error:
        if is_disk_full(error):
            raise UserError(disk_full(path, error)) from error
        raise


def _temporary_path(path: Path) -> Path:
    # The process id would not do: a process on another machine that shares the folder may have the same.
    # Nor would the file's name with a suffix: a long name would become too long.
    return (path if path.is_dir() else path.parent) / f".{secrets.token_hex(8)}.part"


def _replace_whole(temporary: Path, path: Path) -> None:
    if not path.is_dir():
        os.replace(temporary, path)
        return
    if not temporary.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    before, aside = [entry for entry in path.iterdir() if entry != temporary], _temporary_path(path)
    aside.mkdir()
    for entry in before:  # moves are instant, so a kill rarely comes between them
        os.replace(entry, aside / entry.name)
    for entry in temporary.iterdir():
        os.replace(entry, path / entry.name)
    _flush_folder(path)
    remove_path(aside)


def _message_of(error: Exception, destinations: Mapping[Path, Path]) -> str:
    """Return the message for a full disk, or for a temporary under the name of its target; else an empty string."""
    text = str(error) if isinstance(error, UserError) else ""
    if is_disk_full(error):
        written = [temporary for temporary in destinations if temporary.exists()] or [*destinations]
        # In a copy the second name is the file written; the first was only read.
        named = str(getattr(error, "filename2", None) or getattr(error, "filename", None))
        text = disk_full(Path(named) if named.startswith(tuple(map(str, destinations))) else written[-1], error)
    for temporary, path in destinations.items():
        text = text.replace(str(temporary), str(path))
    return text if text != str(error) else ""


def is_disk_full(error: Exception) -> bool:
    """Return True for an error of a full disk."""
    # safetensors raises its own error, with the error number only in its text.
    return getattr(error, "errno", None) in FULL or any(f"(os error {n})" in str(error) for n in FULL)


def disk_full(path: Path | str, error: Exception) -> str:
    """Return the message for a disk that is too full for a file."""
    return f"the disk is full ({path}: {getattr(error, 'strerror', None) or error}); free space and repeat the command"


@contextlib.contextmanager
def file_lock(path: Path, wait: bool) -> Iterator[None]:
    """Hold the lock file of a folder in this block; the folder is created if needed. With `wait`, wait for it.

    Raises: UserError if another process holds it and `wait` is False.
    """
    import filelock  # it takes longer to import than `--help` to print

    lock = filelock.FileLock(path, timeout=-1 if wait else 0)
    while not lock.is_locked:
        make_folder(path.parent)
        try:
            with contextlib.suppress(FileNotFoundError):  # the holder has just removed the whole folder
                lock.acquire()
        except filelock.Timeout as error:
            raise UserError(f"another process works on {path.parent}; wait for it or give another --out") from error
    try:
        yield
    finally:
        lock.release()


def make_folder(path: Path, flag: str = "--out") -> None:
    """Create a folder and its parents; `flag` is the option that sets its path.

    Raises: UserError if a file is in the way, or the folder cannot be created.
    """
    try:
        str(path).encode()  # a name that is not UTF-8 cannot be written to a config or a report
        path.mkdir(parents=True, exist_ok=True)
    except UnicodeEncodeError as error:
        raise UserError(f"the folder {str(path)!r} has a name that is no text (UTF-8); give another {flag}") from error
    except (FileExistsError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
        raise UserError(
            f"cannot make the folder {path}: {error.strerror} ({error.filename}); give another {flag}"
        ) from error


def _flush_folder(path: Path) -> None:
    # Without fsync a power cut can leave the new name on an empty file.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_path(path: Path) -> None:
    """Remove a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def from_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises: ValueError if it is invalid, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("lists and tables are nested too deep") from error


def load_table(path: Path) -> dict[str, Any]:
    """Read a JSON table and verify its digest, which is removed; a table of an older version has none.

    Raises: OSError or ValueError if it cannot be read, is not a table, or has changed.
    """
    found = from_json(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it holds no table")
    if DIGEST in found and found.pop(DIGEST) != _digest_of_table(found):
        raise ValueError(f'it is not as it was written; if it was changed on purpose, take its line "{DIGEST}" out')
    return found


def read_table(path: Path, what: str = "file", remedy: str = "make it again") -> dict[str, Any]:
    """Read a JSON table and verify its digest.

    Raises: UserError if it cannot be read, is not a table, or has changed; the message names `what` and the `remedy`.
    """
    try:
        return load_table(path)
    except (OSError, ValueError) as error:
        raise UserError(f"damaged {what}: {path} cannot be read ({error}); {remedy}") from error


def write_table(path: Path, table: Mapping[str, Any]) -> None:
    """Write a JSON table with its own digest, which `load_table` verifies."""
    plain = {key: value for key, value in table.items() if key != DIGEST}
    # First, so that its line can be deleted without touching another.
    write_json(path, {DIGEST: _digest_of_table(json.loads(json.dumps(plain))), **plain})


def _digest_of_table(table: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN is refused, since it is not valid JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes: the fastest hash of hashlib on processors with SHA instructions."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return name -> digest for files in a folder."""
    return {name: digest_of(folder / name) for name in sorted(names)}


def digest_of_files(paths: Iterable[Path]) -> str:
    """Return one digest of the names and contents of files."""
    table = {path.name: _digest_once(path) for path in sorted(paths)}
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def check_digest(path: Path, digest: object) -> None:
    """Raise a ValueError if a file does not match its digest; None means that no digest was recorded."""
    if digest is not None and _digest_once(path) != digest:
        raise ValueError("it is not the file that was written: its digest is another")


def check_digests(
    folder: Path, digests: object, listed_in: str, remedy: str, what: str = "file", optional: Collection[str] = ()
) -> None:
    """Verify the digests of files in a folder, as the file `listed_in` lists them; `optional` ones may be missing.

    Raises: UserError naming the first file that is missing or has changed, its kind `what`, and the `remedy`.
    """
    if not isinstance(digests, Mapping):
        raise UserError(f"damaged {what}: {folder / listed_in} has no table of {DIGESTS}; {remedy}")
    for name, digest in digests.items():
        path = folder / name
        try:
            if path.is_file() or name not in optional:
                check_digest(path, digest)
        except FileNotFoundError as error:
            raise UserError(f"damaged {what}: {path} is missing, which {listed_in} names; {remedy}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"damaged {what}: {path} cannot be used ({error}); {remedy}") from error


def _digest_once(path: Path) -> str:
    """Return the digest of a file, computed once per process until the file changes."""
    stat = path.stat()
    return _cached_digest(path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.lru_cache(maxsize=1024)
def _cached_digest(path: Path, *signs: int) -> str:
    return digest_of(path)
