"""The source of a run of objects: what it begins from, what its report says, and how its model is saved."""

import contextlib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsesoup.core.errors import UserError
from sparsesoup.core.rng import devices_of, fork_rng_of, seed_everything
from sparsesoup.core.targets import weights_fingerprint
from sparsesoup.core.ticket import Ticket, load_masks
from sparsesoup.hub.models import loading
from sparsesoup.hub.models.checkpoint import wrap_load_errors
from sparsesoup.hub.quiet import quiet_libraries
from sparsesoup.hub.tasks.overview import DataOverview
from sparsesoup.loops.object_data import rows_digest
from sparsesoup.loops.object_problem import ObjectProblem
from sparsesoup.loops.object_teacher import Teacher, attach_object_teacher, find_object_teacher
from sparsesoup.runs.config import RunConfig
from sparsesoup.runs.options import RuntimeOptions
from sparsesoup.runs.progress import ProgressLogger
from sparsesoup.runs.results import RunFacts
from sparsesoup.runs.run import fill_default_sparsity, run_folder
from sparsesoup.runs.run_folder import FinishedRun, Run, carry_out, run_in_folder
from sparsesoup.training.checkpoint import Checkpointer
from sparsesoup.training.cost import CostTracker
from sparsesoup.training.forks import ParallelMap, serial_map
from sparsesoup.training.model_copy import copy_model
from sparsesoup.training.problem import Problem, to_device
from sparsesoup.training.state import named_weights


@dataclass(frozen=True, kw_only=True)
class ObjectSource:
    """Model, rows and loss given as objects.

    Args:
        settings: settings of the run.
        problem: what is pruned, without costs, checkpoints and teacher.
        outside: runtime options.
        out: folder of all runs; None keeps the run in memory.
        teacher: a model, a run or model by name, or dense.
        processing_class: tokenizer or processor, saved with the model.
    """

    settings: RunConfig
    problem: Problem
    outside: RuntimeOptions
    out: Path | None = None
    teacher: Teacher = None
    processing_class: Any = None

    @property
    def path(self) -> Path | None:
        """The directory of the run; None in memory."""
        return None if self.out is None else self.out / run_folder(self.settings.model_data.dataset, self.settings)

    def run_method(self) -> Run | FinishedRun:
        """Run, resume or read the run: in its directory, or in memory."""
        if self.path is None:
            return carry_out(self.settings, None, self, self.outside)
        return run_in_folder(self.settings, self.path, self, self.outside)

    def overview(self) -> DataOverview:
        """Return what is known of the rows."""
        rows = f"{len(self.problem.train):,} training and {len(self.problem.validation):,} evaluation rows in memory"
        return DataOverview((f"{self.settings.model_data.dataset}: {rows}; there is no test split",), ())

    def make_problem(self, meter: CostTracker, checkpointer: Checkpointer, watch: ProgressLogger) -> Problem:
        """Return the problem, with its teacher."""
        problem = replace(self.problem, meter=meter, checkpointer=checkpointer, observer=watch)
        return problem if self.teacher is None else attach_object_teacher(problem, self.settings, self.teacher, self)

    def run_dense(self, settings: RunConfig) -> Run | FinishedRun:
        """Run the dense teacher on the same objects, next to the run."""
        problem = replace(self.problem, training=settings.train)
        settings, outside = fill_default_sparsity(settings), replace(self.outside, observer=None)
        return replace(self, settings=settings, problem=problem, teacher=None, outside=outside).run_method()

    def fingerprints(self, problem: Problem) -> dict[str, Any]:
        """Return digests of weights and rows, T, and the loss of the first rows, which tells losses and teachers.

        Raises: UserError if the outputs of the model cannot be evaluated, before they are needed at the end.
        """
        rows = list(range(min(problem.training.batch_size, len(problem.train))))
        model = problem.accelerator.prepare_model(copy_model(problem.pretrained), evaluation_mode=True).eval()
        with torch.no_grad(), fork_rng_of(model.parameters()):
            seed_everything(0, devices_of(model.parameters()))
            batch = to_device(problem.train.batch(rows), problem.accelerator.device)
            loss = float(problem.training_loss(model, batch))
            if isinstance(problem, ObjectProblem):
                problem.check_outputs(model)
        return {**self._weights_and_rows, "loss": f"{loss:.4g}"}

    @functools.cached_property
    def _weights_and_rows(self) -> dict[str, Any]:
        problem = self.problem
        return {
            "model": weights_fingerprint(named_weights(problem.pretrained)),
            "train_dataset": rows_digest(problem.train),
            "eval_dataset": rows_digest(problem.validation),
            "steps": problem.steps,
        }

    def parallel_map(self, path: Path | None) -> contextlib.AbstractContextManager[ParallelMap]:
        """Provide the map over the copies of a state, in this process: objects stay in it."""
        return contextlib.nullcontext(serial_map)

    def run_facts(self, problem: Problem, ticket: Ticket) -> RunFacts:
        """Return what the report says of model and data: that they are objects, and which."""
        model_data = self.settings.model_data
        known = model_data.model != type(problem.pretrained).__name__ and not Path(model_data.model).exists()
        found = self._weights_and_rows
        return RunFacts(
            model=model_data.model, dataset=model_data.dataset, local=["dataset"] if known else ["model", "dataset"],
            task=f"objects in memory ({', '.join(self.settings.objects)}), of which no test split is known",
            fingerprint=found["train_dataset"], head="as given", fingerprints=found,
        )  # fmt: skip

    def save_model(self, folder: Path, problem: Problem, ticket: Ticket, brief: Mapping[str, Any]) -> None:
        """Write the model: as save_pretrained does, or the state of another module as model.safetensors."""
        if isinstance(problem.pretrained, PreTrainedModel):
            loading.save_model(problem.pretrained, ticket.weights, folder, None, brief)
        else:
            product = copy_model(problem.pretrained).cpu()
            product.load_state_dict(ticket.weights)
            loading.save_module(product, folder)
        if hasattr(self.processing_class, "save_pretrained"):
            with quiet_libraries():
                self.processing_class.save_pretrained(folder)

    def check_unchanged(self, path: Path, report: Mapping[str, Any]) -> None:
        """Raise a UserError if a finished run is of another model or of other rows."""
        there, own = report.get("fingerprints") or {}, self._weights_and_rows
        if changed := [name for name, value in own.items() if there.get(name) != value]:
            raise UserError(f"{path} was made with another {' and '.join(changed)}; give another out=...")


def object_name(model: nn.Module) -> str:
    """Return the name of a model object: that it was loaded by, or its class's."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)


def check_dataset_name(name: str) -> str:
    """Return the name of the rows in reports and folders.

    Raises: UserError if it is no name of a folder.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or ".." in name:
        raise UserError(
            f"with train_dataset=... it is the name of the rows in reports and folders, of letters, digits, '-', '_' "
            f"and '.'; got {name!r}",
            "dataset",
        )
    return name


def load_object(model: nn.Module, run: Path) -> nn.Module:
    """Return a model of the same class with the weights of a run of objects.

    Raises: UserError if they are damaged or of another model.
    """
    if not isinstance(model, PreTrainedModel):
        return find_object_teacher(run, model).eval()
    with wrap_load_errors(str(run)):
        loaded: nn.Module = type(model).from_pretrained(run / "model", dtype=model.dtype)
    return loaded.eval()


def read_ticket(run: Run, model: nn.Module) -> Ticket:
    """Return the ticket of a run that was read from its directory."""
    facts, masks = run.report, load_masks(run.path)[0]
    weights = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
    masks = {name: masks[name] for name, _ in model.named_parameters() if name in masks}
    return Ticket(masks, weights, facts["validation"], facts["cost"], facts["notes"], facts["answers"])
