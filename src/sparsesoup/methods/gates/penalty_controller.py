"""Penalty controller: adapt the penalty on learned masks to follow a sparsity schedule."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.core.schedules import CubicSchedule
from sparsesoup.methods.gates.attach import gates_of
from sparsesoup.methods.gates.density import first_gate_per_group, group_scores, masked_share
from sparsesoup.methods.gates.score_groups import shares_of
from sparsesoup.methods.gates.score_samples import median_score, sample_flat, sample_scores, weighted_quantiles
from sparsesoup.methods.gates.straight_through import StraightThroughGate
from sparsesoup.training.state import TrainState

# Tuned under Adam, with constant, falling and growing gradients; tests/methods/test_lead.py checks the results.
WITHIN = 12.0  # steps in which to close the distance
STRONGEST = 10.0  # largest pull, in learning rates per step
MOMENTUM = 0.9  # of the scores' response to the penalty (Adam's first moment), and of the mean drift
FLATTEST = 0.02  # smallest slope of the sigmoid to divide by
SAMPLE = 1 << 11  # scores sampled per coupled groups


@dataclass(frozen=True, kw_only=True)
class SparsityController:
    """Set threshold and penalty after each step; both a hook and the penalty.

    The penalty is weight * mean over families of family weight * mean over the family's coupled groups of mean
    sigmoid(score - shift) (Sanh et al. 2020, sec. 4; Lagunas et al. 2021); when the weight is controlled, all scores
    have one mean.
    The weight is either fixed, on the curve of the threshold, or controlled: it moves the marginal score, below which
    the target share of the weights lies, to the threshold. It is expressed in units of the gradient that moves a score
    by its learning rate. That unit comes from the optimizer's memory, not from the task's present gradient: Adam
    divides by a mean over 1,000 steps, and where the gradient shrinks as the task is learned, a penalty of its size
    would move nothing. Any other movement of the scores (the task's drift, or a penalty that moves less than
    predicted) is measured at each step and compensated. If too much is masked the weight is negative. After the end of
    the schedule the threshold moves to the marginal score, so that the remaining groups are closed or opened before
    the masks are fixed, and the model is trained with them.

    Args:
        plan: sparsity schedule.
        end: the last step, after which the masks are fixed.
        sparsity: sparsity at the end of the schedule.
        rate: step -> learning rate of the scores.
        areas: weights per group, for each of the coupled groups.
        weights: family weight of each.
        families: family of each; empty: all are of one family.
        penalty: weight of the penalty at the end of the schedule; None: controlled.
        threshold: of sigmoid(score) at the end of the schedule; None: the gates have their own.
        shift: the penalty acts on sigmoid(score - shift).
        floor: share of the groups of every matrix that stays open whatever the threshold; 0: none.
    """

    plan: CubicSchedule
    end: int
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
        """After a step: set the threshold, measure the masks, set the penalty weight for the next step."""
        if self.threshold is not None:
            bound = torch.tensor(self._threshold_logit(state, self.threshold))
            for _, gate in gates_of(state.model):
                gate.level.copy_(gate.floored_threshold(bound, self.floor) if self.floor else bound)
        state.masked = masked_share(state, self.areas)
        given = self.penalty
        _store_numbers(
            state,
            weight=self._penalty_strength(state)
            if given is None
            else given * self.plan.sparsity_at(state.step, 0.5) / 0.5,
        )

    def _threshold_logit(self, state: TrainState, threshold: float) -> float:
        """Return the score at which gates open: on the threshold curve, and at the target sparsity in the end."""
        bound = float(torch.logit(torch.tensor(self.plan.sparsity_at(state.step, threshold))))
        if self.penalty is not None or state.step <= self.plan.stop:
            return bound
        share = min((state.step - self.plan.stop) / max(self.end - self.plan.stop, 1), 1.0)
        (marginal,) = self._marginal_scores(state, state.step)
        return bound + share * (marginal - bound)

    def _penalty_strength(self, state: TrainState) -> float:
        """Return the penalty weight that brings the marginal score to the threshold within `WITHIN` steps."""
        step = self.rate(state.step)
        if not self.plan.sparsity_at(state.step, self.sparsity) or not step:
            return 0.0
        score, before = self._marginal_scores(state, state.step, state.step - 1)
        # In learning rates per step: the fall explained by past penalties, and the drift against it.
        fall = MOMENTUM * _load_number(state, "fall") + (1 - MOMENTUM) * _load_number(state, "pull")
        lift = _load_number(state, "lift")
        if "lead/marginal" in state.memory:
            fell = (_load_number(state, "marginal") - before) / step
            lift = _clamp_strength(MOMENTUM * lift + (1 - MOMENTUM) * (fall - fell))
        coming = (fall - lift) * step * MOMENTUM / (1 - MOMENTUM)  # the fall still to come from momentum
        level = float(torch.stack([gate.level for gate in self._first_gates(state)]).max())  # a floor lowers some
        pull = _clamp_strength((score - level - coming) / (self._control_horizon() * step) + lift)
        _store_numbers(state, marginal=score, fall=fall, lift=lift, pull=pull)
        open_ = 1 / (1 + math.exp(self.shift - score))
        return pull * self._typical_gradient(state) / max(open_ * (1 - open_), FLATTEST) * self._count_scores(state)

    def _control_horizon(self) -> float:
        return min(WITHIN, self.plan.stop / 4)

    def _marginal_scores(self, state: TrainState, *steps: int) -> list[float]:
        """Return the score below which the target share of the weights lies, at each of these steps; on a sample."""
        scores = group_scores(state)
        flat, lengths = sample_scores(scores.values(), SAMPLE)
        weights = [s.numel() / n * self.areas[group] for (group, s), n in zip(scores.items(), lengths, strict=True)]
        return weighted_quantiles(flat, weights, lengths, [self.plan.sparsity_at(s, self.sparsity) for s in steps])

    def _typical_gradient(self, state: TrainState) -> float:
        """Return the constant gradient that moves a score by its learning rate per step: the median on a sample."""
        scores = [gate.score for gate in self._first_gates(state) if gate.score is not None]
        return median_score(typical_gradient(state.optimizer, scores, SAMPLE))

    def penalty_term(self, state: TrainState) -> Tensor:
        """Return the penalty term of the loss, for the gates used in this pass, since a pass may skip a block."""
        used = [
            pair for pair in zip(self._first_gates(state), self._penalty_weights(state), strict=True) if pair[0].opened
        ]
        if not used:
            return torch.zeros(())
        shares: list[Tensor] = []
        for _, run in groupby((gate for gate, _ in used), key=lambda gate: id(gate.opened)):
            gates = list(run)
            shares.append(shares_of(gates))
            for gate in gates:
                gate.opened = None  # it holds the graph
        joined = torch.cat(shares)
        families = torch.tensor([family for _, family in used], device=joined.device)
        return _load_number(state, "weight") * (joined * families).sum()

    def _first_gates(self, state: TrainState) -> list[StraightThroughGate]:
        found = first_gate_per_group(state.model)
        return [found[coupled][1] for coupled in range(len(self.weights))]

    def _penalty_weights(self, state: TrainState) -> list[float]:
        """Return the weight of each mean: as published with a fixed penalty, else by the number of scores.

        With equal weights a score in a small matrix is pulled harder: a head thirty times as hard as a unit.
        """
        if self.penalty is not None:
            names = self.families or ("",) * len(self.weights)
            groups = Counter(names)
            return [weight / (groups[name] * len(groups)) for name, weight in zip(names, self.weights, strict=True)]
        total = self._count_scores(state)
        counts = [gate.score.numel() for gate in self._first_gates(state) if gate.score is not None]
        return [weight * count / total for weight, count in zip(self.weights, counts, strict=True)]

    def _count_scores(self, state: TrainState) -> float:
        """Return the number of scores: a penalty of this times g / sigmoid' pulls an average score with gradient g."""
        return float(sum(gate.score.numel() for gate in self._first_gates(state) if gate.score is not None))


def _clamp_strength(pull: float) -> float:
    return min(max(pull, -STRONGEST), STRONGEST)


def _store_numbers(state: TrainState, **numbers: float) -> None:
    for name, number in numbers.items():
        state.memory[f"lead/{name}"] = torch.tensor(number, dtype=torch.float64)


def _load_number(state: TrainState, name: str) -> float:
    found = state.memory.get(f"lead/{name}")
    return 0.0 if found is None else float(found)


def typical_gradient(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], most: int = 1 << 62) -> Tensor:
    """Return the constant gradient that would move each entry of these parameters by the learning rate per step.

    Adam and RMSprop divide by the root of a running mean square, SGD by nothing; momentum multiplies. At most twice
    `most` entries of each parameter are sampled.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    if isinstance(optimizer, torch.optim.RAdam):
        raise UserError(
            "radam shortens its first steps, which this method's penalty does not reckon with; use adamw",
            "train.optimizer",
        )
    alike: dict[tuple[float, ...], list[Tensor]] = {}  # (factor, divisor of the mean square, eps) -> mean squares
    plain: list[Tensor] = []
    for parameter, steps in zip(parameters, _steps_taken(optimizer, parameters), strict=True):
        own, group = optimizer.state.get(parameter, {}), groups[id(parameter)]
        factor = 1.0 - group.get("momentum", 0.0)
        square = own.get("exp_avg_sq", own.get("square_avg"))
        if square is not None:
            divisor = 1.0 - group["betas"][1] ** steps if "exp_avg_sq" in own else 1.0
            alike.setdefault((factor, divisor, group["eps"]), []).append(sample_flat(square, most))
        elif own and "eps" in group:
            raise UserError(
                "this method's penalty needs a mean square for each score, which this optimizer has not; use adamw",
                "train.optimizer",
            )
        else:
            plain.append(torch.full_like(sample_flat(parameter.detach(), most), factor if "eps" not in group else 0.0))
    adaptive = [
        torch.cat(squares).div_(divisor).sqrt_().add_(eps).mul_(factor)
        for (factor, divisor, eps), squares in alike.items()
    ]
    return torch.cat([*adaptive, *plain])


def _steps_taken(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[float]:
    """Return the optimizer's count of steps for each parameter; those on a GPU are read back at once."""
    steps = [optimizer.state.get(p, {}).get("step", 0) for p in parameters]
    read = iter(torch.stack(tensors).tolist() if (tensors := [s for s in steps if isinstance(s, Tensor)]) else ())
    return [float(next(read) if isinstance(step, Tensor) else step) for step in steps]
