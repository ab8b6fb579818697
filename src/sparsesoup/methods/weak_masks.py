"""Weak masks: masks of short noisy trainings from the main run's current state, and their consensus."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from sparsesoup.core.granularity import Element, Pattern
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import Masks, count_kept, hamming_distance, sparsity, vote_agreement
from sparsesoup.methods.scores import magnitude
from sparsesoup.training.forks import ForkFunction, Tensors
from sparsesoup.training.loop import Rate, TrainingOverrides, train
from sparsesoup.training.problem import Problem
from sparsesoup.training.state import TrainState

Moments = Literal["inherited", "fresh"]
Sets = Literal["union", "intersection"]


def draw_weak_masks(
    problem: Problem, state: TrainState, piece: str, work: ForkFunction, tasks: Sequence[tuple[Any, ...]]
) -> None:
    """Compute a weak mask per task with `work`, and add them to the state's memory, one stage each."""
    looks = problem.map(problem, state, work, tasks)
    for number in range(len(tasks)):
        problem.journal.run_stage(f"{piece}-weak-{number + 1}", state, add_vote, state, looks, number)


def draw_weak_mask(
    problem: Problem,
    state: TrainState,
    steps: int,
    target: float,
    protocol: TrainingOverrides,
    rate: Rate,
    path: tuple[object, ...],
    pattern: Pattern = Element,
    moments: Moments = "inherited",
) -> Tensors:
    """Return a weak mask, and its |theta|, at the end of a short training that changes the state.

    Jaiswal et al. 2023, sec. 3. The optimizer keeps the moments of the main run, or is reset.
    """
    if moments == "fresh":
        state.reset_optimizer_()
    train(state, problem, steps, stream=("weak", *path), rate=rate, label="weak", protocol=protocol)
    look = magnitude(state.prunable_parameters())
    mask = topk_masks(look, target, pattern=pattern, within=state.masks)
    return {f"votes/{n}": m.byte() for n, m in mask.items()} | {f"look/{n}": t for n, t in look.items()}


def add_vote(state: TrainState, looks: Callable[[int], Tensors], number: int) -> None:
    """Add a weak mask, and its magnitudes, to the state's memory."""
    for name, t in looks(number).items():
        sum_before = state.memory.get(name)
        state.memory[name] = t.to(_device_of(state)) if sum_before is None else sum_before + t.to(sum_before.device)


def _device_of(state: TrainState) -> torch.device:
    return next(iter(state.masks.values())).device


def masks_with_quorum(state: TrainState, quorum: int) -> Masks:
    """Return the weights that at least `quorum` weak masks keep; 1 is the union."""
    return {name: state.memory[f"votes/{name}"] >= quorum for name in state.targets}


def consensus_masks(state: TrainState, target: float, pattern: Pattern = Element) -> Masks:
    """Keep exactly the target number of weights: most votes first, then largest mean look-ahead magnitude."""
    votes = {name: state.memory[f"votes/{name}"] for name in state.targets}
    look = {name: state.memory[f"look/{name}"] for name in state.targets}
    return topk_masks(votes, target, then=look, pattern=pattern, within=state.masks)


def superpose_masks(state: TrainState, how: Sets, voters: int, most: float, pattern: Pattern = Element) -> Masks:
    """Return the union or the intersection of the weak masks.

    Args:
        most: the largest sparsity allowed; if the set is sparser, return the consensus at that sparsity.
    """
    found = masks_with_quorum(state, 1 if how == "union" else voters)
    return found if sparsity(found) <= most else consensus_masks(state, most, pattern)


def prune_to_soup(state: TrainState, voters: int, masks: Masks, pattern: Pattern = Element) -> None:
    """Prune the main run to the merged masks, note the effect of the soup, and clear the votes.

    Notes: the agreement of the weak masks, and the share of all weights on which the merged mask differs from plain
    magnitude pruning of the main run at this step and sparsity.
    """
    scores, share = magnitude(state.prunable_parameters()), sparsity(masks)
    plain = topk_masks(scores, share, pattern=pattern, within=state.masks) if count_kept(masks) else masks
    votes = {name: state.memory[f"votes/{name}"] for name in state.targets} if voters else {}
    entry = {
        "step": state.step,
        "sparsity": sparsity(masks),
        "weak_masks": voters,
        "decided": hamming_distance(masks, plain),
    }
    if voters > 1:
        entry |= vote_agreement(votes, voters)
    state.notes.setdefault("stages", []).append(entry)
    state.memory = {k: t for k, t in state.memory.items() if not k.startswith(("votes/", "look/"))}
    state.set_masks_(masks)
