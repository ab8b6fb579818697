"""Tiny vision models of random weights, and data sets of pictures on the disk whose class can be seen."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Image
from torch import nn

from sparsesoup.hub.tasks.images import ImageTask

SIDE, PATCH, WIDTH, LAYERS = 12, 4, 16, 2
CLASSES = ("dark", "light", "red")
TASK = ImageTask(("image",), "label", CLASSES, ("accuracy", "macro_f1"))
SHAPE: dict[str, Any] = {
    "image_size": SIDE, "patch_size": PATCH, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
CONFIGS = {
    "vit": lambda: transformers.ViTConfig(**SHAPE),
    "deit": lambda: transformers.DeiTConfig(**SHAPE),
    "beit": lambda: transformers.BeitConfig(**SHAPE),
    "dinov2": lambda: transformers.Dinov2Config(**SHAPE),
    "swin": lambda: transformers.SwinConfig(
        image_size=SIDE, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=3
    ),
}


def pixels(kind: int, number: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """A noisy picture [height, width, 3] whose brightness, or redness, tells its class."""
    draw = np.random.default_rng([kind, number])
    noise = draw.integers(0, 120, (height, width, 3))
    colour = ([10, 10, 10], [130, 130, 130], [130, 10, 10])[kind]
    return (noise + colour).astype(np.uint8)


def photos(folder: Path, rows: int = 48, test: int = 12) -> Path:
    """A folder a class below train and test; one of four pictures is grey, one has transparency, one is a JPEG."""
    for split, count, first in (("train", rows, 0), ("test", test, 1000)):
        for number in range(count):
            kind = number % len(CLASSES)
            place = folder / split / CLASSES[kind]
            place.mkdir(parents=True, exist_ok=True)
            picture = PIL.Image.fromarray(pixels(kind, first + number))
            mode, ending = (("L", "png"), ("RGBA", "png"), ("RGB", "jpg"), ("RGB", "png"))[number // 3 % 4]
            picture.convert("RGB" if kind == 2 and mode == "L" else mode).save(place / f"{number:03}.{ending}")
    return folder


def table(count: int, first: int = 0, **sides: int) -> Dataset:
    """Rows with columns image and label."""
    kinds = [number % len(CLASSES) for number in range(count)]
    pictures = [PIL.Image.fromarray(pixels(kind, first + i, **sides)) for i, kind in enumerate(kinds)]
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    return Dataset.from_dict({"image": pictures, "label": kinds}, features=features)


def parquet(folder: Path, rows: int = 48, test: int = 12) -> Path:
    """The same in parquet, as the Hub keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    table(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    table(test, 1000).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def processor(side: int = SIDE) -> Any:
    return transformers.ViTImageProcessorPil(size={"height": side, "width": side})


def vision(family: str = "vit", seed: int = 0) -> Any:
    """A model without a head, its weights drawn from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(CONFIGS[family]())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, 0.0, 0.2)
    return model


def checkpoint(folder: Path, family: str = "vit", seed: int = 0) -> Path:
    """A folder as a vision model's authors publish it: weights without a head, and an image processor."""
    vision(family, seed).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder
