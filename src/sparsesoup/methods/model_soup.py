"""Model soups: averaged weights of several fine-tunings of one model."""

from dataclasses import dataclass
from typing import Literal

from sparsesoup.core.errors import UserError
from sparsesoup.core.ticket import Ticket
from sparsesoup.training import weight_averaging as soups
from sparsesoup.training.loop import Rate, TrainingOverrides, train
from sparsesoup.training.problem import Problem, need_dense, require_steps
from sparsesoup.training.state import TrainState, named_weights

PROTOCOLS = (
    TrainingOverrides(),
    TrainingOverrides(rate=0.5, weight_decay=0.1),
    TrainingOverrides(rate=2.0, weight_decay=0.0),
    TrainingOverrides(rate=1.0, dropout=0.2),
)


@dataclass(frozen=True, kw_only=True)
class ModelSoup:
    """Average fine-tunings that differ in training settings and order of rows. Wortsman et al. 2022, sec. 2.

    The result is dense.

    Args:
        members: number of fine-tunings, of T steps each.
        combine: greedy (the best on validation, then each next one that does not lower it) or uniform (all).
        protocols: training settings of the members; used in turn.
    """

    members: int = 3
    combine: Literal["greedy", "uniform"] = "greedy"
    protocols: tuple[TrainingOverrides, ...] = PROTOCOLS

    def __post_init__(self) -> None:
        if self.members < 1 or not self.protocols:
            raise UserError(f"model-soup needs members >= 1 and at least one protocol, got {self.members}")

    def run(self, problem: Problem, sparsity: float) -> Ticket:
        """Return the soup with all of its weights after members * T steps; the sparsity must be 0."""
        need_dense(sparsity, "model-soup")
        require_steps(problem, 1, "a run")
        state = problem.start_run()
        for number in range(self.members):
            problem.journal.run_stage(f"begin-{number}", state, problem.reset_to_pretrained_, state)
            problem.journal.run_stage(f"member-{number}", state, self._train_member, problem, state, number)
        problem.journal.run_stage("soup", state, self._average_members, problem, state)
        return problem.finish_run(state)

    def _train_member(self, problem: Problem, state: TrainState, number: int) -> None:
        protocol = self.protocols[number % len(self.protocols)]
        rate = scaled_rate(problem.rate_schedule(), protocol.rate_factor(problem.seed, "member", number))
        train(state, problem, problem.steps, stream=("member", number), rate=rate, protocol=protocol)
        problem.journal.put_artifact(f"member-{number}", named_weights(state.model))
        state.notes.setdefault("soup", {"members": [], "taken": []})["members"].append(
            soups.validation_score(problem, state)
        )

    def _average_members(self, problem: Problem, state: TrainState) -> None:
        found = state.notes["soup"]
        if self.combine == "uniform":
            found["taken"] = [*range(self.members)]
            members = (problem.journal.get_artifact(f"member-{number}") for number in found["taken"])
            soups.load_weights_(state.model, soups.average_weights(members))
        else:
            self._greedy_soup(problem, state, found["members"], found["taken"])

    def _greedy_soup(self, problem: Problem, state: TrainState, scores: list[float], taken: list[int]) -> None:
        best, *others = sorted(range(self.members), key=lambda number: -scores[number])
        soup, now = problem.journal.get_artifact(f"member-{best}"), scores[best]
        taken.append(best)
        for number in others:
            share = 1 / (len(taken) + 1)
            soups.load_weights_(
                state.model, soups.interpolate_weights(soup, problem.journal.get_artifact(f"member-{number}"), share)
            )
            if (found := soups.validation_score(problem, state)) >= now:
                soup, now = soups.clone_weights(state.model), found
                taken.append(number)
        soups.load_weights_(state.model, soup)


def scaled_rate(rate: Rate, factor: float) -> Rate:
    """Return the learning rate schedule times a factor."""
    return lambda step: factor * rate(step)
