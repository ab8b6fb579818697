"""Validation in the middle of a training, and early stopping by it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsesoup.core.masks import sparsity
from sparsesoup.core.rng import fork_rng_of
from sparsesoup.training.observer import Observer
from sparsesoup.training.problem import Problem, record_time
from sparsesoup.training.state import TrainState, named_weights

EVALUATION = "evaluation"  # label of the cost and of the log
MAIN = "main"  # label of the trainings that are validated
BEST = "best/"  # the weights of the best validation, in the memory of the state


@dataclass(frozen=True)
class EarlyStopping:
    """Stop a training when its scores no longer improve, and go back to its best weights. Prechelt 1998.

    The score is the first one of the metric, higher = better; the first of equals is the best.

    Args:
        patience: number of validations without improvement after which to stop.
        start: step of the run from which the masks are final; scores before it do not count.
    """

    patience: int
    start: int

    def take_scores(self, state: TrainState, scores: Mapping[str, float]) -> None:
        """Keep the weights if they are the best so far; else halt the training if that has been so for too long."""
        if state.step < self.start:
            return
        found: dict[str, Any] = state.notes.setdefault(
            "early_stopping",
            {"metric": next(iter(scores)), "best": -math.inf, "step": None, "waited": 0, "stopped": None},
        )
        score = scores.get(found["metric"], -math.inf)
        if found["step"] is None or score > found["best"] or math.isnan(found["best"]):
            found |= {"best": score, "step": state.step, "waited": 0}
            state.memory |= {f"{BEST}{n}": t.detach().clone() for n, t in named_weights(state.model).items()}
            return
        found["waited"] += 1
        if found["waited"] >= self.patience:
            found["stopped"] = state.step
            state.halt = True

    @torch.no_grad()
    def load_best_(self, state: TrainState) -> None:
        """Load the best weights at the end of the training; nothing if there was no validation."""
        for name, t in named_weights(state.model).items():
            best = state.memory.pop(BEST + name, None)
            if best is not None:
                t.copy_(best)


class Evaluator:
    """Validates a training every `eval_steps` steps of the run; one that may stop early also at its end.

    The scores go to the observer and into the notes of the state, their cost under a separate label. No random stream
    is touched, so masks and weights are those of a run without validation.
    """

    def __init__(self, problem: Problem, label: str, until: int, stopping: EarlyStopping | None = None) -> None:
        self.every = problem.training.eval_steps if label == MAIN else None
        self.until, self.stopping, self.observer = until, stopping, problem.observer
        # The pass is not a training in the progress bar.
        self.problem = replace(problem, observer=Observer()) if self.every else problem

    def is_due(self, state: TrainState) -> bool:
        """Return True if it is time to validate."""
        last = self.stopping is not None and state.step == self.until
        return bool(self.every) and (state.step % (self.every or 1) == 0 or last)

    def evaluate_if_due(self, state: TrainState) -> None:
        """Validate after a step, if it is time to."""
        if not self.is_due(state):
            return
        with fork_rng_of(state.model.parameters()), record_time(self.problem.meter, EVALUATION) as cost:
            scores = self.problem.score_validation(state.model, cost)[0]
        facts = {"step": state.step, "sparsity": sparsity(state.masks) or state.masked, "scores": scores}
        state.notes.setdefault("evaluations", []).append(facts)
        self.observer.evaluation({"label": EVALUATION, **facts})
        if self.stopping is not None:
            self.stopping.take_scores(state, scores)

    def finish_training(self, state: TrainState) -> None:
        """Load the best weights of a training that may stop early."""
        if self.stopping is not None and self.every:
            self.stopping.load_best_(state)
