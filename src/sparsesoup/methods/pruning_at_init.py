"""One-shot pruning of the pre-trained weights by the gradient of the loss: SNIP and GraSP."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from torch import Tensor

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.granularity import Block, Element, Structure
from sparsesoup.core.masking import Scope
from sparsesoup.core.masks import Masks
from sparsesoup.methods.base import Method
from sparsesoup.methods.scores.calibration import calibration_batches
from sparsesoup.methods.scores.gradient import gradient_flow_score, hessian_product, snip_sensitivity, task_gradient
from sparsesoup.training.plan import ActiveRun, Pass, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Snip(Method):
    """Keep the weights to which the loss is most sensitive: |g w| at theta_0. SNIP, Lee et al. 2019.

    Args:
        batches: batches for the average gradient, before the absolute value.
        warmup: share of T for training only the head before the weights are scored.
        structure: structure to prune: weights, rows, columns, heads, units, heads-and-units or features-and-units.
        pattern: tile of weights pruned as one group; 1 x 1 is single weights.
        scope: ranking scope.
    """

    batches: int = 32
    warmup: float = 0.0
    structure: Structure = "weights"
    pattern: Block = Element
    scope: Scope = "global"

    def __post_init__(self) -> None:
        require(self.batches >= 1, "batches", "at least 1", self.batches)
        require(0.0 <= self.warmup < 1.0, "warmup", "a share of T in [0, 1)", self.warmup)

    def doubts(self, problem: Problem, sparsity: float) -> list[str]:
        """Return notes for the user before the first step."""
        return _untrained_head_note("snip", problem, self.warmup)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the scoring and a training with the mask."""
        return prune_then_train(self, size, sparsity, (("gradient", self.batches),), self.warmup)

    def check(self, problem: Problem, sparsity: float) -> None:
        """Raise a UserError also if there is no head to train first."""
        super().check(problem, sparsity)
        _check_head(problem, self.warmup)

    def scores(self, problem: Problem, state: TrainState) -> dict[str, Tensor]:
        """Return the scores of the current weights."""
        slopes = task_gradient(problem, state.model, calibration_batches(problem, self.batches))
        return snip_sensitivity(state.prunable_parameters(), slopes)


@dataclass(frozen=True, kw_only=True)
class Grasp(Method):
    """Keep the weights whose removal would change the gradient norm most: |w (H g)| at theta_0.

    GraSP, Wang et al. 2020, in the form of Lubana & Dick 2021 for trained models. The published form, for untrained
    networks, keeps the sign: `measure="increase", temperature=200`.

    Args:
        measure: preserve (|w (H g)|, preserves the gradient norm) or increase (w (H g), also removes weights that
            lower the norm; on a pre-trained model these are all weights that pull one way, see docs/papers.md).
        batches: batches for the average gradient and Hessian.
        warmup: share of T for training only the head before the weights are scored.
        temperature: divides the logits before the loss, only for the scores; no effect on regression.
        structure: structure to prune: weights, rows, columns, heads, units, heads-and-units or features-and-units.
        pattern: tile of weights pruned as one group; 1 x 1 is single weights.
        scope: ranking scope.
    """

    measure: Literal["preserve", "increase"] = "preserve"
    batches: int = 32
    warmup: float = 0.0
    temperature: float = 1.0
    structure: Structure = "weights"
    pattern: Block = Element
    scope: Scope = "global"

    def __post_init__(self) -> None:
        require(self.batches >= 1, "batches", "at least 1", self.batches)
        require(0.0 <= self.warmup < 1.0, "warmup", "a share of T in [0, 1)", self.warmup)
        require(0.0 < self.temperature < math.inf, "temperature", "above 0", self.temperature)

    def doubts(self, problem: Problem, sparsity: float) -> list[str]:
        """Return notes for the user before the first step."""
        found = _untrained_head_note("grasp", problem, self.warmup)
        if self.measure == "increase":
            found.append(
                "grasp with measure increase removes first what pulls one way: all of it at sparsity 0.5, which is a "
                "long step along one direction, and a pre-trained model seldom survives it; --method.measure preserve "
                "takes the absolute value"
            )
        return found

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the scoring and a training with the mask."""
        scores: tuple[tuple[Pass, int], ...] = (("gradient", self.batches), ("hessian", self.batches))
        return prune_then_train(self, size, sparsity, scores, self.warmup)

    def check(self, problem: Problem, sparsity: float) -> None:
        """Raise a UserError also if there is no head to train first."""
        super().check(problem, sparsity)
        _check_head(problem, self.warmup)

    def scores(self, problem: Problem, state: TrainState) -> dict[str, Tensor]:
        """Return the scores of the current weights."""
        rows = calibration_batches(problem, self.batches)
        slopes = task_gradient(problem, state.model, rows, self.temperature)
        products = hessian_product(problem, state.model, rows, slopes, self.temperature)
        scores = gradient_flow_score(state.prunable_parameters(), products)
        return {name: score.abs() for name, score in scores.items()} if self.measure == "preserve" else scores


class ScoredOnce(Protocol):
    """A method that scores the weights once, before training."""

    def scores(self, problem: Problem, state: TrainState) -> dict[str, Tensor]: ...

    def select_masks(self, state: TrainState, sparsity: float, scores: Mapping[str, Tensor]) -> Masks: ...


def prune_then_train(
    method: ScoredOnce,
    size: RunSize,
    sparsity: float,
    scores: tuple[tuple[Pass, int], ...],
    warmup: float = 0.0,
) -> list[Phase]:
    first = round(warmup * size.steps)
    if warmup:
        size.require_fit(lambda total: 1 <= round(warmup * total) < total, f"a warm-up of the head of {warmup:g} T")
    head = [Phase(name="head", kind="head", steps=first, label="search")] if first else []
    score = Phase(name="score", scores=scores, end=partial(_score_and_prune, method, sparsity))
    return [*head, score, Phase(name="train", steps=size.steps - first)]


def _score_and_prune(method: ScoredOnce, sparsity: float, run: ActiveRun) -> None:
    scores = method.scores(run.problem, run.state)
    run.state.set_masks_(method.select_masks(run.state, sparsity, scores))


def _check_head(problem: Problem, warmup: float) -> None:
    if warmup and not problem.head and not problem.fresh:
        raise UserError(
            "trains the head before the weights are scored, and this model has none that is trained; leave it out",
            "method.warmup",
        )


def _untrained_head_note(name: str, problem: Problem, warmup: float) -> list[str]:
    """Return a note if weights are scored by the gradient of an untrained head."""
    if warmup or not {*problem.head} & {*problem.fresh}:
        return []
    return [
        f"{name} scores by the gradient of the loss, and the head is randomly initialised; --method.warmup 0.1 trains "
        f"the head alone for a tenth of the steps first"
    ]
