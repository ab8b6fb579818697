"""Iterative magnitude pruning: train, prune, go back, again."""

from dataclasses import dataclass
from itertools import count
from typing import Literal

from sparsesoup.errors import UserError
from sparsesoup.problem import Problem, need_steps
from sparsesoup.schedules import geometric
from sparsesoup.scores import magnitude
from sparsesoup.select import Competition, keep
from sparsesoup.state import Snapshot, TrainState
from sparsesoup.ticket import Ticket
from sparsesoup.train import train


@dataclass(frozen=True, kw_only=True)
class Iterative:
    """Rounds of training T steps and pruning by |w|, each going back to where it began.

    Frankle & Carbin 2019; on BERT, Chen et al. 2020; rewinding, Frankle et al. 2020; learning-rate rewinding, Renda
    et al. 2020. All parameters go back, the head included, with optimizer, schedule and order of rows.

    Args:
        cut: share of the remaining weights that a round removes; the last round goes to the sparsity asked for.
        rewind: share of T after the pre-trained checkpoint to which a round goes back; 0 is the checkpoint itself.
        back: what goes back: the weights, or only the learning rate (the weights stay as trained).
        scope: who competes with whom.
    """

    cut: float = 0.2
    rewind: float = 0.0
    back: Literal["weights", "rate"] = "weights"
    scope: Competition = "global"

    def __post_init__(self) -> None:
        if not 0.0 < self.cut < 1.0 or not 0.0 <= self.rewind < 1.0:
            raise UserError(f"imp needs cut in (0, 1) and rewind in [0, 1), got {self.cut} and {self.rewind}")

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """The ticket of the last round, trained: (rounds + 1) T steps in all."""
        first = round(self.rewind * problem.steps)
        least = next(steps for steps in count(1) if round(self.rewind * steps) < steps)
        need_steps(problem, least, "imp with this rewinding point")
        state, rest = problem.start(), problem.steps - first
        if first:
            problem.journal.piece("origin", state, train, state, problem, first, hold=True)
        origin, goals = state.snapshot(), geometric(self.cut, sparsity)
        for number, goal in enumerate(goals):
            problem.journal.piece(f"round-{number}", state, self._round, problem, state, origin, rest, goal, number)
        problem.journal.piece("train", state, self._train, problem, state, rest, len(goals), "strong")
        return problem.ticket(state, rounds=len(goals))

    def _round(
        self, problem: Problem, state: TrainState, origin: Snapshot, rest: int, goal: float, number: int
    ) -> None:
        self._train(problem, state, rest, number, "search")
        masks = keep(magnitude(state.params()), goal, scope=self.scope, within=state.masks)
        if self.back == "weights":
            state.restore_(origin)
        else:
            state.forget_()
            state.step = int(origin.facts["step"])
        state.prune_(masks)

    def _train(self, problem: Problem, state: TrainState, rest: int, number: int, label: str) -> None:
        # Weights that stay must not see the same rows in the same order in every round.
        stream = ("round", number) if self.back == "rate" else ()
        train(state, problem, rest, stream=stream, label=label)
