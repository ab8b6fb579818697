"""Warnings about a run whose model predicts one answer, learned nothing, or has an empty matrix."""

import re
import statistics
from collections.abc import Sequence

from sparsesoup.report.format import Facts, format_percent

FLAT = 0.02  # spread of the predictions relative to the labels, below which they count as one number
SHORT = 10  # fewer steps than this say little about the loss
MOST = 6  # layers to name


def degenerate_warnings(facts: Facts, losses: Sequence[float]) -> list[str]:
    """Return warnings about a degenerate run, from its report and the losses of its main training, step by step."""
    stuck = [*_constant_prediction(facts), *_loss_stayed_at_guessing(facts, losses)]
    rate, pruned = facts["settings"]["train"]["learning_rate"], facts["sparsity"]["kept"] < facts["sparsity"]["total"]
    less = f", a lower --sparsity{_scope_hint(facts)}" if pruned else ""
    remedy = f"what may help: more --steps{less}, another --train.learning-rate (now {rate:g})"
    return [*([f"{', and '.join(stuck)}; {remedy}"] if stuck else []), *_empty_matrices(facts)]


def _constant_prediction(facts: Facts) -> list[str]:
    """Detect the same prediction for all rows, if the labels vary."""
    seen = facts.get("answers") or {}
    name, rows = seen.get("called"), seen.get("rows")
    if "spread" in seen:
        same = f"the model predicts about {seen['answer']:.3g} for all {rows} validation rows"
        return [same] if seen["spread"] < FLAT else []
    if seen.get("answers") != 1 or seen["labels"] < 2:
        return []
    if name is None:
        return [f"the model predicts the same position, or none, for all {rows} validation rows"]
    commonest = "the most frequent class, " if seen["right"] == seen["commonest"] else ""
    share = format_percent(seen["right"])
    return [f"the model predicts {name!r} for all {rows} validation rows, {commonest}correct for {share} of them"]


def _loss_stayed_at_guessing(facts: Facts, losses: Sequence[float]) -> list[str]:
    """Detect a training loss no better than that of guessing."""
    seen, distilled = facts.get("answers") or {}, facts["settings"]["train"]["distill"]["teacher"]
    chance = seen.get("chance")
    if not chance or distilled or len(losses) < SHORT:
        return []
    quarter = len(losses) // 4
    means = [statistics.fmean(losses[i * quarter : (i + 1) * quarter]) for i in range(4)]
    late = statistics.fmean(means[2:])
    stayed = all(0.97 * chance <= mean <= 1.3 * chance for mean in means) and late >= 0.98 * chance
    knows = seen["explained"] > 0.05 if "explained" in seen else seen["right"] > seen["commonest"] + 0.05
    return [f"the training loss stayed at {late:.3f}, no better than guessing"] if stayed and not knows else []


def _empty_matrices(facts: Facts) -> list[str]:
    """Find matrices without any weight left."""
    layers: dict[str, list[str]] = {}
    empty = [row for row in facts["matrices"] if row["kept"] == 0]
    for row in empty:
        number, role = re.search(r"\.(\d+)\.", str(row["name"])), str(row["role"])
        layers.setdefault(f"layer {number[1]}" if number else "", []).append(role if role != "other" else row["name"])
    if not empty:
        return []
    named = []
    for layer, roles in layers.items():
        headless = " (no head)" if {"value", "output"} & {*roles} else ""
        named.append((f"{layer}{headless}: " if layer else "") + ", ".join(roles))
    more = f"; and {len(named) - MOST} layers more" if len(named) > MOST else ""
    count = f"{len(empty)} of {len(facts['matrices'])} matrices {'has' if len(empty) == 1 else 'have'} no weight left"
    return [f"{count} ({'; '.join(named[:MOST])}{more}); what may help: a lower --sparsity{_scope_hint(facts)}"]


def _scope_hint(facts: Facts) -> str:
    method = facts["settings"]["method"]
    free = method.get("scope") == "global" and method.get("structure", "weights") == "weights"
    return ", --method.scope row or tensor" if free else ""
