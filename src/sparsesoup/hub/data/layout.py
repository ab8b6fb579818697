"""Assign the files of a folder to splits, and list those left out."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sparsesoup.core.errors import UserError

READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json"}
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
MATCHES = ("matched", "mismatched")  # the names of MNLI's two test splits
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "package.json")
UNREAD = (".gz", ".bz2", ".xz", ".zst", ".zip", ".arrow", ".feather", ".xlsx", ".xls", ".ods", ".txt", ".ndjson",
          ".avro", ".orc", ".h5", ".pkl", ".pt", ".npz", ".tar", ".tgz", ".sqlite", ".db")  # fmt: skip
SHARD = re.compile(r"-(\d{5})-of-(\d{5})(-[0-9a-f]+)?$")


def find_files(place: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Return (split name -> its files, notes on files left out and files joined) of a file or folder.

    Names are such as train.csv, dev.tsv or data/test-00000-of-00001.parquet. A file with exactly the name of a split is
    that split. A single file, or files without split names, are the training split.
    Raises: UserError if a split occurs twice or mixes file formats, or the file's format is unknown.
    """
    if place.is_file():
        if place.suffix.lower() not in READERS:
            raise UserError(
                f"cannot read {place}: its ending {place.suffix!r} is none of {', '.join(READERS)}; convert the file"
            )
        return {"train": [place]}, []
    # The folder, its `data`, and split folders in these; nothing deeper.
    tops = [folder for folder in (place, place / "data") if folder.is_dir()]
    below = [
        each for top in tops for each in sorted(top.iterdir()) if each.is_dir() and each.name.lower() in SPLIT_WORDS
    ]
    everything = [file for folder in (*tops, *below) for file in sorted(folder.iterdir())
                  if file.is_file() and file.name[0] not in "._"]  # fmt: skip
    named: dict[str, list[Path]] = {}
    for file in everything:
        if file.suffix.lower() in READERS and file.name not in NO_DATA:
            named.setdefault(_split_of(file, place), []).append(file)
    unnamed = named.pop("", [])
    if not named:
        named, unnamed = {"train": unnamed} if unnamed else {}, []
        splits = dict(named)
    else:
        splits = {name: _files_of_split(name, files, place) for name, files in named.items()}
    for name, paths in splits.items():
        _check_files(name, paths, place)
    # Shards of one table, and files in a folder of the split, need no note.
    notes = [f"the {name} split is joined from {_file_names(paths, place)}" for name, paths in splits.items()
             if len({SHARD.sub("", path.stem) for path in paths}) > 1
             and not all(path.parent != place and path.parent.name.lower() in SPLIT_WORDS for path in paths)
             ]  # fmt: skip
    for name, files in named.items():
        others = [file for file in files if file not in splits[name]]
        notes += _left_out(others, f"{_file_names(splits[name], place)} is the {name} split", place)
    notes += _left_out(unnamed, "not named after a split", place)
    unread = [file for file in everything if file.suffix.lower() in UNREAD and _split_of(file.with_suffix(""), place)]
    return splits, notes + _left_out(unread if splits else [], f"the ending is none of {', '.join(READERS)}", place)


def _split_of(file: Path, place: Path) -> str:
    """Return the split of a file from its name, or else from its folder below `place`; "" if none is named."""
    words = _name_words(file)
    named = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
    if named:
        kind = next((word for word in words if word in MATCHES), None)
        return f"{named[0]}_{kind}" if kind else named[0]
    return SPLIT_WORDS.get(file.parent.name.lower(), "") if file.parent != place else ""


def relative_name(path: Path, place: Path) -> str:
    """Return a path relative to a folder."""
    return path.relative_to(place).as_posix() if path != place and path.is_relative_to(place) else path.name


def _name_words(file: Path) -> list[str]:
    return re.split(r"[^a-z0-9]+", SHARD.sub("", file.stem).lower())


def _files_of_split(name: str, files: Sequence[Path], place: Path) -> list[Path]:
    """Return the files of a split: those named exactly like it, else those in its folder, else all that name it."""
    exact: dict[Path, list[Path]] = {}
    inside: dict[Path, list[Path]] = {}
    for file in files:
        if {*_name_words(file)} <= {*SPLIT_WORDS, *MATCHES}:
            exact.setdefault(file.parent / SHARD.sub("", file.stem), []).append(file)
        elif not {*_name_words(file)} & {*SPLIT_WORDS}:
            inside.setdefault(file.parent, []).append(file)
    taken = {folder for folder in inside if any(path.parent == folder for path in exact)}
    claims = [*exact.values(), *(paths for folder, paths in inside.items() if folder not in taken)]
    if len(claims) > 1:
        raise UserError(
            f"{place} holds its {name} split twice, as {relative_name(claims[0][0], place)} and "
            f"{relative_name(claims[1][0], place)}, where one is allowed; rename or remove one"
        )
    return claims[0] if claims else [*files]


def _check_files(name: str, paths: Sequence[Path], place: Path) -> None:
    """Check that the files of a split have one format, and its shards are all of one table, each there once.

    Raises: UserError naming the formats, the missing shards, or two files of different tables.
    """
    formats = sorted({path.suffix.lower() for path in paths})
    if len(formats) > 1:
        raise UserError(f"{place} holds its {name} split as {' and '.join(formats)}, where one is allowed; remove one")
    tables: dict[tuple[Path, str, str], dict[str, Path]] = {}
    for path in paths:
        if found := SHARD.search(path.stem):
            number, count, push = found[1], found[2], found[3] or ""
            tables.setdefault((path.parent / SHARD.sub("", path.stem), count, push), {})[number] = path
    stems = Counter(stem for stem, *_ in tables)
    for (stem, count, push), shards in tables.items():
        if stems[stem] > 1:
            one, other = [next(iter(each.values())) for (own, *_), each in tables.items() if own == stem][:2]
            raise UserError(
                f"{place} holds its {name} split twice, as {relative_name(one, place)} and "
                f"{relative_name(other, place)}, where shards of one table are allowed; remove one set"
            )
        missing = [f"{i:05}" for i in range(int(count)) if f"{i:05}" not in shards]
        if missing:
            raise UserError(
                f"{place} lacks {len(missing)} of the {int(count)} shards of its {name} split, the first is "
                f"{stem.name}-{missing[0]}-of-{count}{push}; put them there, or rename the files that are to be read"
            )


def _left_out(files: Sequence[Path], why: str, place: Path) -> list[str]:
    return [f"{_file_names(files, place)} {'is' if len(files) == 1 else 'are'} not read: {why}"] if files else []


def _file_names(files: Sequence[Path], place: Path) -> str:
    shown = [relative_name(file, place) for file in files[:3]]
    return ", ".join(shown) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
