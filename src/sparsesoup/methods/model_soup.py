"""Model soups: several fine-tunings of one model, their weights averaged."""

from dataclasses import dataclass
from typing import Literal

from sparsesoup.core.errors import UserError
from sparsesoup.core.ticket import Ticket
from sparsesoup.training import weight_averaging as soups
from sparsesoup.training.loop import Protocol, Rate, train
from sparsesoup.training.problem import Problem, need_dense, need_steps
from sparsesoup.training.state import TrainState, weights

PROTOCOLS = (
    Protocol(),
    Protocol(rate=0.5, weight_decay=0.1),
    Protocol(rate=2.0, weight_decay=0.0),
    Protocol(rate=1.0, dropout=0.2),
)


@dataclass(frozen=True, kw_only=True)
class ModelSoup:
    """Fine-tunings that differ in protocol and order of rows, averaged. Wortsman et al. 2022, sec. 2.

    Their product is dense.

    Args:
        members: fine-tunings, of T steps each.
        combine: greedy (the best on validation, then each next that does not lower it) or uniform (all of them).
        protocols: how the members differ; taken in turn.
    """

    members: int = 3
    combine: Literal["greedy", "uniform"] = "greedy"
    protocols: tuple[Protocol, ...] = PROTOCOLS

    def __post_init__(self) -> None:
        if self.members < 1 or not self.protocols:
            raise UserError(f"model-soup needs members >= 1 and at least one protocol, got {self.members}")

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """The soup with all of its weights after members * T steps; the sparsity must be 0."""
        need_dense(sparsity, "model-soup")
        need_steps(problem, 1, "a run")
        state = problem.start()
        for number in range(self.members):
            problem.journal.piece(f"begin-{number}", state, problem.begin_again_, state)
            problem.journal.piece(f"member-{number}", state, self._member, problem, state, number)
        problem.journal.piece("soup", state, self._soup, problem, state)
        return problem.ticket(state)

    def _member(self, problem: Problem, state: TrainState, number: int) -> None:
        protocol = self.protocols[number % len(self.protocols)]
        rate = scaled(problem.rate(), protocol.factor(problem.seed, "member", number))
        train(state, problem, problem.steps, stream=("member", number), rate=rate, protocol=protocol)
        problem.journal.store(f"member-{number}", weights(state.model))
        state.notes.setdefault("soup", {"members": [], "taken": []})["members"].append(soups.score(problem, state))

    def _soup(self, problem: Problem, state: TrainState) -> None:
        found = state.notes["soup"]
        if self.combine == "uniform":
            found["taken"] = [*range(self.members)]
            members = (problem.journal.fetch(f"member-{number}") for number in found["taken"])
            soups.pour_(state.model, soups.average(members))
        else:
            self._greedy(problem, state, found["members"], found["taken"])

    def _greedy(self, problem: Problem, state: TrainState, scores: list[float], taken: list[int]) -> None:
        best, *others = sorted(range(self.members), key=lambda number: -scores[number])
        soup, now = problem.journal.fetch(f"member-{best}"), scores[best]
        taken.append(best)
        for number in others:
            share = 1 / (len(taken) + 1)
            soups.pour_(state.model, soups.interpolate(soup, problem.journal.fetch(f"member-{number}"), share))
            if (found := soups.score(problem, state)) >= now:
                soup, now = soups.copied(state.model), found
                taken.append(number)
        soups.pour_(state.model, soup)


def scaled(rate: Rate, factor: float) -> Rate:
    """The learning rate times a factor."""
    return lambda step: factor * rate(step)
