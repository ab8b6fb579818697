"""Image folders: one folder per class, optionally below split folders; or a table that lists the files."""

import functools
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image

from sparsesoup.core.errors import UserError
from sparsesoup.hub.data.layout import SPLIT_WORDS

METADATA, FILE_NAME = "metadata", "file_name"  # name and column of an image folder's table, as on the Hub
STUBS = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS", "IPTC")  # formats that Pillow lists but cannot decode by itself
NO_CLASS = ("__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found")
NO_IMAGE = ("thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "icon\r")
Classes = dict[str, list[Path]]  # class -> its images


@functools.cache
def image_endings() -> frozenset[str]:
    """Return the extensions of all images that the installed Pillow opens, such as .png, .jfif and .jp2."""
    known = PIL.Image.registered_extensions().items()
    return frozenset(ending for ending, kind in known if kind in PIL.Image.OPEN and kind not in STUBS)


def find_classes(place: Path) -> tuple[dict[str, Classes], list[str]]:
    """Return (split name -> class -> images, notes) of paths such as train/cat/1.png; all train without split folders.

    The notes list what is not read.
    Raises: UserError if there are images but no class folders, images in deeper folders or in a format that Pillow does
        not open, or two folders of one split.
    """
    below = _folders_below(place)
    folders = [each for each in below if each.name.lower() in SPLIT_WORDS]
    splits: dict[str, Path] = {}
    for folder in folders:
        _check_depth(folder)
        if (
            _images_by_class(folder)
            and (other := splits.setdefault(SPLIT_WORDS[folder.name.lower()], folder)) != folder
        ):
            raise UserError(
                f"{place} holds its {SPLIT_WORDS[folder.name.lower()]} split twice, as {other.name} and {folder.name}, "
                f"where one is allowed; rename or remove one"
            )
    if splits:
        others = [each for each in below if each not in folders and (_image_files(each) or _images_by_class(each))]
        notes = [f"folder {each.name} is not read: it is not named after a split" for each in others]
        notes += [note for folder in splits.values() for note in _unread_notes(folder)]
        return {name: _images_by_class(folder) for name, folder in splits.items()}, notes
    whole = _images_by_class(place)
    if not (whole or _image_files(place)):
        for folder in (place, *folders):
            _unread_notes(folder, alone=True)
        return {}, []
    if {name.lower() for name in whole} <= {*SPLIT_WORDS}:
        raise UserError(
            f"{place} holds images without labels, where a folder a class is needed, such as train/cat/1.png; sort them"
        )
    _check_depth(place)
    return {"train": whole}, _unread_notes(place)


def check_alone(place: Path, tables: Mapping[str, Sequence[Path]]) -> None:
    """Raise a UserError for tables (split name -> files) beside class folders, since either could be meant."""
    files, below = [path for paths in tables.values() for path in paths], _folders_below(place)
    folders = [each for each in below if each.name.lower() in SPLIT_WORDS and _images_by_class(each)]
    if not folders and list(tables) == ["train"]:
        folders = [each for each in below if _image_files(each)]
        folders = folders if len(folders) > 1 else []
    if folders and not all(path.stem.lower() == METADATA for path in files):
        raise UserError(
            f"{place} holds a table ({files[0].name}) and folders of images ({folders[0].name}), where one of them is "
            f"read; name the table itself as the dataset, or move it away to read the folders"
        )


def read_classes(classes: Mapping[str, Sequence[Path]], names: Sequence[str]) -> Dataset:
    """Return the images of a split as rows, class by class, as file references; `names` are those of all splits."""
    rows = [(str(path.resolve()), names.index(name)) for name, paths in classes.items() for path in paths]
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": [p for p, _ in rows], "label": [y for _, y in rows]}, features=features)


def with_images(rows: Dataset, tables: Sequence[Path]) -> Dataset:
    """Resolve the images named in an image folder's metadata.csv; rows of other tables are unchanged.

    Raises: UserError if a table mixes images of several splits, which its rows do not tell apart, or a split has
        several tables.
    """
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
    """Return a note on each kind of file in a folder of classes that is not read; refuse images of unknown formats.

    `alone` says that no image is read; then nothing else is noted.
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


def _folders_below(place: Path) -> list[Path]:
    return [path for path in _entries_of(place) if path.is_dir() and path.name.lower() not in NO_CLASS]


def _entries_of(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.name[0] != ".") if place.is_dir() else []
