"""Heads and units that are left, whole again: the "filled" finish of hybrid pruning. Lagunas et al. 2021, sec. 4."""

import torch
from torch import Tensor

from sparsesoup.core.granularity import Tie
from sparsesoup.core.masks import Masks
from sparsesoup.core.masks import sparsity as sparsity_of
from sparsesoup.core.rng import generator
from sparsesoup.core.targets import Targets, heads, units, upright
from sparsesoup.training.loop import train
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState

INTO, OUT_OF = ("value", "feed-forward in"), ("output", "feed-forward out")


def filled(masks: Masks, targets: Targets) -> Masks:
    """The masks with every weight of the heads and units that still do something, and none of the others.

    A head does something while one of its features has a weight in the value's matrix and in the output's; a unit while
    it has one in the matrix going in and in the one coming out: the others are what compaction cuts. Matrices without
    heads or units stay as they are.
    """
    shapes = {name: target.shape for name, target in targets.items()}
    lines, found = upright(masks, targets), dict(masks)
    for tie in [*heads(targets), *units(targets)]:
        alive = _features(tie, lines, targets)
        whole = alive.view(tie.count(shapes), -1).any(1)
        found |= tie.spread(whole, shapes)
    return found


def _features(tie: Tie, lines: Masks, targets: Targets) -> Tensor:
    """Which features of a tie have a weight on either side, [features]."""
    sides = [lines[n].any(1) for n, _ in tie.members if targets[n].role in INTO]
    sides += [lines[n].any(0) for n, _ in tie.members if targets[n].role in OUT_OF]
    return torch.stack(sides).all(0)


def refill_(state: TrainState, problem: Problem, steps: int, noise: float) -> None:
    """Let the weights of the kept heads and units return as noise, and go back to `steps` steps before the end.

    Args:
        noise: standard deviation of what returns, as a share of the root mean square of the matrix's kept weights.
    """
    before, masks, draw = state.masks, filled(state.masks, state.targets), generator(problem.seed, "refill")
    state.notes["refill"] = {"before": sparsity_of(before), "after": sparsity_of(masks), "steps": steps}
    state.prune_(masks)
    with torch.no_grad():
        for name, weight in state.params().items():
            scale = noise * weight[before[name]].square().mean().nan_to_num().sqrt()
            fresh = torch.randn(weight.shape, generator=draw).to(weight) * scale
            weight.add_(fresh.mul_(masks[name] & ~before[name]))
    state.forget_()
    state.step = problem.steps - steps


def train_on(state: TrainState, problem: Problem, steps: int) -> None:
    """The last `steps` steps again, with a learning rate that rises and falls once more, on rows of its own order."""
    first, rate = problem.steps - steps, problem.rate(steps)
    train(state, problem, steps, stream=("refill",), rate=lambda step: rate(step - first))
