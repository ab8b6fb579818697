"""Image tasks: found in a dataset, preprocessed once per process, batched with a light random crop in training."""

import contextlib
import functools
import hashlib
import math
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from datasets import Dataset, Features, Image, Value
from torch import Tensor
from torch.nn import functional

from sparsesoup.core.errors import UserError, cause_line
from sparsesoup.core.rng import cpu_generator
from sparsesoup.hub.tasks.columns import find_label
from sparsesoup.hub.tasks.labels import TextTask, columns_of, label_values
from sparsesoup.hub.tasks.metrics import MetricFunction, default_metrics, task_metric
from sparsesoup.training.batching import Batch, RowBatches

HELD = 2**29  # bytes of images to keep in memory; of a larger split only the chosen rows are kept, or none
CHUNK = 64  # images preprocessed at a time
AREA = 0.9  # smallest share of an image's area in a crop
Row = tuple[int, int | float]  # index of the image, label


class CachedPixels(NamedTuple):
    """Images of a split, or of rows chosen from it: uint8 [rows, channels, height, width], and which are computed."""

    pixels: Tensor
    there: Tensor


_KEPT: dict[bytes, CachedPixels] = {}


class ImageCache:
    """The images of a split at the processor's size, uint8 [channels, height, width] each, read as RGB.

    Bytes, not floats, take a quarter of the memory. `model_inputs` converts them to the processor's output. The cache
    serves every later run of the process with any seed: seeds choose other rows of one split.
    """

    def __init__(self, rows: Dataset, column: str, processor: Any) -> None:
        self.column, self.processor = column, processor
        chosen = rows.select_columns([column]).cast_column(column, Image(decode=False))
        self._cells = Dataset(chosen.data, info=chosen.info)  # all rows as published, for row numbers in errors
        at = rows._indices
        self._rows = torch.arange(len(rows)) if at is None else torch.from_numpy(at.column(0).to_numpy().astype(int))
        black, white = (self._process_images([np.full((64, 64, 3), level, np.uint8)])[0] for level in (0, 255))
        middle = (slice(None), *(slice(side // 2, side // 2 + 1) for side in black.shape[1:]))
        self._low, self._step = black[middle], (white - black)[middle] / 255
        first = int(self._rows[0])
        self.shape = self._process_images([self._open_image(self._cells[first][column], first)])[0].shape
        whole = len(self._cells) * self.shape.numel() <= HELD
        fits = len(self._rows) * self.shape.numel() <= HELD
        self._at = self._rows if whole else torch.arange(len(self._rows))
        self._held = self._all_pixels(b"" if whole else self._rows.numpy().tobytes()) if fits else None

    def pixels_of(self, numbers: Sequence[int]) -> Tensor:
        """Return the images of these rows as bytes: uint8 [rows, channels, height, width]."""
        chosen = list(numbers)
        return self._resized_pixels(self._rows[chosen].tolist()) if self._held is None else self._held[self._at[chosen]]

    def model_inputs(self, pixels: Tensor) -> Tensor:
        """Return the processor's output for these images: float of the same shape."""
        return pixels.float().mul_(self._step).add_(self._low)

    def _all_pixels(self, chosen: bytes) -> Tensor:
        made = _cached_pixels(self._cache_key() + chosen, (len(self._rows if chosen else self._cells), *self.shape))
        order = self._rows.argsort()
        missing = order[~made.there[self._at[order]]]
        for some in filter(len, missing.split(CHUNK)):  # an empty tensor splits into one empty part
            made.pixels[self._at[some]] = self._resized_pixels(self._rows[some].tolist())
            made.there[self._at[some]] = True
        return made.pixels

    def _cache_key(self) -> bytes:
        """Return a hash of the images, or of their files' sizes and times, and of the processor's settings."""
        digest = hashlib.blake2b(f"{type(self.processor)} {self.processor.to_json_string()}".encode())
        for cells in self._cells.data.column(self.column).chunks:
            for part in (cells, cells.field("bytes"), cells.field("path")):  # slices share the buffers of their table
                digest.update(f"{part.offset} {len(part)} ".encode())
            for buffer in cells.buffers():
                digest.update(b"-" if buffer is None else buffer)
            digest.update(repr(_file_stamps(cells)).encode())
        return digest.digest()

    def _resized_pixels(self, rows: Sequence[int]) -> Tensor:
        """Return resized images; the processor's floats are whole levels, so converting them to bytes loses nothing."""
        cells = self._cells[list(rows)][self.column]
        made = self._process_images([self._open_image(cell, row) for cell, row in zip(cells, rows, strict=True)])
        for row, image in zip(rows, made, strict=True):
            if image.shape != self.shape:
                raise UserError(
                    f"row {row} of column {self.column} becomes {tuple(image.shape)} by the model's image processor, "
                    f"the first row {tuple(self.shape)}, where one size is needed; let the processor crop, or resize "
                    f"to height and width"
                )
        return ((torch.stack(made) - self._low) / self._step).round_().clamp_(0, 255).to(torch.uint8)

    def _open_image(self, cell: Any, row: int) -> Any:
        """Return the image in a cell, in RGB."""
        try:
            with _no_warnings():  # about large or odd files, which are read anyway
                return _in_rgb(Image().decode_example(_with_file_bytes(cell)))
        except Exception as error:  # each file format raises its own errors
            where = f" ({cell['path']})" if cell and cell["path"] else ""
            why = "its format is not known" if isinstance(error, PIL.UnidentifiedImageError) else cause_line(error)
            raise UserError(
                f"row {row} of column {self.column}{where} cannot be read as an image: {why}; correct or drop such rows"
            ) from error

    def _process_images(self, pictures: list[Any]) -> list[Tensor]:
        """Return the processor's output for images: float [channels, height, width] each."""
        made = self.processor(pictures).get("pixel_values", [np.empty(0)])
        if np.ndim(made[0]) != 3:
            raise UserError(
                f"the model's image processor ({type(self.processor).__name__}) does not make one array of channels, "
                f"height and width of an image, which is needed here; use another model"
            )
        return [torch.as_tensor(np.ascontiguousarray(image)) for image in made]


def _no_warnings() -> contextlib.AbstractContextManager[object]:
    """Ignore warnings in the main thread; filters belong to all threads, so another one must not change them."""
    alone = threading.current_thread() is threading.main_thread()
    return warnings.catch_warnings(action="ignore") if alone else contextlib.nullcontext()


def _cached_pixels(key: bytes, shape: tuple[int, ...]) -> CachedPixels:
    """Return the images computed so far under a key; the least recently used are dropped above the memory limit."""
    fresh = CachedPixels(torch.empty(shape, dtype=torch.uint8), torch.zeros(shape[0], dtype=torch.bool))
    _KEPT[key] = made = _KEPT.pop(key, fresh)
    while len(_KEPT) > 1 and sum(kept.pixels.numel() for kept in _KEPT.values()) > HELD:
        del _KEPT[next(iter(_KEPT))]
    return made


def _in_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Convert to RGB; Pillow would clip levels above 255, so that deep images would become white."""
    if picture.mode.startswith("I;16"):
        picture = PIL.Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"nothing tells the range of its levels (Pillow's mode {picture.mode}), 8 bits are needed")
    return picture.convert("RGB")


def _file_stamps(cells: pa.StructArray) -> list[Any]:
    """Return size and time of the files whose bytes are not in the cells."""
    paths = [Path(path) for path in cells.field("path").filter(cells.field("bytes").is_null()).to_pylist() if path]
    return [(stat.st_size, stat.st_mtime_ns) for path in paths if path.exists() for stat in [path.stat()]]


def _with_file_bytes(cell: Any) -> Any:
    """Return a cell with the bytes of its file: Pillow would leave a file open that is not an image."""
    if cell and cell["bytes"] is None and cell["path"] and Path(cell["path"]).exists():
        return {**cell, "bytes": Path(cell["path"]).read_bytes()}
    return cell


@dataclass(frozen=True)
class ImageTask(TextTask):
    """An image-classification task; `texts` is the one column of images."""


def find_images(train: Dataset, name: str, columns: Sequence[str] | None, label: str | None) -> ImageTask | None:
    """Infer the image task of a dataset from its columns, named or guessed; None for other datasets."""
    held = [column for column, kind in train.features.items() if isinstance(kind, Image)]
    held = held or [column for column in train.features if _holds_files(train, column)]
    chosen = tuple(columns or held)
    if not {*chosen} & {*held}:
        return None
    if len(chosen) > 1:
        raise UserError(
            f"{name}: the columns to read are {', '.join(chosen)}, where one of images is allowed; its columns are "
            f"{columns_of(Features(train.features))}; name it by image_column"
        )
    column, labels = find_label(train, name, label)
    return ImageTask(chosen, column, labels, default_metrics(labels, None))


def encode_images(rows: Dataset, task: ImageTask, processor: Any, length: int = 0) -> tuple[RowBatches, MetricFunction]:
    """Return the images with their labels, ready for batching, and the metric.

    A batch is {"pixel_values": float [rows, channels, height, width], "labels": [rows]}, as from the processor; in
    training each image is first cropped (`random_crop`). An image counts as one token; its cost is in the FLOPs.
    """
    labels, pictures = label_values(rows, task, "the data"), ImageCache(rows, task.texts[0], processor)
    collate = functools.partial(_image_batch, pictures, np.int64 if task.labels else np.float32)
    return RowBatches(list(enumerate(labels)), collate, vary=collate), task_metric(task)


def random_crop(pixels: Tensor, draw: torch.Generator) -> Tensor:
    """Crop a random part of an image (uint8 [channels, height, width]), 0.9 to 1 of its area; resize it to the whole.

    The light crop of CLIP's fine-tuning (random resized crop of scale (0.9, 1), Wortsman et al. 2022), used in Instant
    Soup. The area share is uniform, the aspect ratio log-uniform within the image.
    """
    size = pixels.shape[1:]
    area, ratio, *places = torch.rand(4, generator=draw).tolist()
    area = AREA + (1 - AREA) * area
    ratio = area ** (2 * ratio - 1)
    height, width = (max(1, round(s * math.sqrt(a))) for s, a in zip(size, (area * ratio, area / ratio), strict=True))
    top, left = (int(at * (s - own + 1)) for at, s, own in zip(places, size, (height, width), strict=True))
    part = pixels[None, :, top : top + height, left : left + width]
    return functional.interpolate(part, size, mode="bicubic", antialias=True)[0]


def _image_batch(pictures: ImageCache, dtype: type, rows: Sequence[Row], look: int | None = None) -> Batch:
    """Return a batch of these rows, cropped at random for this step of a training."""
    numbers = [number for number, _ in rows]
    pixels = pictures.pixels_of(numbers)
    if look is not None:
        draws = [cpu_generator(look, number) for number in numbers]
        pixels = torch.stack([random_crop(image, draw) for image, draw in zip(pixels, draws, strict=True)])
    labels = torch.from_numpy(np.array([label for _, label in rows], dtype=dtype))
    return {"pixel_values": pictures.model_inputs(pixels), "labels": labels}


def _holds_files(rows: Dataset, column: str) -> bool:
    """Return True if the first row of a column holds the bytes of an image file without the image type."""
    kind = rows.features[column]
    binary = isinstance(kind, Value) and kind.dtype in ("binary", "large_binary")
    if not len(rows) or not (binary or (isinstance(kind, dict) and kind.keys() == {"bytes", "path"})):
        return False
    with contextlib.suppress(Exception):
        return Image().decode_example(Image().encode_example(rows[0][column])) is not None
    return False
