"""Assign the files and image folders of a folder to splits, and list those left out."""

import functools
import mimetypes
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image

from sparsesoup.core.errors import UserError, list_names

READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json"}
SPLIT_WORDS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(("test", "testing"), "test")
SPLIT_WORDS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
MATCHES = ("matched", "mismatched")  # the names of MNLI's two test splits
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "package.json")
UNREAD = (".gz", ".bz2", ".xz", ".zst", ".zip", ".arrow", ".feather", ".xlsx", ".xls", ".ods", ".txt", ".ndjson",
          ".avro", ".orc", ".h5", ".pkl", ".pt", ".npz", ".tar", ".tgz", ".sqlite", ".db")  # fmt: skip
SHARD = re.compile(r"-(\d{5})-of-(\d{5})(-[0-9a-f]+)?$")
METADATA, FILE_NAME = "metadata", "file_name"  # name and column of an image folder's table, as on the Hub
STUBS = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS", "IPTC")  # formats that Pillow lists but cannot decode by itself
NO_CLASS = ("__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found")
NO_IMAGE = ("thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "icon\r")
Classes = dict[str, list[Path]]  # class -> its images


def find_files(root: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Return (split name -> its files, notes on files left out and files joined) of a file or folder.

    Names are such as train.csv, dev.tsv or data/test-00000-of-00001.parquet. A file with exactly the name of a split is
    that split. A single file, or files without split names, are the training split.
    """
    if root.is_file():
        if root.suffix.lower() not in READERS:
            raise UserError(
                f"cannot read {root}: its ending {root.suffix!r} is none of {', '.join(READERS)}; convert the file"
            )
        return {"train": [root]}, []
    # The folder, its `data`, and split folders in these; nothing deeper.
    tops = [folder for folder in (root, root / "data") if folder.is_dir()]
    below = [
        each for top in tops for each in sorted(top.iterdir()) if each.is_dir() and each.name.lower() in SPLIT_WORDS
    ]
    everything = [file for folder in (*tops, *below) for file in sorted(folder.iterdir())
                  if file.is_file() and file.name[0] not in "._"]  # fmt: skip
    named: dict[str, list[Path]] = {}
    for file in everything:
        if file.suffix.lower() in READERS and file.name not in NO_DATA:
            named.setdefault(_split_of(file, root), []).append(file)
    unnamed = named.pop("", [])
    if not named:
        named, unnamed = {"train": unnamed} if unnamed else {}, []
        splits = dict(named)
    else:
        splits = {name: _files_of_split(name, files, root) for name, files in named.items()}
    for name, paths in splits.items():
        _check_files(name, paths, root)
    # Shards of one table, and files in a folder of the split, need no note.
    notes = [f"the {name} split is joined from {_file_names(paths, root)}" for name, paths in splits.items()
             if len({SHARD.sub("", path.stem) for path in paths}) > 1
             and not all(path.parent != root and path.parent.name.lower() in SPLIT_WORDS for path in paths)
             ]  # fmt: skip
    for name, files in named.items():
        others = [file for file in files if file not in splits[name]]
        notes += _left_out(others, f"{_file_names(splits[name], root)} is the {name} split", root)
    notes += _left_out(unnamed, "not named after a split", root)
    unread = [file for file in everything if file.suffix.lower() in UNREAD and _split_of(file.with_suffix(""), root)]
    return splits, notes + _left_out(unread if splits else [], f"the ending is none of {', '.join(READERS)}", root)


def _split_of(file: Path, root: Path) -> str:
    """Return the split of a file from its name, or else from its folder below `place`; "" if none is named."""
    words = _name_words(file)
    named = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
    if named:
        kind = next((word for word in words if word in MATCHES), None)
        return f"{named[0]}_{kind}" if kind else named[0]
    return SPLIT_WORDS.get(file.parent.name.lower(), "") if file.parent != root else ""


def relative_name(path: Path, root: Path) -> str:
    """Return a path relative to a folder."""
    return path.relative_to(root).as_posix() if path != root and path.is_relative_to(root) else path.name


def _name_words(file: Path) -> list[str]:
    return re.split(r"[^a-z0-9]+", SHARD.sub("", file.stem).lower())


def _files_of_split(name: str, files: Sequence[Path], root: Path) -> list[Path]:
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
        raise _split_twice(root, name, claims[0][0], claims[1][0])
    return claims[0] if claims else [*files]


def _check_files(name: str, paths: Sequence[Path], root: Path) -> None:
    """Check that the files of a split have one format, and its shards are all of one table, each there once."""
    formats = sorted({path.suffix.lower() for path in paths})
    if len(formats) > 1:
        raise UserError(f"{root} holds its {name} split as {' and '.join(formats)}, where one is allowed; remove one")
    tables: dict[tuple[Path, str, str], dict[str, Path]] = {}
    for path in paths:
        if found := SHARD.search(path.stem):
            number, count, push = found[1], found[2], found[3] or ""
            tables.setdefault((path.parent / SHARD.sub("", path.stem), count, push), {})[number] = path
    stems = Counter(stem for stem, *_ in tables)
    for (stem, count, push), shards in tables.items():
        if stems[stem] > 1:
            one, other = [next(iter(each.values())) for (own, *_), each in tables.items() if own == stem][:2]
            raise _split_twice(root, name, one, other, "these are shards of two tables, so remove one set")
        missing = [f"{i:05}" for i in range(int(count)) if f"{i:05}" not in shards]
        if missing:
            raise UserError(
                f"{root} lacks {len(missing)} of the {int(count)} shards of its {name} split, the first is "
                f"{stem.name}-{missing[0]}-of-{count}{push}; put them there, or rename the files that are to be read"
            )


def _left_out(files: Sequence[Path], why: str, root: Path) -> list[str]:
    return [f"{_file_names(files, root)} {'is' if len(files) == 1 else 'are'} not read: {why}"] if files else []


def _file_names(files: Sequence[Path], root: Path) -> str:
    return list_names([relative_name(file, root) for file in files], 3)


def _split_twice(root: Path, split: str, one: Path, other: Path, remedy: str = "rename or remove one") -> UserError:
    found = f"as {relative_name(one, root)} and {relative_name(other, root)}"
    return UserError(f"{root} holds its {split} split twice, {found}, where one is allowed; {remedy}")


@functools.cache
def image_endings() -> frozenset[str]:
    """Return the extensions of all images that the installed Pillow opens, such as .png, .jfif and .jp2."""
    known = PIL.Image.registered_extensions().items()
    return frozenset(ending for ending, kind in known if kind in PIL.Image.OPEN and kind not in STUBS)


def find_classes(root: Path) -> tuple[dict[str, Classes], list[str]]:
    """Return (split -> class -> images, notes on what is not read) of paths such as train/cat/1.png or cat/1.png."""
    below = _folders_below(root)
    folders = [each for each in below if each.name.lower() in SPLIT_WORDS]
    splits: dict[str, Path] = {}
    for folder in folders:
        _check_depth(folder)
        split = SPLIT_WORDS[folder.name.lower()]
        if _images_by_class(folder) and (other := splits.setdefault(split, folder)) != folder:
            raise _split_twice(root, split, other, folder)
    if splits:
        others = [each for each in below if each not in folders and (_image_files(each) or _images_by_class(each))]
        notes = [f"folder {each.name} is not read: it is not named after a split" for each in others]
        notes += [note for folder in splits.values() for note in _unread_notes(folder)]
        return {name: _images_by_class(folder) for name, folder in splits.items()}, notes
    whole = _images_by_class(root)
    if not (whole or _image_files(root)):
        for folder in (root, *folders):
            _unread_notes(folder, alone=True)
        return {}, []
    if {name.lower() for name in whole} <= {*SPLIT_WORDS}:
        raise UserError(
            f"{root} holds images without labels, where a folder a class is needed, such as train/cat/1.png; sort them"
        )
    _check_depth(root)
    return {"train": whole}, _unread_notes(root)


def check_alone(root: Path, tables: Mapping[str, Sequence[Path]]) -> None:
    """Raise a UserError for tables (split name -> files) beside class folders, since either could be meant."""
    files, below = [path for paths in tables.values() for path in paths], _folders_below(root)
    folders = [each for each in below if each.name.lower() in SPLIT_WORDS and _images_by_class(each)]
    if not folders and list(tables) == ["train"]:
        folders = [each for each in below if _image_files(each)]
        folders = folders if len(folders) > 1 else []
    if folders and not all(path.stem.lower() == METADATA for path in files):
        raise UserError(
            f"{root} holds a table ({files[0].name}) and folders of images ({folders[0].name}), where one of them is "
            f"read; name the table itself as the dataset, or move it away to read the folders"
        )


def read_classes(classes: Mapping[str, Sequence[Path]], names: Sequence[str]) -> Dataset:
    """Return the images of a split as rows, class by class, as file references; `names` are those of all splits."""
    rows = [(str(path.resolve()), names.index(name)) for name, paths in classes.items() for path in paths]
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": [p for p, _ in rows], "label": [y for _, y in rows]}, features=features)


def with_images(rows: Dataset, tables: Sequence[Path]) -> Dataset:
    """Resolve the images named in an image folder's metadata.csv; rows of other tables are unchanged."""
    if FILE_NAME not in rows.column_names or {table.stem.lower() for table in tables} != {METADATA}:
        return rows
    names = [Path(str(name)) for name in rows[FILE_NAME]]
    if not any(name.suffix.lower() in image_endings() for name in names):  # audio files, for example
        return rows
    if len(tables) > 1 or len({SPLIT_WORDS.get(name.parts[0].lower()) for name in names if name.parts}) > 1:
        raise UserError(
            f"{tables[0]} is not all of one split and that alone, where each folder of a split (train, test) holds one "
            f"table of its own images; write such tables"
        )
    images = [str((tables[0].parent / name).resolve()) for name in names]
    others = rows.remove_columns([name for name in (FILE_NAME, "image") if name in rows.column_names])
    return others.add_column("image", images).cast_column("image", Image())


def _check_depth(folder: Path) -> None:
    """Raise a UserError for images in subfolders of a class, which would be silently left out."""
    for deeper in (below for each in _folders_below(folder) for below in _folders_below(each)):
        if _image_files(deeper):
            raise UserError(
                f"{deeper} holds images below the folder of a class, where none are looked for; move them to "
                f"{deeper.parent}, or away"
            )


def _unread_notes(folder: Path, alone: bool = False) -> list[str]:
    """Return notes on what is not read in a folder of classes; none if no image is read at all, `alone`.

    An image of an unknown format is refused.
    """
    notes = []
    for each in _folders_below(folder):
        others = [path for path in _files_in(each) if path.suffix.lower() not in image_endings()]
        kinds = {path: mimetypes.guess_type(path.name)[0] for path in others}
        strange = [path for path, kind in kinds.items() if (kind or ("" if alone else "image")).startswith("image")]
        if strange:
            raise UserError(
                f"{strange[0]} is not read: its ending {strange[0].suffix!r} is of no image that Pillow opens here "
                f"({len(strange)} such files in {each.name}); convert them to png or jpg, or move them away"
            )
        if others and not alone:
            notes.append(f"{others[0].name} in {each.name} is not read: it is no image ({len(others)} such files)")
        if not _image_files(each):
            notes.append(f"folder {each.name} is no class: it holds no images")
    if loose := _image_files(folder):
        notes.append(f"{loose[0].name} in {folder.name} is not read: it is in no class ({len(loose)} such images)")
    return notes


def _images_by_class(folder: Path) -> Classes:
    return {each.name: images for each in _folders_below(folder) if (images := _image_files(each))}


def _image_files(folder: Path) -> list[Path]:
    return [path for path in _files_in(folder) if path.suffix.lower() in image_endings()]


def _files_in(folder: Path) -> list[Path]:
    return [path for path in _entries_of(folder) if path.is_file() and path.name.lower() not in NO_IMAGE]


def _folders_below(root: Path) -> list[Path]:
    return [path for path in _entries_of(root) if path.is_dir() and path.name.lower() not in NO_CLASS]


def _entries_of(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.name[0] != ".") if root.is_dir() else []
