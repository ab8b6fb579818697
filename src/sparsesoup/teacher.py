"""The teacher of a distillation: found, or trained first, and charged to the run it teaches."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsesoup.errors import UserError
from sparsesoup.hub.build import Opened
from sparsesoup.hub.models import load_model, load_tokenizer
from sparsesoup.meter import Cost, Meter
from sparsesoup.methods import METHODS
from sparsesoup.objectives import distilled
from sparsesoup.problem import Distill, Problem
from sparsesoup.recipe import Amount, Settings

DENSE = "dense"


def teach(problem: Problem, settings: Settings, opened: Opened, path: str) -> Problem:
    """The problem with a teacher in its loss.

    Raises: UserError if the teacher is no fine-tuned model of this task or reads texts in another way.
    """
    place = settings.place
    teacher = load_model(path, opened.task, place.seed, place.trust_remote_code, whole=True)
    vocabularies = [load_tokenizer(m, place.trust_remote_code).get_vocab() for m in (path, place.model)]
    if vocabularies[0] != vocabularies[1]:
        raise UserError(
            f"the teacher {path} reads other tokens than {settings.place.model}; give a teacher with the same tokenizer"
        )
    return replace(problem, objective=distilled(problem, teacher, settings.train.distill))


def find_teacher(settings: Settings, out: Path, prune: Callable[[Settings, Path], Any]) -> tuple[str, Cost]:
    """(where the teacher is, what it cost): a model that is there costs nothing, `dense` what its run did.

    The dense run is an ordinary one beside the others, so it is trained once for all that learn from it.
    """
    wanted = settings.train.distill.teacher
    if wanted != DENSE:
        return wanted, Cost()
    run = prune(dense(settings), out)
    costs = [Cost(**cost) for label, cost in run.report["cost"].items() if label != "validation"]
    return str(run.path), sum(costs, Cost())


def dense(settings: Settings) -> Settings:
    """The settings of the dense run that teaches a run with these."""
    amount = Amount(steps=settings.amount.steps, epochs=settings.amount.epochs)
    train = replace(settings.train, distill=Distill())
    return replace(settings, name=DENSE, method=METHODS[DENSE], amount=amount, train=train)


def charge_teacher(meter: Meter, cost: Cost) -> None:
    """Put the teacher on the meter, unless a restarted run has it there already."""
    if cost.steps and "teacher" not in meter.costs:
        meter.add("teacher", cost)
