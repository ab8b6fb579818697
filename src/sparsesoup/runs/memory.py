"""Memory and disk of a run, from its plan and the shapes of its model: known before any weight is loaded."""

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.nn import Parameter

from sparsesoup.core.errors import UserError
from sparsesoup.core.rng import fork_rng_of
from sparsesoup.core.targets import Targets, target_parameters
from sparsesoup.hub.build import EPOCHS, OpenedTask
from sparsesoup.hub.models.loading import meta_model
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.hub.tasks.registry import task_type_of
from sparsesoup.hub.tasks.splits import training_splits
from sparsesoup.report.format import format_count
from sparsesoup.runs.config import RunConfig
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.optimizers import make_optimizer
from sparsesoup.training.plan import Phase, takes_snapshots
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import named_weights

GROUP = Path("/sys/fs/cgroup")  # of this process, in a container
SMALL = 128  # side of the matrix on which an optimizer's moments are counted


@dataclass(frozen=True)
class StateSizes:
    """Bytes of the parts of a training state.

    Args:
        weights: parameters and buffers.
        gradients: of the parameters that are trained.
        moments: of the optimizer, with the former gradient of a training that extrapolates.
        prunable: the prunable weights.
    """

    weights: int
    gradients: int
    moments: int
    prunable: int

    @property
    def plain(self) -> int:
        """The bytes that plain fine-tuning holds: the pre-trained model and its copy, gradients and moments."""
        return 2 * self.weights + self.gradients + self.moments

    @property
    def snapshot(self) -> int:
        """The bytes of a snapshot: weights, moments and masks."""
        return self.weights + self.moments + self.prunable // 4

    @property
    def saved(self) -> int:
        """The bytes of a saved state before anything is pruned: weights, moments and a bit for each mask."""
        return self.weights + self.moments + self.prunable // 32


def state_sizes(model: nn.Module, targets: Targets, training: TrainingConfig) -> StateSizes:
    """Return the sizes of a model's training state; the model may be on the meta device.

    >>> layer = nn.Linear(8, 4, bias=False)
    >>> state_sizes(layer, {}, TrainingConfig(optimizer="sgd"))
    StateSizes(weights=128, gradients=128, moments=128, prunable=0)
    """
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    prunable = sum(p.nbytes for p in target_parameters(model, targets).values())
    weights = sum(t.nbytes for t in named_weights(model).values())
    former = trained if training.extrapolate else 0  # the gradient of the last step
    return StateSizes(weights, trained, round(trained * _moments_per_weight(training.optimizer)) + former, prunable)


def _moments_per_weight(optimizer: str) -> float:
    """Return the bytes of moments over those of the weights."""
    weight = Parameter(torch.zeros(SMALL, SMALL))
    made = make_optimizer(optimizer, [{"params": [weight]}])
    weight.grad = torch.zeros_like(weight)
    made.step()
    return sum(t.nbytes for t in made.state[weight].values() if t.numel() > 1) / weight.nbytes


def extra_memory(
    phases: Sequence[Phase], sizes: StateSizes, training: TrainingConfig, device: torch.device, snapshots: str
) -> int:
    """Return the most bytes that a method holds on the device beyond plain fine-tuning: masks, copies, snapshots."""
    on_device, most, point = snapshots == "device" or (snapshots == "host" and device.type == "cpu"), 0.0, 0.0
    for phase in phases:
        taken = point + (sizes.snapshot if phase.kind == "fork" else 0)
        most = max(most, phase.copies * sizes.prunable + phase.models * sizes.weights + (taken if on_device else 0))
        point = sizes.snapshot if phase.hold else point  # a rewinding point
    best = sizes.weights if training.early_stopping_patience is not None else 0  # of the best validation
    return round(most) + best + sizes.prunable // 4


def disk_of(phases: Sequence[Phase], sizes: StateSizes, snapshots: str) -> tuple[int, int]:
    """Return (most bytes of the run's directory, those that stay): two saved states, artifacts, snapshots, model."""
    state = sizes.saved + round(max(phase.copies for phase in phases) * sizes.prunable)
    saved = state * (2 * any(phase.steps for phase in phases)) + sizes.saved * sum(phase.hold for phase in phases)
    stored = sizes.weights * sum(bool(phase.store) for phase in phases)
    points = sum(phase.hold for phase in phases) + any(phase.kind == "fork" for phase in phases)
    stays = sizes.weights + sizes.prunable // 32
    return saved + stored + stays + (points * sizes.snapshot if snapshots == "disk" else 0), stays


def may_take_snapshots(settings: RunConfig) -> bool:
    """Return True if a run of that method takes snapshots at a usual T."""
    with contextlib.suppress(UserError):  # what does not fit is reported elsewhere
        size = RunSize(10_000, 1000, settings.train, settings.model_data.seed)
        return takes_snapshots(settings.method.plan(size, float(settings.budget.sparsity or 0.0)))
    return True


def free_memory(device: torch.device) -> int:
    """Return the bytes that a process can still take on a device; of a CPU, within the limit of its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no such limit
        limit, taken = (int((GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - taken + int(stat["inactive_file"]))
    return free


def fresh_memory(device: torch.device) -> int:
    """Return the bytes that another process could use instead of this one."""
    return free_memory(device) + (int(psutil.Process().memory_info().rss) if device.type == "cpu" else 0)


def free_disk(folder: Path) -> int:
    """Return the free bytes where a folder is, or will be made."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def memory_warning(settings: RunConfig, opened: OpenedTask, device: torch.device, snapshots: str) -> str:
    """Return a warning if a run cannot fit into the memory that is free; else an empty string. Loads no weights."""
    model_data, kind = settings.model_data, task_type_of(opened.task)
    if kind.load is not None:  # its class cannot be built on the meta device
        return ""
    with contextlib.suppress(UserError), fork_rng_of(()):  # what is wrong is reported where it is used
        model = meta_model(model_data.model, opened.task, model_data.trust_remote_code)
        sizes = state_sizes(model, find_prunable(model), settings.train)
        phases = settings.method.plan(_size_of(settings, opened), float(settings.budget.sparsity or 0.0))
        need = sizes.plain + extra_memory(phases, sizes, settings.train, device, snapshots)
        need += sizes.weights if settings.train.distill.teacher else 0
        if device.type != "cpu":
            need -= sizes.weights  # the pre-trained model stays in host memory
        remedies = memory_remedies(phases, sizes, settings.train, device, snapshots)
        return too_little(need, free_memory(device), remedies, "at least ", " besides activations")
    return ""


def memory_remedies(
    phases: Sequence[Phase], sizes: StateSizes, training: TrainingConfig, device: torch.device, snapshots: str,
    model: nn.Module | None = None,
) -> list[str]:  # fmt: skip
    """Return what makes a run need less memory, as flags.

    Args:
        phases, sizes, training, device, snapshots: the run, as for `extra_memory`.
        model: the model, if the memory includes activations.
    """
    found, held = list[str](), extra_memory(phases, sizes, training, device, snapshots)
    if model is not None and training.batch_size > 1:
        found.append("a smaller --train.batch-size (with --train.gradient-accumulation-steps for as many rows a step)")
    if getattr(model, "supports_gradient_checkpointing", False) and not training.gradient_checkpointing:
        found.append("--train.gradient-checkpointing true")
    less = [p for p in ("host", "disk") if extra_memory(phases, sizes, training, device, p) < held]
    found += [f"--snapshots {' or '.join(less)}"] if less else []
    found += ["no --train.early-stopping-patience"] if training.early_stopping_patience is not None else []
    found += ["no --train.distill.teacher"] if training.distill.teacher else []
    return [*found, "a smaller --model"]


def too_little(
    need: float, free: float, remedies: Sequence[str], least: str = "", extra: str = "", what: str = "run"
) -> str:
    """Return a warning if more memory is needed than is free; else an empty string.

    >>> too_little(5.2e9, 4.1e9, ["less", "a smaller --model"])
    'this run needs 5.20 GB of memory, and 4.10 GB are free here: it may be killed; use less or a smaller --model'
    """
    if need <= free:
        return ""
    return (
        f"this {what} needs {least}{format_count(need, 'B')} of memory{extra}, and {format_count(free, 'B')} are free "
        f"here: it may be killed; use {' or '.join(filter(None, [', '.join(remedies[:-1]), remedies[-1]]))}"
    )


def _size_of(settings: RunConfig, opened: OpenedTask) -> RunSize:
    rows = len(training_splits(opened.source, opened.task, settings.model_data.seed)[0])
    epoch, budget = max(1, rows // settings.train.rows_per_step), settings.budget
    steps = budget.steps if budget.steps is not None else max(1, round((budget.epochs or EPOCHS) * epoch))
    return RunSize(steps, epoch, settings.train, settings.model_data.seed)
