"""Distillation: a training loss with a teacher's outputs in addition to the task's criterion."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsesoup.core.errors import UserError
from sparsesoup.core.targets import Targets, block_of
from sparsesoup.training.attention_maps import attention_distance, attention_layers, attention_maps_of
from sparsesoup.training.batching import Batch
from sparsesoup.training.config import DistillConfig
from sparsesoup.training.grafting import grafted_blocks
from sparsesoup.training.loss_parts import LossParts
from sparsesoup.training.problem import Problem


def distillation_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Return the distillation loss for each row: [rows].

    KL(teacher || student) of softened outputs, times temperature^2 to keep the gradient scale (Hinton et al. 2015, sec.
    2), averaged over the outputs of a row (start and end of a span). A single output is a number: squared error.

    Args:
        student, teacher: outputs [rows, ..., answers].
        mask: [rows, tokens] of outputs [rows, tokens, answers]: tokens that count; default all.

    >>> distillation_divergence(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]), 2.0).item()
    0.0
    """
    student, teacher = student.float(), teacher.float()
    if student.shape[-1] == 1:
        return (student - teacher).square().flatten(1).mean(1)
    wanted, given = ((t / temperature).log_softmax(-1) for t in (teacher, student))
    divergence = (wanted.exp() * (wanted - given)).sum(-1)
    if mask is not None and mask.shape == divergence.shape:
        return divergence.masked_fill(mask == 0, 0.0).sum(-1) / mask.sum(-1).clamp(min=1) * temperature**2
    return divergence.reshape(len(student), -1).mean(1) * temperature**2


def distillation_objective(
    problem: Problem, teacher: nn.Module, settings: DistillConfig, graft: Callable[[], Sequence[str]] | None = None
) -> Callable[[nn.Module, Batch], LossParts]:
    """Return the objective (1 - alpha) * criterion + alpha * divergence + the distances of blocks.

    These are hidden * distance of the block outputs + attention * distance of the attention maps.

    Args:
        teacher: a model with outputs as `problem.predict` reads them; run without gradient or dropout.
        graft: returns the names of the blocks that the teacher computes in the student's place in this pass.
    Raises: UserError at the first step if its outputs or blocks differ in shape from the student's.
    """
    model = problem.accelerator.prepare_model(teacher, evaluation_mode=True).eval().requires_grad_(False)
    share, names = settings.alpha, block_names(problem.targets) if settings.hidden else []
    layers = attention_layers(problem.targets) if settings.attention else {}
    if settings.attention and not layers:
        raise UserError("this model has no separate query and key matrices; set --train.distill.attention 0")

    def objective(student: nn.Module, batch: Batch) -> LossParts:
        grafts, mask = graft() if graft else (), batch.get("attention_mask")
        teachers = dict.fromkeys(layers, model)
        owners = {block: model if block in grafts else student for block in layers}
        with torch.no_grad(), outputs_of(model, names) as wanted, attention_maps_of(teachers, layers) as wanted_maps:
            answers = problem.outputs_alone(model, batch)
            targets = wanted_maps(mask)
        with (
            grafted_blocks(student, model, grafts),
            outputs_of(student, names) as given,
            attention_maps_of(owners, layers) as given_maps,
        ):
            own, outputs = problem.loss_and_outputs(student, batch)
        if outputs.shape != answers.shape:
            raise UserError(
                f"the teacher answers {tuple(answers.shape[1:])} a row, the model {tuple(outputs.shape[1:])}; "
                f"give a teacher of the same task"
            )
        divergence = distillation_divergence(
            outputs, answers, settings.temperature, mask if outputs.dim() == 3 else None
        )
        loss = (1 - share) * own + share * divergence.mean()
        parts = [settings.hidden * _hidden_distance(given, wanted, mask)] if names else []
        parts += [settings.attention * _mean_distance(given_maps(mask), targets, mask)] if layers else []
        return LossParts(loss, tuple(parts))

    return objective


def block_names(targets: Targets) -> list[str]:
    """Return the names of the repeated blocks that hold prunable weights: the part up to the first number.

    Raises: UserError if no target lies in a numbered block.
    """
    found = dict.fromkeys(block for name in targets if (block := block_of(name)))
    if not found:
        raise UserError("train.distill.hidden needs a model with numbered blocks; set --train.distill.hidden 0")
    return list(found)


@contextmanager
def outputs_of(model: nn.Module, names: list[str]) -> Iterator[list[Tensor]]:
    """Collect the outputs of the named modules in a list while the model runs inside the block."""
    outputs: list[Tensor] = []

    def remember(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    handles = [model.get_submodule(name).register_forward_hook(remember) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _hidden_distance(given: list[Tensor], wanted: list[Tensor], mask: Tensor | None) -> Tensor:
    """Mean squared error over blocks, rows and tokens; padding is excluded."""
    if [t.shape for t in given] != [t.shape for t in wanted]:
        raise UserError(
            "train.distill.hidden compares blocks of equal number and width, the teacher's are others; set "
            "--train.distill.hidden 0"
        )
    return torch.stack([_masked_mse(a, b, mask) for a, b in zip(given, wanted, strict=True)]).mean()


def _mean_distance(given: list[Tensor], wanted: list[Tensor], mask: Tensor | None) -> Tensor:
    """Mean over layers of the distance of attention maps."""
    if [t.shape for t in given] != [t.shape for t in wanted]:
        raise UserError(
            "train.distill.attention compares attention of equal number of heads, the teacher's are others; set "
            "--train.distill.attention 0"
        )
    return torch.stack([attention_distance(a, b, mask) for a, b in zip(given, wanted, strict=True)]).mean()


def _masked_mse(one: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
    squares = (one - other).float().square().mean(-1)
    if mask is None or squares.shape != mask.shape:
        return squares.mean()
    return (squares.masked_fill(mask == 0, 0.0).sum(-1) / mask.sum(-1)).mean()
