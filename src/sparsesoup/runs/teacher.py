"""The teacher of a distillation: loaded, or trained first and its cost included in the run."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sparsesoup.core.errors import UserError
from sparsesoup.core.targets import weights_fingerprint
from sparsesoup.hub.build import ModelAndDataConfig, OpenedTask, fit_config_to_rows, max_positions
from sparsesoup.hub.models.checkpoint import load_reader
from sparsesoup.hub.models.loading import load_model
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.hub.models.weights import LoadingNotes, check_vocabulary
from sparsesoup.hub.tasks.registry import task_type_of
from sparsesoup.methods import METHODS
from sparsesoup.runs.config import BudgetConfig, RunConfig
from sparsesoup.runs.trackers import TrackerConfig
from sparsesoup.training.attention_maps import attention_layers
from sparsesoup.training.config import DistillConfig
from sparsesoup.training.cost import Cost
from sparsesoup.training.distillation import block_names, distillation_objective
from sparsesoup.training.driver import dry_run
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import named_weights
from sparsesoup.training.train_cache import TrainingCache

DENSE, TEACHER = "dense", "teacher"


def with_teacher(
    problem: Problem, settings: RunConfig, opened: OpenedTask, prune: Callable[[RunConfig], Any]
) -> Problem:
    """Return the problem with a teacher in its loss. An existing model costs nothing, `dense` the cost of its run.

    The dense run is an ordinary run, so it is trained once for all runs that use it.

    Raises: UserError if the teacher is not a fine-tuned model of this task, or cannot process this model's rows.
    """
    path, report = settings.train.distill.teacher, dict[str, Any]()
    if path == DENSE:
        dry_run(settings.method, problem, float(settings.budget.sparsity or 0.0))
        try:
            run = prune(dense_config(settings))
        except UserError as error:
            raise UserError(f"the teacher's own run: {error.with_names(str)}") from error
        path, report = str(run.path), run.report
    try:
        learning = attach_teacher(problem, settings, opened, path)
    except UserError as error:
        raise UserError(error.with_names(str), "train.distill.teacher") from error
    if report:
        add_teacher_cost(problem, report)
    return learning


def add_teacher_cost(problem: Problem, report: Mapping[str, Any]) -> None:
    """Add the cost of its dense teacher's training to a run, once."""
    cost = sum((Cost(**c) for label, c in report["cost"].items() if label != "validation"), Cost())
    if cost.steps and TEACHER not in problem.meter.costs:  # a restarted run has counted it already
        problem.meter.add_cost(TEACHER, cost)


def attach_teacher(problem: Problem, settings: RunConfig, opened: OpenedTask, path: str) -> Problem:
    """Return the problem with the model at `path` in its loss."""
    model_data, distill = settings.model_data, settings.train.distill
    account = LoadingNotes()
    teacher = find_teacher(model_data, opened, path, account)
    _check_rows(problem, teacher, path, model_data.model)
    check_distilled_parts(problem.pretrained, teacher, distill)
    known = TrainingCache(
        None, {"teacher": weights_fingerprint(named_weights(teacher))}
    )  # so that trainings with it can be cached
    notes = (*problem.notes, *(f"the teacher {path}: {note}" for note in account.notes))
    objective = distillation_objective(problem, teacher, distill)
    return replace(problem, objective=objective, teacher=teacher, cache=known, notes=notes)


def find_teacher(
    model_data: ModelAndDataConfig, opened: OpenedTask, path: str, account: LoadingNotes | None = None
) -> Any:
    """Load the model at `path` as a teacher for the model of these settings; `account` collects notes for the user.

    Raises: UserError if it is missing, not fine-tuned for the task, or preprocesses its inputs differently.
    """
    images = task_type_of(opened.task).images
    own, other = (load_reader(m, images, model_data.trust_remote_code) for m in (model_data.model, path))
    fixed = {} if images else fit_config_to_rows(replace(model_data, model=path), opened.task, own)
    teacher = load_model(path, opened.task, model_data.seed, model_data.trust_remote_code, True, account, fixed)
    if images and own.to_dict() != other.to_dict():
        raise UserError(
            f"{path} sees images otherwise than {model_data.model}; give a teacher with its image processor"
        )
    if not images and own.get_vocab() != other.get_vocab():
        raise UserError(f"{path} reads other tokens than {model_data.model}; give a teacher with the same tokenizer")
    if not images:
        check_vocabulary(path, teacher, other)
    return teacher


def dense_config(settings: RunConfig) -> RunConfig:
    """Return the settings of the dense run that is the teacher of a run with these settings."""
    budget = BudgetConfig(steps=settings.budget.steps, epochs=settings.budget.epochs)
    train = replace(settings.train, distill=DistillConfig(), eval_steps=None, early_stopping_patience=None)
    return replace(settings, name=DENSE, method=METHODS[DENSE], budget=budget, train=train, tracking=TrackerConfig())


def _check_rows(problem: Problem, teacher: Any, path: str, model: str) -> None:
    """Raise a UserError if the teacher cannot process the model's rows."""
    takes = inspect.signature(teacher.forward).parameters
    given = inspect.signature(problem.pretrained.forward).parameters
    lacking = sorted(name for name in problem.train.batch([0]).keys() & given.keys() if name not in takes)
    if lacking:
        raise UserError(f"{path} takes no {lacking[0]}, which the rows of {model} have; give a teacher of its family")
    longest, most = max(problem.train.lengths, default=0), max_positions(teacher)
    if longest > most:
        raise UserError(f"{path} has {most} positions, the longest row {longest} tokens; set max_length {most}")


def check_distilled_parts(pretrained: Any, teacher: Any, distill: DistillConfig) -> None:
    """Raise a UserError if the blocks or attention maps of a model cannot be compared with a teacher's."""
    if distill.attention:
        heads = [
            {block: model.get_submodule(layer.query).weight.shape[0] // layer.head for block, layer in layers.items()}
            for model in (pretrained, teacher)
            for layers in [attention_layers(find_prunable(model))]
        ]
        if heads[0] != heads[1]:
            raise UserError(
                "its attention has other blocks or heads than the model's; attention compares like with like: set "
                "train.distill.attention 0"
            )
    if not distill.hidden:
        return
    own, other = block_names(find_prunable(pretrained)), block_names(find_prunable(teacher))
    widths = [getattr(model.config, "hidden_size", None) for model in (pretrained, teacher)]
    if own != other or widths[0] != widths[1]:
        raise UserError(
            f"it has {len(other)} blocks of width {widths[1]} ({other[0]}, ...), the model {len(own)} of width "
            f"{widths[0]} ({own[0]}, ...); hidden compares like with like: set train.distill.hidden 0"
        )
