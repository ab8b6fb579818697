"""What report.json says of a run, from its problem and its ticket."""

import copy
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sparsesoup.core import masks as algebra
from sparsesoup.core.ticket import Ticket
from sparsesoup.hub.build import Opened
from sparsesoup.hub.tasks.registry import kind_of, told
from sparsesoup.methods import TABLE
from sparsesoup.runs.config import Settings
from sparsesoup.training.cost import Cost, CountFlops
from sparsesoup.training.problem import Problem, evaluate


def summary(settings: Settings, problem: Problem, ticket: Ticket, opened: Opened, seconds: float) -> dict[str, Any]:
    """The facts of a finished run.

    Args:
        seconds: of wall-clock time since this process took it up.
    """
    targets, ready = problem.targets, kind_of(opened.task).ready
    head = "; ".join([ready(opened.task) if ready else "not pruned", *problem.notes])
    kept = {name: int(torch.count_nonzero(m)) for name, m in ticket.masks.items()}
    return {
        "format": 1,
        "method": settings.name,
        "settings": settings.to_dict(),
        "model": settings.place.model,
        "dataset": opened.source.name,
        "local": [key for key in ("model", "dataset") if Path(getattr(settings.place, key)).exists()],
        "task": told(opened.task),
        "dataset_fingerprint": opened.source.fingerprint,
        "seed": settings.place.seed,
        "steps": problem.steps,
        "sparsity": {
            "asked": settings.amount.sparsity,
            "reached": ticket.sparsity,
            "kept": algebra.kept(ticket.masks),
            "total": algebra.total(ticket.masks),
        },
        "validation": ticket.metrics,
        "answers": _answers(ticket, opened),
        "test": None,
        "cost": ticket.cost,
        "seconds": seconds,
        "matrices": [
            {"name": n, "role": t.role, "shape": list(t.shape), "kept": kept[n], "total": ticket.masks[n].numel()}
            for n, t in targets.items()
        ],
        "notes": {**ticket.notes, **({"before": _before(problem)} if ready else {})},
        **_plain_steps(settings, problem, ticket.cost),
        "head": head,
        "train_rows": len(problem.train),
        "validation_rows": len(problem.validation),
        "command": settings.command(),
        "versions": versions(),
        "machine": machine(problem.accelerator.device),
    }


def _answers(ticket: Ticket, opened: Opened) -> dict[str, Any]:
    """Return the facts on the answers to the validation rows, with the name of the commonest answer."""
    labels, answer = getattr(opened.task, "labels", ()), ticket.answers.get("answer", -1)
    return {**ticket.answers, **({"called": labels[int(answer)]} if 0 <= answer < len(labels) else {})}


def _before(problem: Problem) -> dict[str, float]:
    """Scores of the pre-trained model on the validation rows; no method needs them, so they are on no meter."""
    model = problem.accelerator.prepare_model(copy.deepcopy(problem.pretrained), evaluation_mode=True)
    return evaluate(problem, model, problem.validation, Cost())


def _plain_steps(settings: Settings, problem: Problem, cost: dict[str, dict[str, float]]) -> dict[str, float]:
    """`dense_flops`, where steps with a teacher in them do not tell what T plain ones take: from one plain step."""
    strong = cost.get("strong")
    if not strong or "teacher" in cost or (problem.objective is None and not TABLE[settings.name].taught):
        return {}
    indices = list(range(min(problem.training.batch_size, len(problem.train))))
    batch, model = problem.train.batch(indices), problem.pretrained
    with torch.random.fork_rng(), CountFlops() as count:
        loss = problem.criterion(problem.predict(model, batch), batch)
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    per_token = count.flops / problem.train.tokens(indices)[0]
    return {"dense_flops": per_token * strong["tokens"] / strong["steps"] * problem.steps}


def versions() -> dict[str, str]:
    """The libraries that decide a run's numbers."""
    return {name: version(name) for name in ("sparsesoup", "torch", "transformers", "datasets")}


def machine(device: object = "cpu") -> str:
    """What a run ran on, as reports say it."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {device}"
