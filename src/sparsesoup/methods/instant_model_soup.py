"""Instant Model Soup: the dense relative of Instant Soup Pruning."""

from dataclasses import dataclass
from typing import Literal

from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.masking import keep
from sparsesoup.core.ticket import Ticket
from sparsesoup.methods.isp import PROTOCOLS
from sparsesoup.methods.model_soup import scaled
from sparsesoup.methods.scores import magnitude
from sparsesoup.training import weight_averaging as soups
from sparsesoup.training.loop import Protocol, train
from sparsesoup.training.problem import Problem, need_dense, need_fit
from sparsesoup.training.state import TrainState, weights


@dataclass(frozen=True, kw_only=True)
class InstantModelSoup:
    """Short trainings of pruned forks of theta_0, interpolated into it; then a normal fine-tuning. Jaiswal et al. 2023.

    The model is dense. Every fork enters with the share that is best on validation; a share of 0 leaves it out.

    Args:
        weak_models: how many forks.
        look_ahead: steps of each, as a share of T.
        sparsities: one-shot magnitude sparsities of the forks; taken in turn.
        shares: of a fork in the mixture, tried beside 0.
        budget: charged (main and weak steps together are T) or extra (the main run has T, weak steps come on top).
        protocols: how the forks' trainings differ; taken in turn.
    """

    weak_models: int = 4
    look_ahead: float = 0.025
    sparsities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)
    shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    budget: Literal["charged", "extra"] = "charged"
    protocols: tuple[Protocol, ...] = PROTOCOLS

    def __post_init__(self) -> None:
        if self.weak_models < 1 or not 0 < self.look_ahead * self.weak_models < 1 or not self.protocols:
            raise UserError(
                f"instant-model-soup needs weak_models >= 1, weak_models * look_ahead in (0, 1) and at least one "
                f"protocol, got {self.weak_models}, {self.look_ahead:g} and {len(self.protocols)}"
            )
        if not self.sparsities or not all(0 <= s < 1 for s in self.sparsities):
            raise UserError(f"instant-model-soup needs sparsities in [0, 1), at least one, got {self.sparsities}")
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise UserError(f"instant-model-soup needs shares in (0, 1), at least one, got {self.shares}")

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """The fine-tuned soup with all of its weights; the sparsity must be 0."""
        need_dense(sparsity, "instant-model-soup")
        need_fit(
            problem, lambda total: self._main(total) >= 1, f"instant-model-soup with {self.weak_models} weak models"
        )
        state, steps, main = problem.start(), self._weak(problem.steps), self._main(problem.steps)
        problem.journal.piece("origin", state, self._origin, problem, state)
        for number in range(self.weak_models):
            problem.journal.piece(f"fork-{number}", state, self._fork, problem, state, number)
            problem.journal.piece(f"weak-{number}", state, self._look, problem, state, steps, number)
            problem.journal.piece(f"soup-{number}", state, self._mix, problem, state, number)
        problem.journal.piece("begin", state, self._begin, problem, state)
        problem.journal.piece("finish", state, self._finish, problem, state, main)
        share = self.weak_models * steps / problem.steps
        return problem.ticket(state, budget=self.budget, weak_share=share)

    def _weak(self, total: int) -> int:
        return max(1, round(self.look_ahead * total))

    def _main(self, total: int) -> int:
        return total - (self.weak_models * self._weak(total) if self.budget == "charged" else 0)

    def _origin(self, problem: Problem, state: TrainState) -> None:
        state.notes["soup"] = {"score": soups.score(problem, state), "forks": []}
        problem.journal.store("soup-0", weights(state.model))

    def _fork(self, problem: Problem, state: TrainState, number: int) -> None:
        problem.begin_again_(state)
        sparsity = self.sparsities[number % len(self.sparsities)]
        state.prune_(keep(magnitude(state.params()), sparsity))

    def _look(self, problem: Problem, state: TrainState, steps: int, number: int) -> None:
        protocol = self.protocols[number % len(self.protocols)]
        rate = scaled(problem.rate(steps), protocol.factor(problem.seed, "weak", number))
        train(state, problem, steps, stream=("weak", number), rate=rate, label="weak", protocol=protocol)

    def _mix(self, problem: Problem, state: TrainState, number: int) -> None:
        """Stir the fork into the soup with its best share."""
        fork, soup = soups.copied(state.model), problem.journal.fetch(f"soup-{number}")
        found, sparsity = {0.0: float(state.notes["soup"]["score"])}, algebra.sparsity(state.masks)
        for share in self.shares:
            soups.pour_(state.model, soups.interpolate(soup, fork, share))
            found[share] = soups.score(problem, state)
        best = max(found, key=lambda share: found[share])  # the first of equals
        problem.journal.store(f"soup-{number + 1}", soups.interpolate(soup, fork, best))
        state.notes["soup"]["score"] = found[best]
        state.notes["soup"]["forks"].append({"sparsity": sparsity, "share": best, "score": found[best]})

    def _begin(self, problem: Problem, state: TrainState) -> None:
        """The soup at step 0, with a fresh optimizer."""
        problem.begin_again_(state)
        soups.pour_(state.model, problem.journal.fetch(f"soup-{self.weak_models}"))

    def _finish(self, problem: Problem, state: TrainState, main: int) -> None:
        train(state, problem, main, rate=problem.rate(main))
