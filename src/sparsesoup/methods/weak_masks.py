"""Weak masks: masks of short noisy trainings from the main run's current state, and their consensus."""

from collections.abc import Callable
from typing import Literal

from sparsesoup.core.granularity import Element, Pattern
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import Masks, count_kept, hamming_distance, sparsity, vote_agreement
from sparsesoup.methods.scores import magnitude
from sparsesoup.training.config import TrainingOverrides
from sparsesoup.training.forks import Tensors
from sparsesoup.training.loop import Rate
from sparsesoup.training.plan import ActiveRun, Phase
from sparsesoup.training.state import TrainState

Moments = Literal["inherited", "fresh"]
Sets = Literal["union", "intersection"]


def weak_mask_phase(
    stage: str,
    steps: int,
    protocol: TrainingOverrides,
    rate: Rate,
    path: tuple[int, int],
    end: Callable[[ActiveRun], Tensors],
    moments: Moments = "inherited",
    skip: Callable[[TrainState], bool] | None = None,
) -> Phase:
    """Return the fork of a short training that ends in a weak mask. Jaiswal et al. 2023, sec. 3.

    Args:
        path: number of the stage and of the mask in it: the random stream.
        end: returns `weak_mask` of the fork.
        moments: the optimizer keeps the moments of the main run, or is reset.
        skip: whether to leave the mask out.
    """
    return Phase(
        name=f"{stage}-weak-{path[1] + 1}", kind="fork", steps=steps, label="weak", stream=("weak", *path),
        rate=rate, overrides=protocol, fresh_optimizer=moments == "fresh", end=end, skip=skip,
        at_most=skip is not None, copies=1.25,  # votes and magnitudes
    )  # fmt: skip


def weak_mask(state: TrainState, target: float, pattern: Pattern = Element) -> Tensors:
    """Return the weak mask at the end of a short training, and its |theta|, to be added to those of other forks."""
    magnitudes = magnitude(state.prunable_parameters())
    mask = topk_masks(magnitudes, target, pattern=pattern, within=state.masks)
    return {f"votes/{n}": m.byte() for n, m in mask.items()} | {f"look/{n}": t for n, t in magnitudes.items()}


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


def prune_to_soup(
    state: TrainState, voters: int, masks: Masks, pattern: Pattern = Element, plain: Masks | None = None
) -> None:
    """Prune the main run to the merged masks, note the effect of the soup, and clear the votes.

    Notes: the agreement of the weak masks, and the share of all weights on which the merged mask differs from plain
    magnitude pruning of the main run at this step and sparsity, `plain` if that is known.
    """
    if plain is None and count_kept(masks):
        scores = magnitude(state.prunable_parameters())
        plain = topk_masks(scores, sparsity(masks), pattern=pattern, within=state.masks)
    votes = {name: state.memory[f"votes/{name}"] for name in state.targets} if voters else {}
    entry = {
        "step": state.step,
        "sparsity": sparsity(masks),
        "weak_masks": voters,
        "changed": hamming_distance(masks, plain or masks),
    }
    if voters > 1:
        entry |= vote_agreement(votes, voters)
    state.notes.setdefault("stages", []).append(entry)
    state.memory = {k: t for k, t in state.memory.items() if not k.startswith(("votes/", "look/"))}
    state.set_masks_(masks)
