"""Folders of images: a folder a class, below folders named after splits or not; or a table that names the files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image

from sparsesoup.errors import UserError
from sparsesoup.hub.reading import SPLIT_WORDS

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
METADATA, FILE_NAME = "metadata", "file_name"  # the table of an image folder, as the Hub calls it, and its column
Classes = dict[str, list[Path]]  # class -> its images


def find_classes(place: Path) -> dict[str, Classes]:
    """Split name -> class -> images, such as train/cat/1.png; without folders of splits all of it is training split.

    Raises: UserError if there are images, and no folders that say which class they are of; or images deeper than these.
    """
    splits: dict[str, Classes] = {}
    for folder in (each for each in _below(place) if each.name.lower() in SPLIT_WORDS):
        _check_depth(folder)
        if classes := _classes(folder):
            splits.setdefault(SPLIT_WORDS[folder.name.lower()], classes)
    whole = _classes(place)
    if splits or not (whole or _images(place)):
        return splits
    if {name.lower() for name in whole} <= {*SPLIT_WORDS}:
        raise UserError(
            f"{place} holds images without labels, where a folder a class is needed, such as train/cat/1.png; sort them"
        )
    _check_depth(place)
    return {"train": whole}


def read_classes(classes: Mapping[str, Sequence[Path]], names: Sequence[str]) -> Dataset:
    """The images of a split as rows, class after class; they stay files.

    Args:
        classes: class -> images.
        names: of all classes, in the order of their numbers; the same for every split.
    """
    rows = [(str(path.resolve()), names.index(name)) for name, paths in classes.items() for path in paths]
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": [p for p, _ in rows], "label": [y for _, y in rows]}, features=features)


def with_images(rows: Dataset, tables: Sequence[Path]) -> Dataset:
    """The rows of an image folder's metadata.csv, the files that it names as images; those of other tables as they are.

    Args:
        rows: what the tables hold; file names are taken from their folder on.
        tables: the files of a split.
    Raises: UserError if a table names images of several splits, which its rows do not say, or a split has several.
    """
    if FILE_NAME not in rows.column_names or {table.stem.lower() for table in tables} != {METADATA}:
        return rows
    names = [Path(str(name)) for name in rows[FILE_NAME]]
    if not any(name.suffix.lower() in ENDINGS for name in names):  # of sounds, say
        return rows
    splits = {SPLIT_WORDS.get(name.parts[0].lower()) for name in names if name.parts}
    if len(tables) > 1 or len(splits) > 1:
        raise UserError(
            f"{tables[0]} is not all of one split and that alone, where each folder of a split (train, test) holds one "
            f"table of its own images; write such tables"
        )
    images = [str((tables[0].parent / name).resolve()) for name in names]
    others = rows.remove_columns([name for name in (FILE_NAME, "image") if name in rows.column_names])
    return others.add_column("image", images).cast_column("image", Image())


def _check_depth(folder: Path) -> None:
    """UserError if a class has images in folders below its own: they would be left out without a word."""
    for deeper in (below for each in _below(folder) for below in _below(each)):
        if _images(deeper):
            raise UserError(
                f"{deeper} holds images below the folder of a class, where none are looked for; move them to "
                f"{deeper.parent}, or away"
            )


def _classes(folder: Path) -> Classes:
    return {each.name: images for each in _below(folder) if (images := _images(each))}


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and p.name[0] != "." and p.is_file())


def _below(place: Path) -> list[Path]:
    return sorted(each for each in place.iterdir() if each.is_dir() and each.name[0] != ".") if place.is_dir() else []
