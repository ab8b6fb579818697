"""Zero-shot CLIP classification: prompts with class names, encoded once, are a frozen head on the vision tower."""

import copy
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Value
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel
from transformers import CLIPVisionModelWithProjection as Tower

from sparsesoup.core.errors import UserError, one_line
from sparsesoup.core.files import atomic_write, load_table, write_table
from sparsesoup.hub.models.checkpoint import load_tokenizer, read_config
from sparsesoup.hub.models.weights import check_vocabulary, check_weights, load_weights
from sparsesoup.hub.tasks.images import ImageTask
from sparsesoup.hub.tasks.labels import WHOLE, describe_text_task
from sparsesoup.training.batching import Batch

HOLE = "{}"  # placeholder of the class name
PLAIN = ("a photo of a {}.",)
DIGITS = ('a photo of the number: "{}".',)
SIGNS = ('a zoomed in photo of a "{}" traffic sign.',)
OBJECTS = ("a photo of a {}.", "a blurry photo of a {}.", "a small photo of a {}.", "a photo of the {}.")
CARS = ("a photo of a {}.", "a photo of the {}, a type of car.", "a photo of the parked {}.")
# Part of a dataset's name -> its templates. Radford et al. 2021, sec. 3.1.4, explain their benefit.
KNOWN = {"mnist": DIGITS, "svhn": DIGITS, "gtsrb": SIGNS, "cifar": OBJECTS, "cars": CARS}
CLIP, TOWER = "clip", "clip_vision_model"  # model_type of config.json
HEAD = "zero_shot_head"  # a buffer of the model, which save_pretrained does not save
NAME, FORMAT = "zero_shot", "1"  # of the files in the folder pruning/
WEIGHTS, PROMPTS = f"{NAME}.safetensors", f"{NAME}.json"
AT_A_TIME = 256  # prompts per batch


def templates_of(given: str | None, dataset: str) -> tuple[str, ...]:
    """Return the prompt templates for class names.

    `given` is a sentence with {} for the name, or a file with one per line; None uses those of the dataset.

    >>> templates_of("a picture of my {}.", "cifar10"), templates_of(None, "mnist")
    (('a picture of my {}.',), ('a photo of the number: "{}".',))
    """
    if given is None:
        return next((found for part, found in KNOWN.items() if part in dataset.lower()), PLAIN)
    found = _read_lines(given) if os.path.isfile(given) else (given,)
    for line in found:
        if HOLE not in line:
            raise UserError(
                f"the prompt {line!r} has no {HOLE} where the class name goes, and is no file with one prompt a line; "
                f"write 'a photo of a {HOLE}.'",
                "prompts",
            )
    return _require_different(found, "prompt", "prompts")


def names_of(given: str | None, labels: Sequence[str], numbered: bool, dataset: str) -> tuple[str, ...]:
    """Return the class names for prompts.

    `given` holds names in the labels' order, separated by commas, or is a file with one per line; None uses the labels,
    unless they are `numbered`.

    >>> names_of(None, ["grand_piano", "tick"], False, "objects")
    ('grand piano', 'tick')
    """
    if given is None and numbered:
        raise UserError(
            f"the {len(labels)} classes of {dataset} are numbers without names, which a CLIP's prompts need; set "
            f"a file of one name a line, or name,name,...",
            "class_names",
        )
    found = tuple(labels) if given is None else _read_lines(given) if os.path.isfile(given) else tuple(given.split(","))
    found = tuple(" ".join(name.replace("_", " ").split()) for name in found)
    if len(found) != len(labels):
        lost = f" (there is no file {given})" if given and "," not in given and not os.path.isfile(given) else ""
        raise UserError(
            f"{len(found)} names are given{lost}, {dataset} has {len(labels)} classes; give one each", "class_names"
        )
    if not all(found):
        raise UserError(f"class {found.index('')} of {dataset} has an empty name; name it", "class_names")
    return _require_different(found, "class name", "class_names")


def _read_lines(path: str) -> tuple[str, ...]:
    try:
        found = tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}; give a text file") from error
    if not found:
        raise UserError(f"{path} is empty, where at least one line is needed; check the file")
    return found


def _require_different(found: tuple[str, ...], what: str, field: str) -> tuple[str, ...]:
    twice = [name for name, count in Counter(found).items() if count > 1]
    if twice:
        raise UserError(
            f"the {what} {twice[0]!r} is there twice, so the two cannot be distinguished; correct it", field
        )
    return found


@dataclass(frozen=True)
class ZeroShot(ImageTask):
    """Image classification by CLIP with a head made from prompts."""

    names: tuple[str, ...] = ()  # class names in prompts, in the order of `labels`
    templates: tuple[str, ...] = ()  # sentences with {} for the name


def predict_zero_shot(model: nn.Module, batch: Batch) -> Tensor:
    """Return logits [rows, classes]: head n(image), in float32 whatever the precision of the tower."""
    images = model(pixel_values=batch["pixel_values"]).image_embeds.float()
    return functional.normalize(images, dim=-1) @ model.get_buffer(HEAD).T


@dataclass(frozen=True)
class TowerWithHead:
    """A vision tower of any kind, such as an export in another process, with the head saved in its ticket."""

    tower: Callable[..., Any]
    head: Tensor

    def __call__(self, **inputs: Tensor) -> Any:
        """Return the outputs of the tower."""
        return self.tower(**inputs)

    def get_buffer(self, name: str) -> Tensor:
        """Return the head, as a model loaded for training does."""
        return self.head


@torch.no_grad()
def zero_shot_head_of(clip: Any, tokenizer: Any, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return a head [classes, dimensions] from prompts: exp(s) n(mean_t n(text(t(c)))) for class c.

    n(x) = x / |x|, s is the checkpoint's logit scale, t a template. With one template its logits are the checkpoint's
    own `logits_per_image`. Radford et al. 2021, sec. 3.1.2 and 3.1.4.
    """
    prompts = [template.replace("{}", name) for name in names for template in templates]
    most = clip.config.text_config.max_position_embeddings
    rows = tokenizer(prompts, padding=True, return_tensors="pt").to(clip.device)
    lengths = rows["attention_mask"].sum(1)
    if int(lengths.max()) > most:
        raise UserError(
            f"the prompt {prompts[int(lengths.argmax())]!r} has {int(lengths.max())} tokens, the text tower takes "
            f"{most}; shorten it, or its class_names",
            "prompts",
        )
    parts = zip(*(rows[key].split(AT_A_TIME) for key in ("input_ids", "attention_mask")), strict=True)
    found = [clip.get_text_features(input_ids=i, attention_mask=m).pooler_output.float() for i, m in parts]
    each = functional.normalize(torch.cat(found), dim=-1).view(len(names), len(templates), -1)
    return clip.logit_scale.exp() * functional.normalize(each.mean(1), dim=-1)


def vision_tower(clip: Any) -> Tower:
    """Return the vision tower of a CLIP with its projection, in its stock class; it shares the weights."""
    config = copy.deepcopy(clip.config.vision_config)
    config.projection_dim = clip.config.projection_dim
    with torch.device("meta"):
        tower = Tower(config)
    tower.vision_model, tower.visual_projection = clip.vision_model, clip.visual_projection
    return tower


def load_zero_shot(options: Mapping[str, Any], task: ZeroShot) -> Tower:
    """Load the vision tower with the head for a task: from a CLIP, or as saved in a ticket."""
    name = str(options["pretrained_model_name_or_path"])
    whole = read_config(options, name).model_type == CLIP
    loaded, lacking, left = load_weights(CLIPModel if whole else Tower, name, options, dtype=torch.float32)
    check_weights(name, loaded, lacking, left)
    if whole:
        tower, tokenizer = vision_tower(loaded), load_tokenizer(name, bool(options.get("trust_remote_code")))
        check_vocabulary(name, loaded.text_model, tokenizer)
        head = zero_shot_head_of(loaded, tokenizer, task.names, task.templates)
    else:
        tower, head = loaded, load_saved_head(Path(name), task)
    tower.register_buffer(HEAD, head, persistent=False)
    return tower


def save_zero_shot_head(folder: Path, model: nn.Module, task: ZeroShot) -> None:
    """Save the head and its prompts in a ticket's folder pruning/, each file atomically."""
    with atomic_write(folder / WEIGHTS) as temporary:
        save_file({"head": model.get_buffer(HEAD).cpu().contiguous()}, temporary)
    write_table(folder / PROMPTS, {"format": FORMAT, "names": task.names, "templates": task.templates})


def load_saved_prompts(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return the saved (class names, templates) of the ticket in a model folder; None if it has none."""
    path = folder / "pruning" / PROMPTS
    if not path.is_file():
        return None
    try:
        found = load_table(path)
        if found["format"] != FORMAT:
            raise UserError(f"{path} has format {found['format']}; this version reads {FORMAT}")
        return tuple(map(str, found["names"])), tuple(map(str, found["templates"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"damaged ticket: {path} cannot be read ({error}); copy it again") from error


def load_saved_head(folder: Path, task: ZeroShot) -> Tensor:
    """Load the head of the ticket in a model folder."""
    if load_saved_prompts(folder) != (task.names, task.templates):
        raise UserError(
            f"{folder} has a frozen head of other classes or prompts, and no text tower to read these; use its base "
            f"model, a whole CLIP"
        )
    try:
        return load_file(folder / "pruning" / WEIGHTS)["head"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"damaged ticket: {folder / 'pruning' / WEIGHTS} cannot be read ({error})") from error


def as_zero_shot_task(
    task: ImageTask, kind: str, folder: Path, train: Dataset, name: str, prompts: str | None, classes: str | None
) -> ImageTask:
    """Convert a task of images to zero-shot if the model is a CLIP or a ticket of one.

    `kind` is the model_type, `folder` the model's; prompts and classes that are not given come from the ticket.
    """
    words = load_saved_prompts(folder)
    if kind == TOWER and words is None:
        raise UserError(
            f"model {folder} is the vision tower of a CLIP alone, and a head is made by the text tower; give the whole "
            f"CLIPModel"
        )
    if kind not in (CLIP, TOWER) or not task.labels:
        return task
    feature = train.features[task.label]
    numbered = isinstance(feature, Value) and feature.dtype in WHOLE
    names = words[0] if words and classes is None else names_of(classes, task.labels, numbered, name)
    templates = words[1] if words and prompts is None else templates_of(prompts, name)
    return ZeroShot(task.texts, task.label, task.labels, task.metrics, names, templates)


def in_words(task: Any) -> str:
    """Describe the inputs and outputs of a zero-shot task."""
    more = f" and {len(task.templates) - 1} more prompts" if len(task.templates) > 1 else ""
    return f"{describe_text_task(task)}, named to CLIP as {task.templates[0]!r}{more}"


def describe_head(task: Any) -> str:
    """Describe the origin of the head."""
    return f"made by CLIP's text tower of {len(task.names)} class names in {len(task.templates)} prompts each; frozen"
