"""Weak masks: short noisy trainings from where the main run is, and the consensus of the masks they give."""

from sparsesoup.masks import Masks, agreement, distance, kept, sparsity
from sparsesoup.patterns import Element, Pattern
from sparsesoup.problem import Problem
from sparsesoup.scores import magnitude
from sparsesoup.select import keep
from sparsesoup.state import TrainState
from sparsesoup.train import Protocol, Rate, train


def cast_vote(
    state: TrainState,
    problem: Problem,
    steps: int,
    target: float,
    protocol: Protocol,
    rate: Rate,
    path: tuple[object, ...],
    pattern: Pattern = Element,
) -> None:
    """Look ahead and come back: add one weak mask, and the |theta| it was drawn from, to the state's memory.

    Jaiswal et al. 2023, sec. 3. Moments are inherited from the main run, which is then restored to the bit.
    """
    here = state.snapshot()
    with problem.journal.paused():
        train(state, problem, steps, stream=("weak", *path), rate=rate, label="weak", protocol=protocol)
    look = magnitude(state.params())
    mask = keep(look, target, pattern=pattern, within=state.masks)
    state.restore_(here)
    for name in mask:
        votes, ahead = state.memory.get(f"votes/{name}"), state.memory.get(f"look/{name}")
        state.memory[f"votes/{name}"] = mask[name].byte() if votes is None else votes + mask[name]
        state.memory[f"look/{name}"] = look[name] if ahead is None else ahead + look[name]


def count_votes(state: TrainState, quorum: int) -> Masks:
    """The weights that at least `quorum` weak masks keep; 1 is the union."""
    return {name: state.memory[f"votes/{name}"] >= quorum for name in state.targets}


def consensus(state: TrainState, target: float, pattern: Pattern = Element) -> Masks:
    """Exactly the asked number of weights: most votes first, then largest mean look-ahead magnitude."""
    votes = {name: state.memory[f"votes/{name}"] for name in state.targets}
    look = {name: state.memory[f"look/{name}"] for name in state.targets}
    return keep(votes, target, then=look, pattern=pattern, within=state.masks)


def serve(state: TrainState, voters: int, masks: Masks, pattern: Pattern = Element) -> None:
    """Prune the main run to the merged masks, note what the soup did, and clear the votes.

    Noted: how far the weak masks agreed, and the share of all weights on which the merged mask differs from plain
    magnitude of the main run at this moment and sparsity: what the soup decided.
    """
    scores, share = magnitude(state.params()), sparsity(masks)
    plain = keep(scores, share, pattern=pattern, within=state.masks) if kept(masks) else masks
    votes = {name: state.memory[f"votes/{name}"] for name in state.targets} if voters else {}
    entry = {"step": state.step, "sparsity": sparsity(masks), "weak_masks": voters, "decided": distance(masks, plain)}
    if voters > 1:
        entry |= agreement(votes, voters)
    state.notes.setdefault("stages", []).append(entry)
    state.memory = {k: t for k, t in state.memory.items() if not k.startswith(("votes/", "look/"))}
    state.prune_(masks)
