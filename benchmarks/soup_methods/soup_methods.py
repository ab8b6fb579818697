"""Soups that could add to gradual-obs, and their controls, as methods of another package.

    pip install -e benchmarks/soup_methods

Every method has T steps in all, those of its forks included, and so the FLOPs of gradual-obs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sparsesoup import MethodInfo, Phase
from sparsesoup.core.errors import require
from sparsesoup.core.masks import apply_masks_
from sparsesoup.core.rng import cpu_generator
from sparsesoup.core.schedules import ConstantRate, CubicSchedule, ScaledRate
from sparsesoup.methods.gradual_obs import GradualOBS
from sparsesoup.methods.scores.calibration import calibration_batches, for_each_batch
from sparsesoup.methods.scores.fisher import FisherAverage
from sparsesoup.training.config import TrainingOverrides
from sparsesoup.training.plan import ActiveRun, LoopHooks
from sparsesoup.training.size import RunSize
from sparsesoup.training.state import TrainState, named_weights

Scores = dict[str, Tensor]
Soup = Literal["scores", "shuffled", "votes", "weights", "forecast", "taste"]
EXPONENTS = (0.0, 0.5, 1.0, 2.0)  # of F in w^2 F^p, one for each fork of the taste
TASTED = 4  # batches of the loss after a taste


@dataclass(frozen=True, kw_only=True)
class ForkedOBS(GradualOBS):
    """gradual-obs whose masks are chosen after a few forked steps before each pruning.

    Args:
        soup: what the forks add. scores: the mean of w^2 F over the run and its forks; shuffled: the same with the
            forks' scores in random order within each matrix (control); votes: most masks of forks, then the run's own
            score; weights: scores, and the forks' mean weights in the run's place; forecast: w is where the forks say
            that it goes, with their spread; taste: the exponent p of w^2 F^p with the lowest loss after pruning and a
            few steps.
        forks: copies of the run before each pruning.
        look_ahead: steps of each, as a share of T.
        rates: factors on the learning rate; used in turn.
        horizon: how many times a look-ahead the forecast reaches.
    """

    soup: Soup = "scores"
    forks: int = 2
    look_ahead: float = 0.0134
    rates: tuple[float, ...] = (0.5, 1.5)
    horizon: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.forks >= 1, "forks", "at least 1", self.forks)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the plan of gradual-obs at fewer steps, with forks before each pruning."""
        steps = max(1, round(self.look_ahead * size.steps))
        main = size.steps - self.prunings * self.forks * steps
        size.require_fit(lambda total: main >= self.prunings + 2, "a soup")
        rate, done, phases = size.rate_schedule(main), 0, list[Phase]()
        for i, phase in enumerate(super().plan(replace(size, steps=main), sparsity), start=1):
            done += phase.steps
            if phase.end is None:
                return [*phases, replace(phase, rate=rate)]
            goal = CubicSchedule(0, self.prunings).sparsity_at(i, sparsity)
            trained = replace(phase, end=None, end_flops=None, scores=(), rate=rate)
            forks = self._forks(phase, i, goal, steps, rate(done))
            phases += [trained, *forks, replace(phase, name=f"prune-{i}", steps=0, loop=None, overrides=None)]
        raise AssertionError("gradual-obs ends with a training")

    def _forks(self, phase: Phase, i: int, goal: float, steps: int, rate: float) -> Iterator[Phase]:
        fisher = FisherAverage(decay=1 - 1 / steps)
        for j in range(self.forks):
            loop = partial(self._taste_masks, j, goal) if self.soup == "taste" else partial(_observe, fisher)
            yield Phase(
                name=f"soup-{i}-{j}", kind="fork", steps=steps, label="weak", stream=("weak", i, j),
                rate=ConstantRate(self.rates[j % len(self.rates)] * rate), overrides=phase.overrides, loop=loop,
                scores=(("forward", TASTED),) if self.soup == "taste" else (), end=partial(self._result, i, j, goal),
                copies=3,
            )  # fmt: skip

    def _taste_masks(self, j: int, goal: float, run: ActiveRun) -> LoopHooks:
        """Prune the copy by w^2 v^p, with Adam's mean square v as F, which a copy has."""
        state, p = run.state, EXPONENTS[j % len(EXPONENTS)]
        scores = {
            name: w.detach().square() * state.optimizer.state[w]["exp_avg_sq"].pow(p)
            for name, w in state.prunable_parameters().items()
        }
        apply_masks_(state.prunable_parameters(), self.select_masks(state, goal, scores))
        return LoopHooks()

    def _result(self, i: int, j: int, goal: float, run: ActiveRun) -> Scores:
        state, problem = run.state, run.problem
        if self.soup == "taste":
            return {f"soup/loss-{j}": _mean_loss(run, i)}
        weights = {name: w.detach().float() for name, w in state.prunable_parameters().items()}
        if self.soup == "forecast":
            found = {f"soup/mean/{n}": w.clone() for n, w in weights.items()}
            return found | {f"soup/square/{n}": w.square() for n, w in weights.items()}
        scores = _normalised(FisherAverage(decay=0.0).scores(state))
        if self.soup == "votes":
            masks = self.select_masks(state, goal, scores)
            return {f"soup/score/{n}": mask.float() for n, mask in masks.items()}
        if self.soup == "shuffled":
            draw = cpu_generator(problem.seed, "shuffle", i, j)
            scores = {n: s.flatten()[torch.randperm(s.numel(), generator=draw)].view_as(s) for n, s in scores.items()}
        found = {f"soup/score/{n}": s for n, s in scores.items()}
        if self.soup == "weights":
            found |= {f"soup/weight/{n}": t.detach().clone() for n, t in _floats(state).items()}
        return found

    def _prune(self, number: int, sparsity: float, fisher: FisherAverage, run: ActiveRun) -> None:
        state = run.state
        scores = self._merged(state, fisher)
        if self.soup == "weights":
            with torch.no_grad():
                for name, t in _floats(state).items():
                    t.copy_(state.memory[f"soup/weight/{name}"] / self.forks)
        state.memory = {key: t for key, t in state.memory.items() if not key.startswith("soup/")}
        super()._prune(number, sparsity, GivenScores(fisher, scores), run)

    def _merged(self, state: TrainState, fisher: FisherAverage) -> Scores:
        """Return the scores of the run and its forks together."""
        memory, params = state.memory, state.prunable_parameters()
        own = _normalised(fisher.scores(state))
        if self.soup == "votes":
            top = max(float(s.max()) for s in own.values())
            return {n: memory[f"soup/score/{n}"].double() + s.double() / (2 * top) for n, s in own.items()}
        if self.soup == "taste":
            losses = [float(memory[f"soup/loss-{j}"]) for j in range(self.forks)]
            best = EXPONENTS[losses.index(min(losses)) % len(EXPONENTS)]
            state.notes.setdefault("exponents", []).append(best)
            return {n: w.detach().square() * memory[f"fisher/{n}"].pow(best) for n, w in params.items()}
        if self.soup == "forecast":
            return {n: memory[f"fisher/{n}"] * self._forecast(w.detach(), memory, n) for n, w in params.items()}
        return {n: s + memory[f"soup/score/{n}"] for n, s in own.items()}

    def _forecast(self, weight: Tensor, memory: Mapping[str, Tensor], name: str) -> Tensor:
        """Return the expected w^2, a horizon ahead."""
        mean, square = memory[f"soup/mean/{name}"] / self.forks, memory[f"soup/square/{name}"] / self.forks
        spread = (square - mean.square()).clamp_min(0.0)
        return (weight + self.horizon * (mean - weight)).square() + self.horizon**2 * spread


@dataclass(frozen=True, kw_only=True)
class SerialSoup(GradualOBS):
    """gradual-obs whose parts between prunings differ in learning rate and dropout: a soup without extra steps.

    Args:
        rates: factors on the learning rate of the parts before the last pruning; used in turn.
        drops: dropout of these parts; used in turn.
    """

    rates: tuple[float, ...] = (1.0,)
    drops: tuple[float, ...] = (0.0,)

    def plan(self, size: RunSize, sparsity: float) -> list[Phase]:
        """Return the plan of gradual-obs with the changed parts."""
        *ramp, finish = super().plan(size, sparsity)
        changed = []
        for i, phase in enumerate(ramp):
            rate = ScaledRate(size.rate_schedule(), self.rates[i % len(self.rates)])
            overrides = TrainingOverrides(dropout=self.drops[i % len(self.drops)])
            changed.append(replace(phase, rate=rate, overrides=overrides))
        return [*changed, finish]


class GivenScores(FisherAverage):
    """Scores that were computed already, in place of those of the average."""

    def __init__(self, fisher: FisherAverage, scores: Scores) -> None:
        super().__init__(decay=fisher.decay)
        object.__setattr__(self, "given", scores)

    def scores(self, state: TrainState) -> Scores:
        """Return the given scores."""
        given: Scores = self.__dict__["given"]
        return given


def _observe(fisher: FisherAverage, run: ActiveRun) -> LoopHooks:
    return LoopHooks(observe=fisher.observe_gradients)


def _normalised(scores: Scores) -> Scores:
    """Return the scores divided by their mean over all weights."""
    mean = sum(float(s.double().sum()) for s in scores.values()) / sum(s.numel() for s in scores.values())
    return {name: s / max(mean, 1e-30) for name, s in scores.items()}


def _floats(state: TrainState) -> Scores:
    return {name: t for name, t in named_weights(state.model).items() if t.is_floating_point()}


def _mean_loss(run: ActiveRun, i: int) -> Tensor:
    """Return the training loss on batches that are the same for all forks of a pruning."""
    losses: list[Tensor] = []

    @torch.no_grad()
    def add(batch: dict[str, Tensor], share: float) -> None:
        losses.append(run.problem.training_loss(run.state.model, batch).double() * share)

    rows = calibration_batches(run.problem, TASTED, "taste", i)
    for_each_batch(run.problem, run.state.model, rows, "taste", add)
    return torch.stack(losses).sum()


def _row(method: GradualOBS, summary: str, *fixed: str) -> MethodInfo:
    return MethodInfo(
        method=method, family="gradual", score="w^2 F", summary=summary, source="none", returns=True, fixed=fixed
    )


SCORES = _row(ForkedOBS(), "scores averaged over forks", "soup")
SHUFFLED = _row(ForkedOBS(soup="shuffled"), "the same with shuffled scores of forks", "soup")
VOTES = _row(ForkedOBS(soup="votes"), "votes of forks' masks", "soup")
WEIGHTS = _row(ForkedOBS(soup="weights"), "scores and weights averaged over forks", "soup")
FORECAST = _row(ForkedOBS(soup="forecast"), "weights forecast from forks", "soup")
TASTE = _row(ForkedOBS(soup="taste", forks=4, look_ahead=0.0067), "exponent of F chosen by forks", "soup")
BURSTS = _row(SerialSoup(rates=(1.0, 2.0, 0.5, 1.5)), "rates that change between prunings")
MEAN_RATE = _row(SerialSoup(rates=(1.25,)), "their mean rate throughout")
DROPS = _row(SerialSoup(drops=(0.0, 0.1)), "dropout that changes between prunings")
MEAN_DROP = _row(SerialSoup(drops=(0.05,)), "the mean dropout throughout")
