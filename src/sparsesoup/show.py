"""What a run came to: its report.json read, put into words, and printed in the terminal."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsesoup.errors import UserError

REPORT, FORMAT = "report.json", 1
COSTS = ("steps", "examples", "tokens", "padding", "flops", "seconds")
NEEDED: dict[str, type | tuple[type, ...]] = {
    "method": str, "model": str, "dataset": str, "seed": int, "steps": int, "settings": dict, "sparsity": dict,
    "validation": dict, "cost": dict, "matrices": list, "notes": dict, "command": str, "versions": dict, "machine": str,
}  # fmt: skip


def read_report(run: Path) -> dict[str, Any]:
    """What report.json of a run directory says.

    Raises: UserError if it is missing or damaged.
    """
    path = Path(run) / REPORT
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no {path}: give the directory of a finished run (seed-<n>), or run `prune` again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"damaged report {path} ({error}); remove it and run `prune` again") from error
    if flaw := _flaw(facts):
        raise UserError(f"damaged report {path} ({flaw}); remove it and run `prune` again")
    return dict(facts)


def _flaw(facts: Any) -> str:
    """What is wrong with a report, in a few words; nothing if it can be shown."""
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        return f"it has no format {FORMAT}, the one that this version reads"
    wrong = [key for key, kind in NEEDED.items() if not isinstance(facts.get(key), kind)]
    if wrong:
        return f"{', '.join(wrong)} missing or of another kind"
    parts = [("sparsity", facts["sparsity"], ("asked", "reached", "kept", "total"))]
    parts += [(f"cost.{label}", row, COSTS) for label, row in facts["cost"].items()]
    parts += [("matrices", row, ("kept", "total")) for row in facts["matrices"]]
    parts += [("notes.stages", row, ("step", "sparsity", "weak_masks", "decided")) for row in _stages(facts)]
    for name, row, keys in parts:
        if not isinstance(row, dict) or not all(_is_number(row.get(key)) for key in keys):
            return f"{name} needs the numbers {', '.join(keys)}"
    if not facts["matrices"] or not all({"name", "role"} <= row.keys() and row["total"] for row in facts["matrices"]):
        return "matrices need a name, a role and at least one weight each"
    scores = [*flat(facts["validation"]).values(), *flat(facts.get("test")).values()]
    return "" if facts["validation"] and all(map(_is_number, scores)) else "validation and test need numbers"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _stages(facts: Mapping[str, Any]) -> list[Any]:
    return list(facts["notes"].get("stages") or [])


def percent(share: float) -> str:
    """A share in percent, with as many digits as keep it from looking like all or nothing.

    >>> percent(0.9), percent(0.99996), percent(1)
    ('90.0 %', '99.996 %', '100.0 %')
    """
    digits = 1
    while share not in (0, 1) and digits < 6 and round(100 * share, digits) in (0.0, 100.0):
        digits += 1
    return f"{100 * share:.{digits}f} %"


def flop(count: float, unit: str = "FLOP") -> str:
    """A large count with an SI prefix and three digits.

    >>> flop(12_345_678_901_234), flop(999_999), flop(12)
    ('12.3 TFLOP', '1.00 MFLOP', '12 FLOP')
    """
    prefixes = iter(["k", "M", "G", "T", "P", "E", "Z", "Y"])
    prefix, value = "", float(count)
    while value >= 999.5:
        prefix, value = next(prefixes), value / 1000
    digits = 0 if not prefix or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {prefix}{unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(12.34), duration(192), duration(7323)
    ('12.3 s', '3 min 12 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60) if seconds >= 3600 else int(seconds) // 60
    return f"{minutes // 60} h {minutes % 60} min" if seconds >= 3600 else f"{minutes} min {int(seconds) % 60} s"


def flat(scores: Mapping[str, Any] | None) -> dict[str, Any]:
    """Scores by name; those of several test sets as `accuracy, matched`."""
    found: dict[str, Any] = {}
    for key, value in (scores or {}).items():
        found |= {f"{name}, {key}": v for name, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return found


def first(scores: Mapping[str, Any] | None) -> str:
    """The selecting score, or that of each test set, in words; nothing if there is none."""
    rows = [(k, dict(v)) if isinstance(v, Mapping) else ("", scores or {}) for k, v in (scores or {}).items()]
    several = [(group, *next(iter(table.items()))) for group, table in rows if table]
    words = [f"{value:.3f} {name}" + f" ({group})" * bool(group) for group, name, value in several]
    return " and ".join(dict.fromkeys(words))


def is_dense(facts: Mapping[str, Any]) -> bool:
    """Whether every weight is still there."""
    return bool(facts["sparsity"]["kept"] == facts["sparsity"]["total"])


def headline(facts: Mapping[str, Any]) -> str:
    """The run in one sentence."""
    model = re.split(r"[/\\]", facts["model"].rstrip("/\\"))[-1] or facts["model"]
    weights, times = facts["sparsity"], times_dense(facts)
    what = f"all {weights['total']:,} prunable weights kept"
    if not is_dense(facts):
        what = f"{percent(weights['reached'])} of {weights['total']:,} prunable weights gone"
    tested = first(facts.get("test"))
    scored = f"{first(facts['validation'])} on validation, " + (f"{tested} on test" if tested else "test not scored yet")
    cost = f", trained at {times:.2f} times the cost of a dense run" if times is not None else ""
    return f"{model} on {facts['dataset']} by {facts['method']}: {what}; {scored}{cost}."


def total(facts: Mapping[str, Any], but: str = "") -> dict[str, float]:
    """The costs of all labels together, without the label `but`."""
    return {key: sum(row[key] for label, row in facts["cost"].items() if label != but) for key in COSTS}


def _dense_flops(facts: Mapping[str, Any]) -> float:
    """FLOPs of T steps of this run's mean strong step, 0 if it made none: an estimate of a dense run."""
    strong = facts["cost"].get("strong", {"steps": 0, "flops": 0})
    return float(facts["steps"] * strong["flops"] / strong["steps"]) if strong["steps"] else 0.0


def times_dense(facts: Mapping[str, Any]) -> float | None:
    """Training FLOPs as a multiple of a dense run; validation, which every run has, is left out of both."""
    dense = _dense_flops(facts)
    return total(facts, but="validation")["flops"] / dense if dense else None


def soup_stages(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages at which weak masks voted."""
    return [stage for stage in _stages(facts) if stage["weak_masks"] > 0]


def density(facts: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(name, share kept) of every matrix."""
    return [(str(row["name"]), row["kept"] / row["total"]) for row in facts["matrices"]]


def grid(matrices: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """layer -> role -> share kept, matrices of one layer and role together; empty if names or roles do not tell."""
    counts: dict[tuple[str, str], dict[str, list[int]]] = {}
    for row in matrices:
        found = re.match(r"(.*?)\.(\d+)\.", str(row["name"]))
        if not found or all(r["role"] == "other" for r in matrices):
            return {}
        cell = counts.setdefault((found[1], found[2]), {}).setdefault(str(row["role"]), [0, 0])
        cell[0], cell[1] = cell[0] + row["kept"], cell[1] + row["total"]
    stacks = dict.fromkeys(stack for stack, _ in counts)
    shared = set.intersection(*(set(stack.split(".")) for stack in stacks)) if len(stacks) > 1 else set(*stacks_words(stacks))
    return {
        " ".join([w for w in stack.split(".") if w not in shared] + [layer]): {r: k / n for r, (k, n) in cells.items()}
        for (stack, layer), cells in counts.items()
    }
