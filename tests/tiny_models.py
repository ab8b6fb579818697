"""Tiny models of every family that compaction knows, every weight and bias random; and ways to kill their groups."""

import copy
import functools
from typing import Any

import torch
import transformers

from sparsesoup.hub.models.layer_layouts import PrunableLayer, prunable_layers
from tiny_hub import COMMON, CONFIGS, SHAPE

LAYERS, HEADS, UNITS = 3, 4, 6
TEXT = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": UNITS}
PICTURE: dict[str, Any] = {**TEXT, "hidden_size": 16, "image_size": 8, "patch_size": 4}
WAYS = ("stays", "out", "in", "both", "mixed")  # how a head or a unit is killed


def clip(**more: Any) -> Any:
    words = {**TEXT, "hidden_size": 16, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2}
    return transformers.CLIPConfig(text_config=words, vision_config=PICTURE, projection_dim=8, **more)


MODELS = {
    "bert": lambda **m: transformers.BertForSequenceClassification(CONFIGS["bert"](**TEXT, **m)),
    "bert-relu": lambda **m: transformers.BertModel(CONFIGS["bert"](**TEXT, hidden_act="relu", **m)),
    "bert-wide": lambda **m: transformers.BertModel(CONFIGS["bert"](**(TEXT | {"hidden_size": 32}), **m)),
    "bert-mlm": lambda **m: transformers.BertForMaskedLM(CONFIGS["bert"](**TEXT, **m)),
    "roberta": lambda **m: transformers.RobertaForSequenceClassification(CONFIGS["roberta"](**TEXT, **m)),
    "xlm-roberta": lambda **m: transformers.XLMRobertaForQuestionAnswering(
        transformers.XLMRobertaConfig(**COMMON, **(SHAPE | TEXT | m))
    ),
    "electra": lambda **m: transformers.ElectraForSequenceClassification(CONFIGS["electra"](**TEXT, **m)),
    "distilbert": lambda **m: transformers.DistilBertForSequenceClassification(
        CONFIGS["distilbert"](n_layers=LAYERS, n_heads=HEADS, hidden_dim=UNITS, **m)
    ),
    "vit": lambda **m: transformers.ViTForImageClassification(transformers.ViTConfig(**PICTURE, **m)),
    "vit-no-bias": lambda **m: transformers.ViTModel(transformers.ViTConfig(**PICTURE, qkv_bias=False, **m)),
    "deit": lambda **m: transformers.DeiTForImageClassification(transformers.DeiTConfig(**PICTURE, **m)),
    "clip-vision": lambda **m: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**PICTURE, **m)),
    "clip-projection": lambda **m: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**PICTURE, projection_dim=8, **m)
    ),
    "clip": lambda **m: transformers.CLIPModel(clip(**m)),
    "clip-classifier": lambda **m: transformers.CLIPForImageClassification(clip(**m)),
}
# Those whose stock class takes another number of heads from its config.json.
FREE_HEADS = ("vit", "vit-no-bias", "deit")


def model_of(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A model of random weights; biases too, which are zero in a fresh one and would hide what is not folded."""
    return copy.deepcopy(_drawn(name, attention, seed)).to(dtype).eval()


@functools.cache
def _drawn(name: str, attention: str, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[name](attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.5)
    return model


@torch.no_grad()
def kill(layer: PrunableLayer, group: str, number: int, way: str) -> None:
    """Zero a head or a unit: what comes out of it, what goes into it, both, or half its features by each (heads)."""
    into, out_of = ("value", "output") if group == "heads" else ("up", "down")
    size = layer.head_size if group == "heads" else 1
    rows = torch.arange(number * size, (number + 1) * size)
    first, second = {"stays": (rows[:0], rows[:0]), "out": (rows[:0], rows), "in": (rows, rows[:0]),
                     "both": (rows, rows), "mixed": (rows[: size // 2], rows[size // 2 :])}[way]  # fmt: skip
    layer.module_of(into).weight[first] = 0
    layer.module_of(out_of).weight[:, second] = 0


def killed(model: Any, plan: dict[str, list[list[str]]]) -> Any:
    """A copy whose groups are killed as planned: group -> layer by layer, one way a head or unit."""
    masked = copy.deepcopy(model)
    for group, rows in plan.items():
        for layer, row in zip(prunable_layers(masked), rows, strict=False):
            for number, way in enumerate(row):
                kill(layer, group, number, way)
    return masked
