"""Lead masks that a penalty closes to the sparsity that is wanted at each step."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsesoup.gates.base import gates
from sparsesoup.gates.density import firsts, masked_share, worths
from sparsesoup.gates.straight import Gate
from sparsesoup.schedules import Cubic
from sparsesoup.state import TrainState

# Chosen by trial on simulated scores under Adam; tests/test_lead.py holds what they reach.
WITHIN = 15.0  # steps in which the distance is to be covered
STRONGEST = 5.0  # pull, in units of the task's own
SAMPLE = 1 << 11  # scores of a tie that are looked at
MEMORY = 0.9  # of the running mean of the task's pull


@dataclass(frozen=True, kw_only=True)
class Lead:
    """Sets threshold and penalty after each step; as a hook, as the penalty, and as the observer of gradients.

    The penalty is weight * mean over families of family weight * mean over its ties of mean sigmoid(score - shift)
    (Sanh et al. 2020, sec. 4; Lagunas et al. 2021); led by the density, all ties have one mean, by their number of
    scores.
    Its weight is the one given, on the curve of the threshold; or else it is in proportion to how far the scores have
    to fall as a whole for the wanted share to lie below the threshold, in units of the task's own pull on them: so
    neither the size of gradients nor T matters, and nothing winds up while scores are still on their way. Where too
    much is masked the weight is negative, and scores are pushed up again.

    Args:
        plan: the sparsity wanted at each step.
        sparsity: at the end of the plan.
        rate: step -> learning rate of the scores.
        areas: weights in a group of each tie.
        weights: family weight of each tie.
        families: the family of each tie; empty: all are of one.
        penalty: weight of the penalty at the end of the plan; None: led by the density.
        threshold: of sigmoid(score) at the end of the plan; None: the gates have their own.
        shift: a gate is penalised for sigmoid(score - shift).
        floor: share of the groups of every tie that stay open whatever the threshold; 0: none has to.
    """

    plan: Cubic
    sparsity: float
    rate: Callable[[int], float]
    areas: list[int]
    weights: list[float]
    families: tuple[str, ...] = ()
    penalty: float | None = None
    threshold: float | None = None
    shift: float = 0.0
    floor: float = 0.0

    def __call__(self, state: TrainState) -> None:
        """After a step: set the threshold, look at the masks, set the weight of the penalty for the next step."""
        if self.threshold is not None:
            bound = torch.logit(torch.tensor(self.plan.at(state.step, self.threshold)))
            for _, gate in gates(state.model):
                gate.level.copy_(gate.floored(bound, self.floor) if self.floor else bound)
        state.masked = masked_share(state, self.areas)
        if self.penalty is not None:
            weight = self.penalty * self.plan.at(state.step, 0.5) / 0.5
        else:
            weight = self._pull(state) * _number(state, "pull") * 4.0 * self._scores(state)
        state.memory["lead/weight"] = torch.tensor(weight, dtype=torch.float64)

    def _pull(self, state: TrainState) -> float:
        """How strongly the scores are to be pulled down, in units of the task's pull."""
        goal = self.plan.at(state.step, self.sparsity)
        step = self.rate(state.step)
        if not goal or not step:
            return 0.0
        pull = self._distance(state, goal) / (WITHIN * step)
        return min(max(pull, -STRONGEST), STRONGEST)

    def _distance(self, state: TrainState, goal: float) -> float:
        """How far the scores have to fall for a share `goal` of the weights to lie below the threshold; on a sample."""
        parts, shares = [], []
        for tie, score in worths(state).items():
            some = score.flatten()[:: max(1, score.numel() // SAMPLE)]
            parts.append(some)
            shares.append(torch.full_like(some, score.numel() / len(some) * self.areas[tie]))
        order = torch.cat(parts).sort()
        below = torch.cat(shares)[order.indices].cumsum(0)
        place = int((below < goal * below[-1]).sum())
        level = max(gate.level for gate in self._first(state))  # a floor lowers that of some
        return float(order.values[min(place, len(order.values) - 1)] - level)

    def term(self, state: TrainState) -> Tensor:
        """The penalty, for the loss: of the gates that the pass went through, since it may leave a block out."""
        total = torch.zeros(())
        for gate, family in zip(self._first(state), self._families(state), strict=True):
            if gate.share is not None:
                total = total + gate.share * family
                gate.share = None  # it holds the graph
        return _number(state, "weight") * total

    def observe(self, state: TrainState) -> None:
        """Remember how strongly the task pulls at the scores: the root mean square of its gradient, on a sample."""
        weight, parts = _number(state, "weight"), []
        for gate, family in zip(self._first(state), self._families(state), strict=True):
            score = gate.score
            assert score is not None
            if score.grad is None:  # its block was left out of this step
                continue
            stride = max(1, score.numel() // 4096)
            open_ = (score.detach().flatten()[::stride] - self.shift).sigmoid()
            own = weight * family / score.numel() * open_ * (1 - open_)
            parts.append(score.grad.flatten()[::stride] - own)
        if not parts:
            return
        now = float(torch.cat(parts).square().mean().sqrt())
        known = "lead/pull" in state.memory
        mean = MEMORY * _number(state, "pull") + (1 - MEMORY) * now if known else now
        state.memory["lead/pull"] = torch.tensor(mean, dtype=torch.float64)

    def _first(self, state: TrainState) -> list[Gate]:
        found = firsts(state.model)
        return [found[tie][1] for tie in range(len(self.weights))]

    def _families(self, state: TrainState) -> list[float]:
        """What each tie's mean counts: as published where the weight is given; else by its number of scores.

        With equal means a score of a small tie is pulled harder: a head thirty times as hard as a unit.
        """
        if self.penalty is not None:
            names = self.families or ("",) * len(self.weights)
            ties = Counter(names)
            return [weight / (ties[name] * len(ties)) for name, weight in zip(names, self.weights, strict=True)]
        total = self._scores(state)
        counts = [gate.score.numel() for gate in self._first(state) if gate.score is not None]
        return [weight * count / total for weight, count in zip(self.weights, counts, strict=True)]

    def _scores(self, state: TrainState) -> float:
        """Scores of all ties: a penalty of this times g / sigmoid' pulls a score of mean size with g."""
        return float(sum(gate.score.numel() for gate in self._first(state) if gate.score is not None))


def _number(state: TrainState, name: str) -> float:
    found = state.memory.get(f"lead/{name}")
    return 0.0 if found is None else float(found)
