"""Images as the model takes them: made by its own processor, held in memory, and cropped lightly in training."""

import contextlib
import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from datasets import Dataset, Features, Image, Value
from torch import Tensor
from torch.nn import functional

from sparsesoup.data import Batch, Data
from sparsesoup.errors import UserError
from sparsesoup.hub.judging import Judged, metric
from sparsesoup.hub.reading import one_line
from sparsesoup.hub.tasks import Task, columns_of, default_metrics, find_label, label_values
from sparsesoup.rng import generator

HELD = 2**29  # bytes of a split's images that are held in memory; above that they are made anew each time
CHUNK = 64  # images that are made at a time
AREA = 0.9  # share of an image that a crop keeps at least
Row = tuple[int, int | float]  # number of the image, label


@dataclass(frozen=True)
class Images(Task):
    """An image-classification task; `texts` is the one column of images."""


def find_images(train: Dataset, name: str, columns: Sequence[str] | None, label: str | None) -> Images | None:
    """The image task of a dataset, told from its columns; None if it is of another kind.

    Args:
        train, name: the training split, and the dataset's name as in `Source.name`.
        columns, label: the image column and that of the label, where the guess is to be overruled.
    Raises: UserError if there are several columns of images and none is named, or no label.
    """
    held = [column for column, kind in train.features.items() if isinstance(kind, Image)]
    held = held or [column for column in train.features if _holds_files(train, column)]
    chosen = tuple(columns or held)
    if not {*chosen} & {*held}:
        return None
    if len(chosen) > 1:
        raise UserError(
            f"{name}: the columns to read are {', '.join(chosen)}, where one of images is allowed; its columns are "
            f"{columns_of(Features(train.features))}; name it with `--image-column`"
        )
    column, labels = find_label(train, name, label)
    task = Images(chosen, column, labels, ())
    return replace(task, metrics=default_metrics(task, None))


def encode(rows: Dataset, task: Images, processor: Any, length: int = 0) -> tuple[Data, Judged]:
    """The images and their labels, ready to be batched, and the judge of the answers.

    A batch is {"pixel_values": float [rows, channels, height, width], "labels": [rows]}, as the processor makes it; in
    training each image is cropped first (`crop`). An image counts as one token: what it costs, FLOPs tell.

    Args:
        rows: one split; its images are bytes or paths of files, of any mode; they are read as RGB.
        processor: an image processor of transformers that makes all images of one size.
        length: has no meaning for images.
    Raises: UserError that names the row where an image cannot be read, or a label is wrong.
    """
    labels, pictures = label_values(rows, task, "the data"), Pictures(rows, task.texts[0], processor)
    collate = functools.partial(_batch, pictures, np.int64 if task.labels else np.float32)
    return Data(list(enumerate(labels)), collate, vary=collate), metric(task)


class Pictures:
    """The images of a split in the size that the processor makes, uint8 [channels, height, width] each.

    Bytes, not floats: a quarter of the memory. `values` turns them into what the processor would have made.

    Args:
        rows: one split.
        column: of its images.
        processor: of the model.
    Raises: UserError that names the row where an image cannot be read or becomes of another size than the first.
    """

    def __init__(self, rows: Dataset, column: str, processor: Any) -> None:
        self.column, self.processor = column, processor
        self._numbers = rows._indices  # of the rows in the split as published, which errors name
        self._cells = rows.select_columns([column]).cast_column(column, Image(decode=False))
        black, white = (self._made([np.full((64, 64, 3), level, np.uint8)])[0] for level in (0, 255))
        middle = (slice(None), *(slice(side // 2, side // 2 + 1) for side in black.shape[1:]))
        self._low, self._step = black[middle], (white - black)[middle] / 255
        self.shape = self._made([self._opened(self._cells[0][column], 0)])[0].shape
        self._held = self._all() if len(rows) * self.shape.numel() <= HELD else None

    def pixels(self, numbers: Sequence[int]) -> Tensor:
        """The images of these rows as bytes: uint8 [rows, channels, height, width]."""
        return self._pixels(numbers) if self._held is None else self._held[list(numbers)]

    def values(self, pixels: Tensor) -> Tensor:
        """What the processor makes of them: float of the same shape."""
        return pixels.float().mul_(self._step).add_(self._low)

    def _all(self) -> Tensor:
        held = torch.empty((len(self._cells), *self.shape), dtype=torch.uint8)
        for chunk in torch.arange(len(held)).split(CHUNK):
            held[chunk] = self._pixels(chunk.tolist())
        return held

    def _pixels(self, numbers: Sequence[int]) -> Tensor:
        """The processor's resizing gives whole levels, so that nothing is lost by making its floats bytes again."""
        cells = self._cells[list(numbers)][self.column]
        made = self._made([self._opened(cell, number) for cell, number in zip(cells, numbers, strict=True)])
        for number, image in zip(numbers, made, strict=True):
            if image.shape != self.shape:
                raise UserError(
                    f"row {self._row(number)} of column {self.column} becomes {tuple(image.shape)} by the model's "
                    f"image processor, the first row {tuple(self.shape)}, where one size is needed; let the processor "
                    f"crop, or resize to height and width"
                )
        return ((torch.stack(made) - self._low) / self._step).round_().clamp_(0, 255).to(torch.uint8)

    def _opened(self, cell: Any, number: int) -> Any:
        """The picture in a cell, in RGB."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of large or odd files, which are read all the same
                return Image().decode_example(_file(cell)).convert("RGB")
        except Exception as error:  # each format of files has errors of its own
            where = f" ({cell['path']})" if cell and cell["path"] else ""
            why = "its format is not known" if isinstance(error, PIL.UnidentifiedImageError) else one_line(error)
            raise UserError(
                f"row {self._row(number)} of column {self.column}{where} cannot be read as an image: {why}; correct or "
                f"drop such rows"
            ) from error

    def _row(self, number: int) -> int:
        return number if self._numbers is None else int(self._numbers.column(0)[number].as_py())

    def _made(self, pictures: list[Any]) -> list[Tensor]:
        """What the processor makes of pictures: float [channels, height, width] each."""
        return [torch.as_tensor(image) for image in self.processor(pictures)["pixel_values"]]


def crop(pixels: Tensor, draw: torch.Generator) -> Tensor:
    """A random part of an image, 0.9 to 1 of its area, resized to the whole.

    The light crop of CLIP's fine-tuning (random resized crop of scale (0.9, 1), Wortsman et al. 2022), which Instant
    Soup uses. Share of the area uniform, ratio of the sides log-uniform in what fits into the image.

    Args:
        pixels: uint8 [channels, height, width].
        draw: gives the four random numbers of one crop.
    Returns: uint8 of the same shape.
    """
    size = pixels.shape[1:]
    area, ratio, *places = torch.rand(4, generator=draw).tolist()
    area = AREA + (1 - AREA) * area
    ratio = area ** (2 * ratio - 1)
    sides = [
        max(1, round(side * math.sqrt(share))) for side, share in zip(size, (area * ratio, area / ratio), strict=True)
    ]
    (top, left) = (int(at * (side - own + 1)) for at, side, own in zip(places, size, sides, strict=True))
    part = pixels[None, :, top : top + sides[0], left : left + sides[1]]
    return functional.interpolate(part, size, mode="bicubic", antialias=True)[0]


def _batch(pictures: Pictures, dtype: type, rows: Sequence[Row], look: int | None = None) -> Batch:
    """The images of these rows, cropped as at this look of a training at them."""
    numbers = [number for number, _ in rows]
    pixels = pictures.pixels(numbers)
    if look is not None:
        cropped = [crop(image, generator(look, number)) for image, number in zip(pixels, numbers, strict=True)]
        pixels = torch.stack(cropped)
    labels = torch.from_numpy(np.array([label for _, label in rows], dtype=dtype))
    return {"pixel_values": pictures.values(pixels), "labels": labels}


def _file(cell: Any) -> Any:
    """A cell with the bytes of its file: from a path alone, a file that is no image would be left open."""
    if cell and cell["bytes"] is None and cell["path"] and Path(cell["path"]).exists():
        return {**cell, "bytes": Path(cell["path"]).read_bytes()}
    return cell


def _holds_files(rows: Dataset, column: str) -> bool:
    """Whether a column holds the bytes of image files that nobody has called images; its first row tells."""
    kind = rows.features[column]
    binary = isinstance(kind, Value) and kind.dtype in ("binary", "large_binary")
    if not len(rows) or not (binary or (isinstance(kind, dict) and kind.keys() == {"bytes", "path"})):
        return False
    with contextlib.suppress(Exception):
        return Image().decode_example(Image().encode_example(rows[0][column])) is not None
    return False
