"""open_clip's vision towers as transformers models, so that code for transformers folders also reads these.

Their attention stores query, key and value in one parameter, `in_proj_weight`, outside any linear module.
"""

from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from sparsesoup.core.errors import UserError, cause_line
from sparsesoup.core.files import atomic_write, from_json
from sparsesoup.hub.models.weights import check_finite

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
NO_TEXT = {"layers": 1, "width": 8, "heads": 1, "vocab_size": 8, "context_length": 4}  # a minimal tower, discarded
FILTERS = {"bilinear": 2, "bicubic": 3}  # name of a filter -> Pillow's number


class OpenClipConfig(transformers.PreTrainedConfig):
    """The config of an open_clip model.

    Args:
        model_cfg: its table `model_cfg`.
        more: further keys as for every transformers model: `id2label` and others.
    """

    model_type = "open_clip"

    def __init__(self, model_cfg: dict[str, Any] | None = None, **more: Any) -> None:
        self.model_cfg = model_cfg or {}
        super().__init__(**more)


class OpenClipForImageClassification(transformers.PreTrainedModel):
    """A vision tower of open_clip with a linear head on its image embedding."""

    config_class = OpenClipConfig
    base_model_prefix = "visual"
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        try:
            from open_clip import CLIP
        except (ImportError, RuntimeError) as error:  # the latter for a torchvision built for another torch
            raise UserError(
                f"this model needs open_clip, which cannot be imported ({error}); pip install 'sparsesoup[images]'"
            ) from error
        table = config.model_cfg
        width, quick = table["embed_dim"], table.get("quick_gelu", False)
        self.visual = CLIP(width, table["vision_cfg"], NO_TEXT, quick_gelu=quick).visual
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutput:
        """Map pixel_values [rows, channels, height, width] to logits [rows, labels]."""
        features = self.visual(pixel_values)
        return ImageClassifierOutput(logits=self.classifier(features[0] if isinstance(features, tuple) else features))


def from_open_clip(checkpoint: str | Path, out: str | Path) -> Path:
    """Write the vision tower of an open_clip checkpoint as a folder for `--model`; a task adds its head.

    Args:
        checkpoint: folder with open_clip_config.json and open_clip_model.safetensors, or such a repository on the Hub.
        out: output folder, which must not exist.
    Returns: `out`. Its weights are under `visual.`, as in open_clip.
    Raises: UserError if the checkpoint is missing, damaged, or uses an unknown image preprocessing.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} is there already; give a folder that does not exist")
    try:
        folder = Path(checkpoint)
        if not folder.is_dir():
            folder = Path(huggingface_hub.snapshot_download(str(checkpoint), allow_patterns=[CONFIG, WEIGHTS]))
        table = from_json((folder / CONFIG).read_text(encoding="utf-8"))
        weights = {name: t for name, t in load_file(folder / WEIGHTS).items() if name.startswith("visual.")}
        model = OpenClipForImageClassification(OpenClipConfig(model_cfg=table["model_cfg"]))
        found = model.load_state_dict(weights, strict=False)
        if lacking := [n for n in (*found.missing_keys, *found.unexpected_keys) if not n.startswith("classifier.")]:
            raise KeyError(f"{lacking[0]} is missing or too many in {WEIGHTS}")
        check_finite(str(checkpoint), model)
        processor = _image_processor(table.get("preprocess_cfg") or {}, table["model_cfg"]["vision_cfg"])
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{checkpoint} is no open_clip checkpoint that can be read ({cause_line(error)}); give a folder with "
            f"{CONFIG} and {WEIGHTS}"
        ) from error
    with atomic_write(out) as temporary:
        model.save_pretrained(temporary, state_dict=weights)  # without the random head
        processor.save_pretrained(temporary)
    return out


def _image_processor(table: dict[str, Any], vision: dict[str, Any]) -> Any:
    """Return open_clip's evaluation transform as an image processor."""
    size = table.get("size", vision.get("image_size", 224))
    height, width = (size, size) if isinstance(size, int) else size
    mode, name = table.get("resize_mode", "shortest"), table.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or name not in FILTERS or (mode == "shortest" and height != width):
        raise UserError(
            f"the checkpoint's images are resized to {size} by {mode} and {name}, where square ones by shortest or "
            f"squash and {' or '.join(FILTERS)} are known here; use another checkpoint"
        )
    sides = {"height": height, "width": width}
    levels = {f"image_{key}": list(table[key]) for key in ("mean", "std") if key in table}  # CLIP's own by default
    return transformers.CLIPImageProcessorPil(
        size=sides if mode == "squash" else {"shortest_edge": height},
        crop_size=sides, do_center_crop=mode == "shortest", resample=FILTERS[name], **levels,
    )  # fmt: skip


transformers.AutoConfig.register("open_clip", OpenClipConfig)
for auto in (transformers.AutoModel, transformers.AutoModelForImageClassification):
    auto.register(OpenClipConfig, OpenClipForImageClassification)
