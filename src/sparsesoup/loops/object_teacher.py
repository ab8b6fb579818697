"""The teacher of a run of objects: a model object, a run or model by name, or the dense run of the same objects."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_model
from torch import nn

from sparsesoup.core.errors import UserError
from sparsesoup.core.targets import weights_fingerprint
from sparsesoup.hub.models.checkpoint import WEIGHTS
from sparsesoup.hub.models.loading import load_as_saved
from sparsesoup.runs.config import RunConfig
from sparsesoup.runs.run_folder import FinishedRun, Run
from sparsesoup.runs.teacher import DENSE, add_teacher_cost, dense_config
from sparsesoup.training.distillation import block_names, distillation_objective
from sparsesoup.training.driver import dry_run
from sparsesoup.training.model_copy import copy_model
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import named_weights
from sparsesoup.training.train_cache import TrainingCache

Teacher = nn.Module | str | Path | None


class DenseRunner(Protocol):
    """Runs the dense teacher on the objects of a run."""

    def run_dense(self, settings: RunConfig) -> Run | FinishedRun: ...


def attach_object_teacher(problem: Problem, settings: RunConfig, teacher: Teacher, runner: DenseRunner) -> Problem:
    """Return the problem with a teacher in its loss; `dense` is trained first, and its cost is included in the run.

    Raises: UserError if there is no such teacher, or its blocks are others than the model's.
    """
    if isinstance(teacher, str) and teacher == DENSE:
        dry_run(settings.method, problem, float(settings.budget.sparsity or 0.0))
        try:
            dense = runner.run_dense(dense_config(settings))
        except UserError as error:
            raise UserError(f"the teacher's own run: {error}") from error
        add_teacher_cost(problem, dense.report)
        model = _model_of(problem.pretrained, dense)
    else:
        model = find_object_teacher(teacher, problem.pretrained)
    distill = settings.train.distill
    if distill.hidden or distill.attention:
        modules = dict(model.named_modules())
        if lost := [name for name in block_names(problem.targets) if name not in modules]:
            raise UserError(
                f"the teacher has no block {lost[0]}, which hidden and attention compare; set them to 0", "teacher"
            )
    known = TrainingCache(None, {"teacher": weights_fingerprint(named_weights(model))})
    return replace(problem, objective=distillation_objective(problem, model, distill), teacher=model, cache=known)


def _model_of(model: nn.Module, dense: Run | FinishedRun) -> nn.Module:
    if isinstance(dense, Run):
        return find_object_teacher(dense.path, model)
    copied = copy_model(model)
    copied.load_state_dict(dense.ticket.weights)
    return copied


def find_object_teacher(teacher: Teacher, model: nn.Module) -> nn.Module:
    """Return a copy of a teacher: a module, or a run directory, folder or Hub id of a model.

    Args:
        model: the model that it teaches; a run of a module that is none of transformers' is loaded into a copy of it.
    Raises: UserError if there is none.
    """
    if isinstance(teacher, nn.Module):
        return copy_model(teacher)
    folder = Path(str(teacher)) / "model"
    if (folder / WEIGHTS).is_file() and not (folder / "config.json").is_file():
        copied: Any = copy_model(model)
        try:
            load_model(copied, str(folder / WEIGHTS))
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"the model of {teacher} does not fit this one: {str(error).splitlines()[0]}") from error
        return copied
    return load_as_saved(str(teacher)).float()


def teacher_name(teacher: Teacher) -> str:
    """Return the name of a teacher in the settings of a run."""
    return type(teacher).__name__ if isinstance(teacher, nn.Module) else str(teacher)
