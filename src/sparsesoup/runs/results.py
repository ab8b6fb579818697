"""Content of report.json, from the problem and the ticket of a run."""

import copy
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sparsesoup.core import masks as algebra
from sparsesoup.core.rng import fork_rng_of
from sparsesoup.core.ticket import Ticket
from sparsesoup.hub.build import OpenedTask
from sparsesoup.hub.tasks.registry import describe_task, task_type_of
from sparsesoup.methods import TABLE
from sparsesoup.runs.config import RunConfig
from sparsesoup.training.cost import Cost, CountFlops
from sparsesoup.training.problem import Problem, evaluate_model


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Model and data of a run, as its report describes them.

    Args:
        model, dataset: their names.
        local: those of the two names that are known on this machine alone.
        task: description of inputs and outputs.
        fingerprint: digest of the training rows.
        model_files: digest of the files of the model's folder; empty if there is none.
        head: origin of the task head.
        labels: names of the classes.
        before: scores of a model that needs no training, before any.
        fingerprints: what the run began from, of objects.
    """

    model: str
    dataset: str
    local: list[str]
    task: str
    fingerprint: str
    model_files: str = ""
    head: str = "not pruned"
    labels: tuple[str, ...] = ()
    before: dict[str, float] = field(default_factory=dict)
    fingerprints: dict[str, Any] = field(default_factory=dict)


def facts_of_task(settings: RunConfig, problem: Problem, opened: OpenedTask) -> RunFacts:
    """Return the facts of a model and a dataset found by their names."""
    ready = task_type_of(opened.task).ready
    return RunFacts(
        model=settings.model_data.model,
        dataset=opened.source.name,
        local=[key for key in ("model", "dataset") if Path(getattr(settings.model_data, key)).exists()],
        task=describe_task(opened.task),
        fingerprint=opened.source.train_fingerprint,
        model_files=opened.model_files,
        head=ready(opened.task) if ready else "not pruned",
        labels=tuple(getattr(opened.task, "labels", ())),
        before=_scores_before(problem) if ready else {},
    )


def make_report(
    settings: RunConfig, problem: Problem, ticket: Ticket, facts: RunFacts, seconds: float
) -> dict[str, Any]:
    """Return the report of a finished run.

    Args:
        seconds: wall-clock time since this process started or resumed the run.
    """
    notes = {name: note for name, note in ticket.notes.items() if name != "evaluations"}
    kept = {name: int(torch.count_nonzero(m)) for name, m in ticket.masks.items()}
    return {
        "format": 1,
        "method": settings.name,
        "settings": settings.to_dict(),
        "model": facts.model,
        "dataset": facts.dataset,
        "local": facts.local,
        "task": facts.task,
        "dataset_fingerprint": facts.fingerprint,
        "model_files": facts.model_files,
        "seed": settings.model_data.seed,
        "steps": problem.steps,
        "sparsity": {
            "target": settings.budget.sparsity,
            "reached": ticket.sparsity,
            "kept": algebra.count_kept(ticket.masks),
            "total": algebra.count_total(ticket.masks),
        },
        "validation": ticket.metrics,
        "evaluations": ticket.notes.get("evaluations", []),
        "answers": _answer_facts(ticket, facts.labels),
        "test": None,
        "cost": ticket.cost,
        "seconds": seconds,
        "matrices": [
            {"name": n, "role": t.role, "shape": list(t.shape), "kept": kept[n], "total": ticket.masks[n].numel()}
            for n, t in problem.targets.items()
        ],
        "notes": {**notes, **({"before": facts.before} if facts.before else {})},
        **_plain_steps(settings, problem, ticket.cost),
        "head": "; ".join([facts.head, *problem.notes]),
        "train_rows": len(problem.train),
        "validation_rows": len(problem.validation),
        "command": settings.repeat_command(),
        "versions": library_versions(),
        "machine": machine_name(problem.accelerator.device),
        **({"fingerprints": facts.fingerprints} if facts.fingerprints else {}),
    }


def _answer_facts(ticket: Ticket, labels: Sequence[str]) -> dict[str, Any]:
    """Return the statistics of the predictions on the validation rows, with the name of the commonest one."""
    answer = ticket.answers.get("answer", -1)
    return {**ticket.answers, **({"called": labels[int(answer)]} if 0 <= answer < len(labels) else {})}


def _scores_before(problem: Problem) -> dict[str, float]:
    """Return the pre-trained model's validation scores; no method needs them, so their cost is not recorded."""
    model = problem.accelerator.prepare_model(copy.deepcopy(problem.pretrained), evaluation_mode=True)
    return evaluate_model(problem, model, problem.validation, Cost())


def _plain_steps(settings: RunConfig, problem: Problem, cost: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return `dense_flops` measured on one plain step, if the run's steps include a teacher; else an empty dict."""
    main = cost.get("main")
    if not main or "teacher" in cost or (problem.objective is None and not TABLE[settings.name].with_teacher):
        return {}
    indices = list(range(min(problem.training.rows_per_step, len(problem.train))))
    batch, model = problem.train.batch(indices), problem.pretrained
    with fork_rng_of(model.parameters()), CountFlops() as count:
        loss = problem.criterion(problem.predict(model, batch), batch)
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    per_token = count.flops / problem.train.count_tokens(indices)[0]
    return {"dense_flops": per_token * main["tokens"] / main["steps"] * problem.steps}


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that affect a run's numbers."""
    return {name: version(name) for name in ("sparsesoup", "torch", "transformers", "datasets")}


def machine_name(device: object = "cpu") -> str:
    """Return the description of the machine for reports."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {device}"
