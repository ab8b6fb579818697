"""Image tasks: found in a dataset, batched for a model, with a light random crop in training."""

import contextlib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from torch import Tensor
from torch.nn import functional

from sparsesoup.core.errors import UserError
from sparsesoup.core.rng import cpu_generator
from sparsesoup.hub.tasks.columns import find_label
from sparsesoup.hub.tasks.image_cache import ImageCache
from sparsesoup.hub.tasks.labels import TextTask, columns_of, label_values
from sparsesoup.hub.tasks.metrics import Judged, default_metrics, task_metric
from sparsesoup.training.batching import Batch, RowBatches

AREA = 0.9  # smallest share of an image's area in a crop
Row = tuple[int, int | float]  # index of the image, label


@dataclass(frozen=True)
class ImageTask(TextTask):
    """An image-classification task; `texts` is the one column of images."""


def find_images(train: Dataset, name: str, columns: Sequence[str] | None, label: str | None) -> ImageTask | None:
    """Infer the image task of a dataset from its columns, named or guessed; None for other datasets.

    Raises: UserError if there are several image columns and none is named, or no label.
    """
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


def encode_images(rows: Dataset, task: ImageTask, processor: Any, length: int = 0) -> tuple[RowBatches, Judged]:
    """Return the images with their labels, ready for batching, and the metric.

    A batch is {"pixel_values": float [rows, channels, height, width], "labels": [rows]}, as from the processor; in
    training each image is first cropped (`random_crop`). An image counts as one token; its cost is in the FLOPs.

    Args:
        rows: one split; its images are bytes or file paths, with levels of 1, 8 or 16 bits, and are read as RGB.
        processor: an image processor of transformers that makes all images one size.
    Raises: UserError that names the row of an unreadable image or an invalid label.
    """
    labels, pictures = label_values(rows, task, "the data"), ImageCache(rows, task.texts[0], processor)
    collate = functools.partial(_image_batch, pictures, np.int64 if task.labels else np.float32)
    return RowBatches(list(enumerate(labels)), collate, vary=collate), task_metric(task)


def random_crop(pixels: Tensor, draw: torch.Generator) -> Tensor:
    """Crop a random part of an image, 0.9 to 1 of its area, and resize it to the whole size.

    The light crop of CLIP's fine-tuning (random resized crop of scale (0.9, 1), Wortsman et al. 2022), used in Instant
    Soup. The area share is uniform, the aspect ratio log-uniform within the image.

    Args:
        pixels: uint8 [channels, height, width], as is the result.
        draw: generator of the four random numbers of a crop.
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
