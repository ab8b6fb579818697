"""Model soups: averaged weights of several fine-tunings of one model."""

from dataclasses import dataclass
from typing import Literal

from sparsesoup.core.errors import require
from sparsesoup.core.schedules import ScaledRate
from sparsesoup.methods.base import Method, require_dense
from sparsesoup.training import weight_averaging as soups
from sparsesoup.training.config import TrainingOverrides
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.problem import Problem
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import TrainState

PROTOCOLS = (
    TrainingOverrides(),
    TrainingOverrides(rate=0.5, weight_decay=0.1),
    TrainingOverrides(rate=2.0, weight_decay=0.0),
    TrainingOverrides(rate=1.0, dropout=0.2),
)


@dataclass(frozen=True, kw_only=True)
class ModelSoup(Method):
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
        require(self.members >= 1, "members", "at least 1", self.members)
        require(bool(self.protocols), "protocols", "one or more", self.protocols)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the members, and their average: members * T steps; the sparsity must be 0."""
        require_dense("model-soup", sparsity)
        size.require_steps(1, "a run")
        phases = list[Phase]()
        for number in range(self.members):
            protocol = self.protocols[number % len(self.protocols)]
            rate = ScaledRate(size.rate_schedule(), protocol.rate_factor(size.seed, "member", number))
            phases += [
                Phase(name=f"begin-{number}", end=_begin_member, rewinds_to=0),
                Phase(
                    name=f"member-{number}", steps=size.steps, stream=("member", number), rate=rate,
                    overrides=protocol, store=f"member-{number}", end=self._score_member, validations=1,
                ),
            ]  # fmt: skip
        tries = self.members - 1 if self.combine == "greedy" else 0
        return [*phases, Phase(name="soup", end=self._average_members, validations=tries, copies=2)]

    def _score_member(self, run: ActiveRun) -> None:
        notes = run.state.notes.setdefault("soup", {"members": [], "taken": []})
        notes["members"].append(soups.validation_score(run.problem, run.state))

    def _average_members(self, run: ActiveRun) -> None:
        problem, state = run.problem, run.state
        found = state.notes["soup"]
        if self.combine == "uniform":
            found["taken"] = [*range(self.members)]
            members = (problem.checkpointer.get_artifact(f"member-{number}") for number in found["taken"])
            soups.load_weights_(state.model, soups.average_weights(members))
        else:
            self._greedy_soup(problem, state, found["members"], found["taken"])

    def _greedy_soup(self, problem: Problem, state: TrainState, scores: list[float], taken: list[int]) -> None:
        best, *others = sorted(range(self.members), key=lambda number: -scores[number])
        soup, now = problem.checkpointer.get_artifact(f"member-{best}"), scores[best]
        taken.append(best)
        for number in others:
            share = 1 / (len(taken) + 1)
            member = problem.checkpointer.get_artifact(f"member-{number}")
            soups.load_weights_(state.model, soups.interpolate_weights(soup, member, share))
            if (found := soups.validation_score(problem, state)) >= now:
                soup, now = soups.clone_weights(state.model), found
                taken.append(number)
        soups.load_weights_(state.model, soup)


def _begin_member(run: ActiveRun) -> None:
    run.problem.reset_to_pretrained_(run.state)
