"""Files of runs, tickets and exports, damaged at random: what is read afterwards is what was written, or told."""

import contextlib
import io
import json
import random
import shutil
import struct
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sparsesoup import load_compact, load_packed
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.core.files import load_table
from sparsesoup.core.ticket import load_masks
from sparsesoup.exports import write_export
from sparsesoup.runs.progress import ProgressLogger
from tiny_exports import pruned
from tiny_hub import run_of, weights_of

SAME, TOLD, SILENT, TRACE = "same", "told", "silent change", "traceback"
STATES = {  # methods whose stopped runs have, together, every kind of file in stages/
    "imp-rewind": ["--steps", "10", "--method.cut", "0.6", "--method.rewind", "0.2"],
    "instant-model-soup": ["--steps", "30", "--method.look-ahead", "0.1"],
}
STOP = {"imp-rewind": 16, "instant-model-soup": 18}


class Stopped(BaseException):
    """Stands for the end of a process."""


@dataclass(frozen=True)
class Subject:
    """Something on the disk that can be damaged.

    Args:
        name: of its kind.
        folder: where it lies; every trial has a copy.
        files: those that are damaged, below the folder.
        other: a folder of the same kind whose files are as sound, for swaps.
        read: what is made of a copy; raises what reading it raises, or gives what was read.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    other: Path
    read: Callable[[Path], Any]


def flip(path: Path, other: Path, draw: random.Random) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def flip_in_the_header(path: Path, other: Path, draw: random.Random) -> None:
    """One bit of the first hundreds of bytes, where names, types and shapes stand."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(min(len(data), 400))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path: Path, other: Path, draw: random.Random) -> None:
    """The end is missing."""
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def grow(path: Path, other: Path, draw: random.Random) -> None:
    """Bytes follow the end."""
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 40)))


def blank(path: Path, other: Path, draw: random.Random) -> None:
    """A block of zeros, as a bad sector leaves it."""
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data))
    data[start : start + 64] = bytes(len(data[start : start + 64]))
    path.write_bytes(data)


def swap(path: Path, other: Path, draw: random.Random) -> None:
    """The file of another one of its kind."""
    shutil.copyfile(other, path)


def lose(path: Path, other: Path, draw: random.Random) -> None:
    """No file."""
    path.unlink()


def edit(path: Path, other: Path, draw: random.Random) -> None:
    """A value of a table, or of a safetensors header, is another one, or gone."""
    data = path.read_bytes()
    if path.suffix == ".json":
        path.write_text(json.dumps(edited(json.loads(data), draw)))
        return
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(edited(json.loads(data[8 : 8 + length]), draw)).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def edited(table: Any, draw: random.Random) -> Any:
    """A table with one value changed, somewhere in its depth."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in list(node.items()) if isinstance(node, dict) else list(enumerate(node)):
            places.append((node, key))
            if isinstance(value, (dict, list)):
                walk(value)

    walk(table)
    node, key = draw.choice([(node, key) for node, key in places if key != "digest"])
    value = node[key]
    if isinstance(value, bool):
        node[key] = not value
    elif isinstance(value, (int, float)):
        node[key] = draw.choice([value + 1, -value - 1, 0.5 * value + 0.001])
    elif isinstance(value, str):
        node[key] = value[:-1] if value and draw.random() < 0.5 else value + "x"
    elif isinstance(value, list) and value and draw.random() < 0.5:
        value.pop()
    elif isinstance(node, dict):
        del node[key]
    else:
        node[key] = 7
    return table


DAMAGES = (flip, flip_in_the_header, cut, grow, blank, swap, lose, edit)


def subjects(place: Path, folder: Path) -> list[Subject]:
    """One of each kind, made by the real commands below a folder."""
    found = [_stopped(place, folder / name, name) for name in STATES]
    runs = [_finished(place, folder / method, method) for method in ("magnitude", "random")]
    inside = [str(path.relative_to(runs[0])) for path in runs[0].rglob("*") if path.is_file()]
    own = tuple(sorted(n for n in inside if n.startswith("model/") or n == "report.json"))
    found.append(Subject("run", runs[0], own, runs[1], lambda run: _again(place, run)))
    found.append(Subject("model for another command", runs[0], own, runs[1], _exported))
    tickets = [run / "model" / "pruning" for run in runs]
    found.append(Subject("ticket", tickets[0], ("masks.safetensors", "ticket.json"), tickets[1], load_masks))
    sources = [pruned(folder / f"source-{number}", "bert") for number in (0, 1)]
    weights = weights_of(sources[1])
    save_file({n: t + 1 if n.endswith("LayerNorm.bias") else t for n, t in weights.items()},
              sources[1] / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    for to, load in (("packed", load_packed), ("compact", load_compact)):
        made = [write_export(source, to, folder / f"{to}-{i}").path for i, source in enumerate(sources)]
        files = sorted(str(path.relative_to(made[0])) for path in made[0].rglob("*") if path.is_file())
        found.append(Subject(to, made[0], tuple(files), made[1], lambda path, load=load: load(path).state_dict()))
    return found


def line_of(place: Path, out: Path, method: str, *words: str) -> list[str]:
    """A command that draws a ticket."""
    flags = ["--train.batch-size", "8", "--train.learning-rate", "0.003", "--save-every", "0", "--sparsity", "0.7"]
    data = ["--model", str(place / "bert"), "--dataset", str(place / "reviews")]
    return ["prune", method, *data, *flags, *words, "--out", str(out)]


def _finished(place: Path, out: Path, method: str) -> Path:
    _ask(line_of(place, out, method, "--steps", "6"))
    return run_of(out)


def _stopped(place: Path, folder: Path, method: str) -> Subject:
    """A run that was stopped with states on the disk, beside one that was stopped elsewhere."""
    for name, after in (("one", STOP[method]), ("other", STOP[method] - 3)):
        with _stopping(after), contextlib.suppress(Stopped), contextlib.redirect_stderr(io.StringIO()):
            main(line_of(place, folder / name, method, *STATES[method]))
    stages = run_of(folder / "one") / "stages"
    names = [path.name for path in stages.iterdir() if path.suffix in (".safetensors", ".json")]

    def resumed(copy: Path) -> Any:
        _ask(line_of(place, copy.parents[2], method, *STATES[method]))
        return weights_of(copy / "model"), load_masks(copy)[0], load_table(copy / "report.json")["notes"]

    files = tuple(f"stages/{name}" for name in sorted(names))
    return Subject(f"states of {method}", stages.parent, files, run_of(folder / "other"), resumed)


@contextlib.contextmanager
def _stopping(after: int) -> Iterator[None]:
    """Training steps end the process in the block once so many are in the log."""
    plain, count = ProgressLogger.step, 0

    def step(self: ProgressLogger, record: Any) -> None:
        nonlocal count
        plain(self, record)
        count += bool(record)
        if count >= after:
            raise Stopped

    ProgressLogger.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        ProgressLogger.step = plain  # type: ignore[method-assign]


def _ask(line: list[str]) -> None:
    """The command line; UserError where it ends with 2."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main([str(word) for word in line])
    if code:
        raise UserError(errors.getvalue().splitlines()[-1])


def _again(place: Path, run: Path) -> Any:
    """Return the reading of a run by the command that drew it."""
    _ask(line_of(place, run.parents[2], "magnitude", "--steps", "6"))
    return weights_of(run / "model"), load_masks(run)[0], load_table(run / "report.json")


def _exported(run: Path) -> Any:
    """Return the reading of a run by another command: the packed file of its model, and its card."""
    _ask(["push", str(run), "me/x", "--dry-run", "--out", str(run / "pushed")])
    _ask(["export", str(run), "--to", "packed", "--out", str(run / "packed")])
    config = load_table(run / "packed" / "config.json")
    return load_packed(run / "packed").state_dict(), config, (run / "pushed" / "README.md").read_text()


def undamaged(subject: Subject, scratch: Path) -> Any:
    """Return the reading of a copy of the subject as it is."""
    return subject.read(_copied(subject, scratch))


def _copied(subject: Subject, scratch: Path) -> Path:
    # A run lies as deep as `prune` looks for it.
    parts = subject.folder.parts[-3:] if subject.folder.name.startswith("seed-") else ("copy",)
    shutil.rmtree(scratch, ignore_errors=True)
    return Path(shutil.copytree(subject.folder, scratch.joinpath(*parts)))


def trial(subject: Subject, whole: Any, scratch: Path, number: int) -> tuple[str, str]:
    """(what came of it, which file was damaged and how) of a trial; the same number is the same trial.

    Args:
        whole: what the undamaged subject gives.
        scratch: an empty place for the copy.
    """
    draw = random.Random(number)
    file, damage = draw.choice(subject.files), draw.choice(DAMAGES)
    copy = _copied(subject, scratch)
    if damage is edit and (copy / file).suffix not in (".json", ".safetensors"):
        damage = flip
    before = (copy / file).read_bytes()
    damage(copy / file, subject.other / file if (subject.other / file).is_file() else copy / file, draw)
    told = f"{number}: {subject.name}, {file}, {damage.__name__}"
    if (copy / file).is_file() and (copy / file).read_bytes() == before:
        return SAME, told
    try:
        found = subject.read(copy)
    except UserError as error:
        return (TOLD if "\n" not in str(error).strip() else TRACE), f"{told}: {error}"
    except Exception:
        return TRACE, f"{told}: {traceback.format_exc()}"
    return (SAME if alike(found, whole) else SILENT), told


def alike(one: Any, other: Any) -> bool:
    """Return True for two readings that are the same to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)
