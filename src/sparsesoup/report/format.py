"""Format numbers, notes and warnings of a run for the report and the terminal."""

import math
from collections.abc import Callable, Mapping
from typing import Any

FAR = 0.05  # deviation from the target sparsity of group pruning that is worth a warning
NEAR = 0.02  # the same for gates
Facts = Mapping[str, Any]


def format_percent(share: float, digits: int = 1) -> str:
    """Format a share in percent, with enough digits not to look like all or nothing.

    >>> format_percent(0.9), format_percent(0.99996), format_percent(1)
    ('90.0 %', '99.996 %', '100.0 %')
    """
    while share not in (0, 1) and digits < 6 and round(100 * share, digits) in (0.0, 100.0):
        digits += 1
    return f"{100 * share:.{digits}f} %"


def format_count(count: float, unit: str = "FLOP") -> str:
    """Format a large count with an SI prefix and three digits.

    >>> format_count(12_345_678_901_234), format_count(999_999), format_count(12)
    ('12.3 TFLOP', '1.00 MFLOP', '12 FLOP')
    """
    prefixes = iter(["k", "M", "G", "T", "P", "E", "Z", "Y"])
    prefix, value = "", float(count)
    while value >= 999.5:
        prefix, value = next(prefixes), value / 1000
    digits = 0 if not prefix or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {prefix}{unit}".rstrip()


def format_duration(seconds: float) -> str:
    """Format a duration.

    >>> format_duration(12.34), format_duration(192), format_duration(7323)
    ('12.3 s', '3 min 12 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60) if seconds >= 3600 else int(seconds) // 60
    return f"{minutes // 60} h {minutes % 60} min" if seconds >= 3600 else f"{minutes} min {int(seconds) % 60} s"


def describe_notes(facts: Facts) -> tuple[list[str], dict[str, Any]]:
    """Return (the notes of a run as sentences, the notes without a sentence)."""
    found = [*_describe_data(facts), *_describe_teacher(facts), *_describe_cache_hits(facts)]
    others = {k: v for k, v in facts["notes"].items() if k != "stages"}
    for key, say in SENTENCES.items():
        if key in others:
            try:
                found.append(say(others[key], facts))
            except (LookupError, TypeError, ValueError, AttributeError, StopIteration):
                continue  # of an unknown form: shown as is
            del others[key]
    return found, others


def run_warnings(facts: Facts) -> list[str]:
    """Return warnings that the result may not be as intended."""
    notes, train, target = facts["notes"], facts["settings"]["train"], facts["sparsity"]["target"]
    alone, reached, found = notes.get("threshold_sparsity"), facts["sparsity"]["reached"], []
    if alone is not None and abs(alone - target) > NEAR:
        more = "trimming restored weights that the model had gone without"
        found.append(
            f"the gates alone closed {format_percent(alone)} of the weights instead of {format_percent(target)}, and "
            f"{more if alone > target else 'the rest of the mask was made by trimming'}: "
            f"{_remedy_for_gates(facts['settings']['method'], alone > target)}"
        )
    missed = f"{format_percent(reached)} of the weights are pruned instead of {format_percent(target)}"
    if "refill" in notes and target - reached > FAR:
        found.append(
            f"{missed}, since all weights of kept heads and units were restored: set a higher --sparsity, or "
            f"--method.attention heads"
        )
    elif abs(reached - target) > FAR:
        found.append(f"{missed}: only whole groups are kept, as many as fit; set another --sparsity, or smaller groups")
    wanted = train["batch_size"] * train["gradient_accumulation_steps"]
    if wanted > facts.get("train_rows", math.inf):
        found.append(f"a step had only {facts['train_rows']} rows, the whole training set, not {wanted}")
    return [*found, *notes.get("degenerate", [])]


def _remedy_for_gates(method: Facts, too_many: bool) -> str:
    """Return what to set where gates closed too many, or too few, of the weights."""
    if method.get("penalty") is not None:
        return "leave out --method.penalty, so that it is adapted to the sparsity"
    if method.get("strength") is not None:
        return "leave out --method.strength, so that the shares follow the sparsity"
    if "tile" in method and not too_many:  # one tile of each matrix stays open in the search
        return "set smaller --method.tile.rows and --method.tile.cols"
    if method.get("every_steps", 1) > 1:
        return f"set a lower --method.every-steps (now {method['every_steps']})"
    rate = f" (now {method['score_rate']:g})" if method.get("score_rate") is not None else ""
    if too_many:
        return f"raise --steps, or lower --method.score-rate{rate}"
    return f"raise --method.score-rate{rate} or --steps"


def _describe_data(facts: Facts) -> list[str]:
    data = facts.get("data")
    found = [*data.get("read", ()), *data.get("notes", ())] if isinstance(data, dict) else []
    return [f"Data: {line}." for line in found]


def _describe_teacher(facts: Facts) -> list[str]:
    distill, method = facts["settings"].get("train", {}).get("distill", {}), facts["settings"].get("method", {})
    named = distill.get("teacher")
    teacher = "a dense run with the same settings" if named == "dense" else named
    if method.get("name") == "sparse-progressive-distillation":
        return [_describe_progressive_teacher(method, teacher or "the model that the run fine-tuned before")]
    if not named:
        return []
    parts = {"hidden": "block outputs", "attention": "attention maps"}  # older runs have no attention
    more = "".join(
        f", and {distill[k]:g} times the distance of the {what}" for k, what in parts.items() if distill.get(k)
    )
    return [
        f"Distilled from {teacher}: {format_percent(distill['alpha'])} of the loss is the divergence from its outputs "
        f"at temperature {distill['temperature']:g}, the rest is the task loss{more}. "
        f"Its forward pass is included in every step's FLOPs."
    ]


def _describe_progressive_teacher(method: Facts, teacher: str) -> str:
    """Describe the loss of sparse progressive distillation, which has its own weights and no labels."""
    parts = {"hidden": "block outputs", "attention": "attention maps"}
    more = "".join(
        f", plus {method[key]:g} times the squared error of the {what}, summed over the blocks"
        for key, what in parts.items()
        if method[key]
    )
    return (
        f"Distilled from {teacher}, without labels: the loss is the divergence from its outputs at temperature "
        f"{method['temperature']:g}{more}. Its forward pass is included in the FLOPs of every step of the student."
    )


def _describe_cache_hits(facts: Facts) -> list[str]:
    steps = sum(int(cost.get("shared", 0)) for cost in facts["cost"].values())
    return [f"{steps} steps were taken from the cache of another run; their cost is counted in full."] if steps else []


def _as_sentences(lines: list[str], facts: Facts) -> str:
    return " ".join(f"{line[0].upper()}{line[1:]}." for line in lines)


def _describe_budget(kind: Any, facts: Facts) -> str:
    kinds = {"included": "weak steps are part of the T steps.", "extra": "weak steps are added to the T steps."}
    return f"Budget {kind}: {kinds.get(str(kind), 'of an unknown kind.')}"


def _describe_threshold(alone: float, facts: Facts) -> str:
    refilled = facts["notes"].get("refill") or {"before": facts["sparsity"]["reached"]}
    trimmed = format_percent(refilled["before"])
    return f"The thresholds alone gave a sparsity of {format_percent(alone)}; the masks were then trimmed to {trimmed}."


def _describe_early_bird(found: Facts, facts: Facts) -> str:
    checks, fired, method = found["checks"], found["fired"], facts["settings"]["method"]
    far, limit = max(checks[-1][method["measure"]]), method["threshold"]
    distance = f"its largest {method['measure']} distance from those before it was {far:.4g}, allowed {limit:g}"
    if fired is None:
        return f"The budget of the search ended after {len(checks)} masks; the last one was taken: {distance}."
    return f"The mask settled at step {fired} of the search, at its check number {len(checks)}: {distance}."


def _describe_pool(pool: Facts, facts: Facts) -> str:
    visited = pool["visited"]
    taken = [f"{v['share']:g} of the one at {format_percent(v['sparsity'])}" for v in visited if v["accepted"]]
    accepted = f"{len(taken)} accepted ({', '.join(taken)})" if taken else "none accepted"
    scores = f"on validation {pool['own']:.4f} alone, {pool['score']:.4f} pooled"
    return f"Of {len(visited)} neighbouring tickets {accepted}; {scores}."


def _describe_soup(soup: Facts, facts: Facts) -> str:
    if "forks" in soup:
        mixed = [f"{fork['share']:g} ({format_percent(fork['sparsity'], 0)} pruned)" for fork in soup["forks"]]
        score = f"on validation {soup['score']:.4f} before fine-tuning"
        return f"Shares of the models mixed in: {', '.join(mixed)}; {score}."
    scores = ", ".join(f"{score:.4f}" for score in soup["members"])
    return f"Members on validation: {scores}; averaged: number {', '.join(str(i + 1) for i in sorted(soup['taken']))}."


def _describe_refill(found: Facts, facts: Facts) -> str:
    return (
        f"After a sparsity of {format_percent(found['before'])} every weight of the kept heads and units was restored: "
        f"{format_percent(found['after'])} are pruned, and training continued for {found['steps']} steps."
    )


def _describe_teacher_changes(checks: list[Facts], facts: Facts) -> str:
    metric = next(key for key in checks[0] if key not in ("step", "sparsity", "teaches"))
    changes = [f"step {c['step']} ({format_percent(c['sparsity'])} pruned, {metric} {c[metric]:.4f})"
               for c in checks if c["teaches"]]  # fmt: skip
    return f"Of {len(checks)} validation checks these gave a new teacher: {', '.join(changes)}."


def _describe_scores_before(scores: Facts, facts: Facts) -> str:
    values = ", ".join(f"{value:.4f} {name}" for name, value in scores.items())
    return f"Zero-shot, dense and before any training: {values} on validation."


def _describe_low_rank(found: Facts, facts: Facts) -> str:
    share = format_percent(found["removed_of_model"])
    return f"Layers of low rank at compression {found['compression']:g}: {share} of all parameters are removed."


def _describe_early_stopping(found: Facts, facts: Facts) -> str:
    best = f"the weights are those of step {found['step']}, of {found['best']:.4f} {found['metric']} on validation"
    if found["stopped"] is None:
        return f"Trained to the end, with early stopping; {best}."
    return f"Stopped early at step {found['stopped']} after {found['waited']} validations that were no better; {best}."


SENTENCES: dict[str, Callable[[Any, Facts], str]] = {
    "degenerate": _as_sentences,
    "doubts": _as_sentences,
    "before": _describe_scores_before,
    "rounds": lambda rounds, facts: f"Pruning rounds, each after its own training: {rounds}.",
    "weak_share": lambda share, facts: f"Weak steps: {format_percent(share)} of T.",
    "budget": _describe_budget,
    "threshold_sparsity": _describe_threshold,
    "early_bird": _describe_early_bird,
    "pool": _describe_pool,
    "soup": _describe_soup,
    "phases": lambda goals, facts: f"Sparsity of the phases: {', '.join(format_percent(goal) for goal in goals)}.",
    "teachers": _describe_teacher_changes,
    "refill": _describe_refill,
    "heads_and_rows": lambda share, facts: (
        f"{format_percent(share)} of the weights are pruned as whole heads and rows, which can be cut out; what the "
        f"second stage pruned are tiles, which stay as zeros."
    ),
    "sparsity_with_biases": lambda share, facts: f"With the biases of pruned rows: {format_percent(share, 2)} pruned.",
    "low_rank": _describe_low_rank,
    "early_stopping": _describe_early_stopping,
    "ticket": lambda path, facts: f"Masks of the ticket {path}.",
}
