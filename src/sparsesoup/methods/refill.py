"""Restore all weights of kept heads and units: "filled" hybrid pruning. Lagunas et al. 2021, sec. 4."""

import torch

from sparsesoup.core.masks import Masks
from sparsesoup.core.masks import sparsity as sparsity_of
from sparsesoup.core.rng import cpu_generator
from sparsesoup.core.targets import Targets, attention_head_groups, feed_forward_groups, to_out_in_layout
from sparsesoup.methods.live_features import kept_features
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState


def refill_masks(masks: Masks, targets: Targets) -> Masks:
    """Return masks with every weight of the heads and units that are still in use, and none of the others.

    A head is in use while one of its features has a weight in both the value and the output matrix; a unit while it
    has one in both the matrix in and the matrix out: compaction cuts the others. Matrices without heads or units stay
    as they are.
    """
    shapes = {name: target.shape for name, target in targets.items()}
    lines, found = to_out_in_layout(masks, targets), dict(masks)
    for coupled in [*attention_head_groups(targets), *feed_forward_groups(targets)]:
        alive = kept_features(coupled, lines, targets)
        whole = alive.view(coupled.num_groups(shapes), -1).any(1)
        found |= coupled.expand_to_weights(whole, shapes)
    return found


def refill_(state: TrainState, problem: Problem, steps: int, noise: float) -> None:
    """Restore the weights of the kept heads and units as noise, and go back to `steps` steps before the end.

    Args:
        noise: standard deviation of restored weights, as a share of the root mean square of the matrix's kept weights.
    """
    before, masks, draw = state.masks, refill_masks(state.masks, state.targets), cpu_generator(problem.seed, "refill")
    state.notes["refill"] = {"before": sparsity_of(before), "after": sparsity_of(masks), "steps": steps}
    state.set_masks_(masks)
    with torch.no_grad():
        for name, weight in state.prunable_parameters().items():
            scale = noise * weight[before[name]].square().mean().nan_to_num().sqrt()
            fresh = torch.randn(weight.shape, generator=draw).to(weight) * scale
            weight.add_(fresh.mul_(masks[name] & ~before[name]))
    state.reset_optimizer_()
    state.step = problem.steps - steps
