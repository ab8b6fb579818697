"""A tiny CLIP of random weights with its processor, and a folder of coloured images for it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import pre_tokenizers

COLOURS = {"brick_red": (180, 60, 50), "moss_green": (80, 140, 60), "sky": (110, 170, 230)}
SIDE = 8


def tokenizer(length: int = 48) -> Any:
    """One token a letter, as CLIP's own for words that it does not know."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=length)


def clip(seed: int = 0) -> Any:
    """Both towers of two layers, every weight and bias random."""
    words = tokenizer()
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    special = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = transformers.CLIPConfig(
        text_config={**shape, **special, "vocab_size": len(words), "max_position_embeddings": 48},
        vision_config={**shape, "image_size": SIDE, "patch_size": 4},
        projection_dim=12,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.CLIPModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim():
                    parameter.normal_(0.0, 0.2)
            model.logit_scale.fill_(1.5)
    return model.eval()


def checkpoint(folder: Path, seed: int = 0) -> Path:
    """A folder as CLIP's authors publish it."""
    clip(seed).save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    images = transformers.CLIPImageProcessorPil(size=side, crop_size=side)
    transformers.CLIPProcessor(images, tokenizer()).save_pretrained(folder)
    return folder


def pictures(folder: Path, rows: int = 16, colours: dict[str, tuple[int, int, int]] | None = None) -> Path:
    """A folder a class below train and test, images of one colour with noise on it."""
    for split, count, seed in (("train", rows, 1), ("test", 6, 2)):
        draw = np.random.default_rng(seed)
        for name, colour in (colours or COLOURS).items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                noisy = np.array(colour) + draw.normal(0, 25, (10, 12, 3))
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / split / name / f"{i}.png")
    return folder
