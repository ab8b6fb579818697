"""How a model is trained, whatever the method: settings of the optimizer, and of a teacher."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from sparsesoup.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Learn a teacher's answers beside the labels. Hinton et al. 2015; on pruning, Sanh et al. 2020, sec. 5.

    Args:
        teacher: run directory, Hub id or folder of a fine-tuned model; or dense, which trains it first (its cost is
            charged to the run). Empty: no distillation.
        hardness: share of the teacher in the loss, the rest is the labels'.
        temperature: of both answers before they are compared.
        hidden: weight of the mean squared distance between the outputs of the blocks, on top.
    """

    teacher: str = ""
    hardness: float = 0.5
    temperature: float = 2.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.hardness <= 1.0 or not 0.0 < self.temperature < math.inf or not 0 <= self.hidden < math.inf:
            raise UserError(
                f"train.distill has hardness in [0, 1], temperature above 0 and hidden of at least 0, got "
                f"{self.hardness:g}, {self.temperature:g} and {self.hidden:g}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained, whatever the method.

    Args:
        learning_rate: highest learning rate; it rises over the warm-up and falls in a straight line to 0.
        weight_decay: decay of matrices; biases and norms have none.
        warmup: share of the steps over which the learning rate rises.
        batch_size: rows of one optimizer step.
        accumulation: parts into which a batch is cut to save memory. A step still has batch_size rows: the number
            divides them, where gradient accumulation elsewhere multiplies them.
        clip: largest gradient norm; 0 does not clip.
        precision: no (float32) or bf16 (autocast; weights stay float32).
        freeze_embeddings: embeddings (words, positions, types, with their norm; patches) are not trained, as in the
            code of movement pruning.
        optimizer: adamw, adam, sgd or rmsprop (the last two with momentum 0.9).
        distill: a teacher whose answers are learnt beside the labels.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    batch_size: int = 32
    accumulation: int = 1
    clip: float = 1.0
    precision: Literal["no", "bf16"] = "no"
    freeze_embeddings: bool = False
    optimizer: Literal["adamw", "adam", "sgd", "rmsprop"] = "adamw"
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        for name, low in (("learning_rate", 0.0), ("weight_decay", 0.0), ("clip", 0.0)):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= low):
                raise UserError(f"train.{name} must be a number of at least 0, got {getattr(self, name)}")
        if not 0.0 <= self.warmup < 1.0:
            raise UserError(f"train.warmup is a share of the steps in [0, 1), got {self.warmup}")
        if self.batch_size < 1 or not 1 <= self.accumulation <= self.batch_size:
            raise UserError(
                f"train.batch_size must be at least 1 and train.accumulation from 1 to it, "
                f"got {self.batch_size} and {self.accumulation}"
            )

    def precision_warning(self) -> str:
        """What a user should know who asks this machine for bf16 that it has no arithmetic for; nothing otherwise."""
        if self.precision == "no" or torch.accelerator.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return ""
        return (
            "this CPU has no bf16 arithmetic, so that a step takes many times as long as in float32; leave "
            "train.precision out"
        )
