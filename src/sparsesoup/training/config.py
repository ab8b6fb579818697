"""Training settings shared by all methods: optimizer and distillation."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from sparsesoup.core.errors import UserError
from sparsesoup.core.rng import cpu_generator
from sparsesoup.core.settings import TypedSettings
from sparsesoup.training.device import check_precision, current_device, default_precision
from sparsesoup.training.optimizers import check_optimizer_library

Precision = Literal["auto", "no", "bf16", "fp16"]
OptimizerName = Literal["adamw", "adam", "sgd", "rmsprop", "nadam", "radam", "adafactor", "adamw_bnb_8bit", "lion_8bit"]

MOST_WORKERS = 256  # threads that prepare batches, far above any use


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TypedSettings):
    """Distillation from a teacher, on top of the labels. Hinton et al. 2015; for pruning, Sanh et al. 2020, sec. 5.

    Args:
        teacher: run directory, Hub id or folder of a fine-tuned model; or dense, which trains it first (its
            cost is included in the run). Empty: no distillation.
        alpha: weight of the teacher in the loss; the labels have the remaining weight.
        temperature: softmax temperature for the outputs of teacher and student.
        hidden: weight of the mean squared error between block outputs, added to the loss.
        attention: weight of the mean squared error between attention maps, added to the loss.
    """

    teacher: str = ""
    alpha: float = 0.5
    temperature: float = 2.0
    hidden: float = 0.0
    attention: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise UserError(f"a share is in [0, 1], got {self.alpha:g}", "alpha")
        if not 0.0 < self.temperature < math.inf:
            raise UserError(f"must be above 0, got {self.temperature:g}", "temperature")
        for name in ("hidden", "attention"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise UserError(f"must be at least 0, got {getattr(self, name):g}", name)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(TypedSettings):
    """Training settings shared by all methods.

    Args:
        learning_rate: peak learning rate, with linear warm-up and linear decay to 0.
        weight_decay: weight decay of matrices; biases and norms have none.
        warmup_ratio: share of the steps used for warm-up.
        batch_size: rows of a forward pass; a step has batch_size x gradient_accumulation_steps rows.
        gradient_accumulation_steps: forward passes per optimizer step, as in transformers.
        max_grad_norm: maximum gradient norm; 0 disables clipping.
        precision: no (float32), bf16 or fp16 (autocast; weights stay float32); default auto: bf16 on a CUDA device that
            supports it, else no.
        tf32: allow TF32 in float32 products and convolutions of a CUDA device.
        gradient_checkpointing: keep only the inputs of blocks for the backward pass and recompute the rest.
        torch_compile: compile the model with torch.compile.
        full_determinism: on a GPU, use only torch's deterministic algorithms, so that a run repeats exactly; slower.
        dropout: probability of all dropout layers during training; default: the model's own (gradual-obs: 0).
        freeze_embeddings: do not train embeddings (words, positions, types, with their norm; patches), as in the code
            of movement pruning.
        optimizer: adamw, adam, sgd or rmsprop (these two with momentum 0.9), nadam, radam, adafactor; with
            8-bit moments, by bitsandbytes: adamw_bnb_8bit, lion_8bit.
        extrapolate: step of an extrapolation, in learning rates: gradients are computed at the weights moved by that
            many times the previous step's gradient, and applied to the weights themselves. Lin et al. 2020; 0: off.
        eval_steps: validate every this many steps of the main training, for a curve in the report; default: only the
            result.
        early_stopping_patience: once the masks are final, stop after this many validations without a better score (the
            first of the metric); the result has the weights of the best one. Needs eval_steps; default: train all T
            steps.
        dataloader_num_workers: threads that prepare batches ahead (decode, resize and crop images, pad texts), as
            transformers calls its processes; 0: each batch when it is needed. The result does not depend on it.
        distill: distillation from a teacher, in addition to the labels.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    precision: Precision = "auto"
    tf32: bool = False
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    full_determinism: bool = False
    dropout: float | None = None
    freeze_embeddings: bool = False
    optimizer: OptimizerName = "adamw"
    extrapolate: float = 0.0
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    dataloader_num_workers: int = 0
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "extrapolate"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0.0):
                raise UserError(f"must be a number of at least 0, got {getattr(self, name):g}", name)
        if not 0.0 <= self.warmup_ratio < 1.0:
            raise UserError(f"a share of the steps is in [0, 1), got {self.warmup_ratio:g}", "warmup_ratio")
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise UserError(f"a probability in [0, 1), or left out, got {self.dropout:g}", "dropout")
        for name in ("batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"must be at least 1, got {getattr(self, name)}", name)

        if not 0 <= self.dataloader_num_workers <= MOST_WORKERS:
            raise UserError(
                f"must be at least 0 and at most {MOST_WORKERS}, got {self.dataloader_num_workers}",
                "dataloader_num_workers",
            )
        for name in ("eval_steps", "early_stopping_patience"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"must be at least 1, or left out, got {value}", name)
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise UserError(
                "early stopping needs validations during training; set {} too", "early_stopping_patience",
                named=["eval_steps"],
            )  # fmt: skip

    @property
    def rows_per_step(self) -> int:
        """The rows per optimizer step: `batch_size` times `gradient_accumulation_steps`."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def mixed_precision(self) -> Literal["no", "bf16", "fp16"]:
        """The precision of the model's arithmetic on the device that runs use."""
        return default_precision(current_device()) if self.precision == "auto" else self.precision

    def check_device(self) -> None:
        """Raise a UserError if the device of runs lacks the precision, or the library of the optimizer is missing."""
        check_precision(current_device(), self.mixed_precision, self.tf32)
        check_optimizer_library(self.optimizer)

    def precision_warning(self) -> str:
        """Return a warning if bf16 is set on a CPU without bf16 arithmetic; else an empty string."""
        if self.mixed_precision == "no" or current_device().type != "cpu":
            return ""
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return ""
        return (
            "this CPU has no bf16 arithmetic, so that a step takes many times as long as in float32; leave "
            "train.precision out"
        )


@dataclass(frozen=True, kw_only=True)
class TrainingOverrides(TypedSettings):
    """Settings of a short run that differ from the main one; None keeps a setting.

    Args:
        rate: factor on the main run's learning rate at that step; or two, the range from which each run samples.
        weight_decay: weight decay of matrices.
        dropout: probability of all dropout layers.
        share: share of the training rows it sees, sampled again for each run.
    """

    rate: float | tuple[float, float] = 1.0
    weight_decay: float | None = None
    dropout: float | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        low, high = self._rate_range()
        if not 0 <= low <= high < math.inf or not 0 < self.share <= 1:
            raise UserError(
                f"a protocol has rate >= 0 (or two of them, the lower one first) and share in (0, 1], "
                f"got {self.rate} and {self.share}"
            )
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay of a protocol is a number of at least 0, got {self.weight_decay}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(f"dropout of a protocol lies in [0, 1), got {self.dropout}")

    def rate_factor(self, seed: int, *path: object) -> float:
        """Return the factor on the learning rate of one run, sampled uniformly if given as a range.

        Args:
            seed, path: random stream of the run; the same stream gives the same factor.

        >>> TrainingOverrides(rate=2.0).rate_factor(0, "weak", 1)
        2.0
        """
        low, high = self._rate_range()
        return low + (high - low) * float(
            torch.rand((), dtype=torch.float64, generator=cpu_generator(seed, "rate", *path))
        )

    def _rate_range(self) -> tuple[float, float]:
        return (self.rate, self.rate) if isinstance(self.rate, (int, float)) else self.rate
