"""Print the report of a run in the terminal."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import load_table
from sparsesoup.core.low_rank import low_rank_of
from sparsesoup.core.manifest import REPORT
from sparsesoup.report.escaping import command_line, printable_line, text_table
from sparsesoup.report.format import describe_notes, format_count, format_duration, format_percent
from sparsesoup.training.cost import LABELS, label_name

FORMAT = 1  # of report.json
COSTS = ("steps", "examples", "tokens", "padding", "flops", "seconds")
NEEDED: dict[str, type | tuple[type, ...]] = {
    "method": str, "model": str, "dataset": str, "seed": int, "steps": int, "settings": dict, "sparsity": dict,
    "validation": dict, "cost": dict, "matrices": list, "notes": dict, "command": str, "versions": dict, "machine": str,
}  # fmt: skip


def read_report(run: Path) -> dict[str, Any]:
    """Read report.json of a run directory."""
    path = Path(run) / REPORT
    try:
        facts = load_table(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no {path}: give the directory of a finished run (seed-<n>), or run `prune` again") from error
    except (OSError, ValueError) as error:
        raise UserError(f"damaged report {path} ({error}); remove it and run `prune` again") from error
    if flaw := _report_flaw(facts):
        raise UserError(f"damaged report {path} ({flaw}); remove it and run `prune` again")
    return facts


def _report_flaw(facts: Mapping[str, Any]) -> str:
    """Return what is wrong with a report in a few words; an empty string if it is valid."""
    if facts.get("format") != FORMAT:
        return f"it has no format {FORMAT}, the one that this version reads"
    wrong = [key for key, kind in NEEDED.items() if not isinstance(facts.get(key), kind)]
    if wrong:
        return f"{', '.join(wrong)} missing or of another kind"
    parts: list[tuple[str, Any, tuple[str, ...]]]
    parts = [("sparsity", facts["sparsity"], ("target", "reached", "kept", "total"))]
    parts += [(f"cost.{label}", row, COSTS) for label, row in facts["cost"].items()]
    parts += [("matrices", row, ("kept", "total")) for row in facts["matrices"]]
    parts += [("notes.stages", row, ("step", "sparsity", "weak_masks", "changed")) for row in _stages_of(facts)]
    for name, row, keys in parts:
        if not isinstance(row, dict) or not all(_is_number(row.get(key)) for key in keys):
            return f"{name} needs the numbers {', '.join(keys)}"
    if not facts["matrices"] or not all({"name", "role"} <= row.keys() and row["total"] for row in facts["matrices"]):
        return "matrices need a name, a role and at least one weight each"
    scores = [*flatten_scores(facts["validation"]).values(), *flatten_scores(facts.get("test")).values()]
    return "" if facts["validation"] and all(map(_is_number, scores)) else "validation and test need numbers"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _stages_of(facts: Mapping[str, Any]) -> list[Any]:
    return list(facts["notes"].get("stages") or [])


def flatten_scores(scores: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return scores by name; those of several test sets as `accuracy (matched)`."""
    found: dict[str, Any] = {}
    for key, value in (scores or {}).items():
        found |= {f"{name} ({key})": v for name, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return found


def main_scores(scores: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return only the first score, which is used for selection, or that of each test set."""
    several = {key: dict([*value.items()][:1]) for key, value in (scores or {}).items() if isinstance(value, Mapping)}
    return flatten_scores(several or dict([*(scores or {}).items()][:1]))


def format_main_score(scores: Mapping[str, Any] | None) -> str:
    """Format the first scores; an empty string if there are none."""
    return " and ".join(f"{value:.3f} {name}" for name, value in main_scores(scores).items())


def is_dense(facts: Mapping[str, Any]) -> bool:
    """Return True if every weight is kept, and no parameter was removed by rank."""
    return bool(facts["sparsity"]["kept"] == facts["sparsity"]["total"]) and low_rank_of(facts) is None


def describe_flops(facts: Mapping[str, Any]) -> str:
    """Return what the FLOPs of a run count, and what its saved model has of its sparsity."""
    if low_rank_of(facts):
        return (
            "Training FLOPs are those of the thin layers. The saved model has the stock shapes, and is neither smaller "
            "nor faster before `sparsesoup export --to low-rank` writes the thin layers."
        )
    return "FLOPs are those of the dense model: zeros alone make a model neither smaller nor faster."


def run_headline(facts: Mapping[str, Any]) -> str:
    """Describe the run in one sentence."""
    model = re.split(r"[/\\]", facts["model"].rstrip("/\\"))[-1] or facts["model"]
    weights, times = facts["sparsity"], times_dense(facts)
    what = f"all {weights['total']:,} prunable weights kept"
    if low := low_rank_of(facts):
        removed = f"{format_percent(low['removed'])} of {low['weights']:,} prunable weights removed by rank"
        what = f"{removed} (compression {low['compression']:g})"
    elif not is_dense(facts):
        what = f"{format_percent(weights['reached'])} of {weights['total']:,} prunable weights pruned"
    test = f"{format_main_score(facts['test'])} on test" if facts.get("test") else untested(facts)
    cost = f"; training cost {times:.2f} times a dense run" if times is not None and not is_dense(facts) else ""
    scored = f"{format_main_score(facts['validation'])} on validation, {test}"
    return f"{model} on {facts['dataset']} by {facts['method']}: {what}; {scored}{cost}."


def untested(facts: Mapping[str, Any]) -> str:
    """Return why there is no score on test."""
    return "no test split, since its rows were objects" if facts["settings"].get("objects") else "test not scored yet"


def ordered_costs(facts: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Return (label, cost), the main training first and validation last; the file sorts them by name."""
    order = [*LABELS]
    return sorted(facts["cost"].items(), key=lambda row: order.index(row[0]) if row[0] in order else len(order) - 1.5)


def total_cost(facts: Mapping[str, Any], but: str = "") -> dict[str, float]:
    """Return the total cost, without the label `but`."""
    return {key: sum(row[key] for label, row in facts["cost"].items() if label != but) for key in COSTS}


def dense_flops(facts: Mapping[str, Any]) -> float:
    """Return the FLOPs of T of this run's mean main steps, 0 if it made none: an estimate of a dense run.

    If its steps include a teacher, use those of plain steps: measured, or its dense teacher's.
    """
    if "dense_flops" in facts:
        return float(facts["dense_flops"])
    nothing = {"steps": 0, "flops": 0}
    one = facts["cost"].get("teacher") or facts["cost"].get("main", nothing)
    return float(facts["steps"] * one["flops"] / one["steps"]) if one["steps"] else 0.0


def times_dense(facts: Mapping[str, Any]) -> float | None:
    """Return the FLOPs as a multiple of a dense run; the last validation, part of every run, is excluded from both."""
    dense = dense_flops(facts)
    return sum(flops_by_label(facts).values()) / dense if dense else None


def flops_by_label(facts: Mapping[str, Any]) -> dict[str, float]:
    """Return label -> FLOPs, without one pass over the validation rows: the remaining passes were for selection."""
    found = {label: float(cost["flops"]) for label, cost in ordered_costs(facts)}
    rows, cost = facts.get("validation_rows"), facts["cost"].get("validation")
    if cost:
        passes = cost["examples"] / rows if rows else 1.0
        found["validation"] *= max(0.0, 1 - 1 / passes) if passes else 0.0
    return {label: flops for label, flops in found.items() if flops}


def soup_stages(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the stages with weak masks."""
    return [stage for stage in _stages_of(facts) if stage["weak_masks"] > 0]


def matrix_sparsities(facts: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return (name, sparsity) of every matrix."""
    return [(str(row["name"]), 1 - row["kept"] / row["total"]) for row in facts["matrices"]]


def sparsity_grid(matrices: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return layer -> role -> sparsity, over all matrices of a layer and role; empty if names or roles are unknown."""
    counts: dict[tuple[str, str], dict[str, list[int]]] = {}
    for row in matrices:
        found = re.match(r"(.*?)\.(\d+)\.", str(row["name"]))
        if not found or all(r["role"] == "other" for r in matrices):
            return {}
        count = counts.setdefault((found[1], found[2]), {}).setdefault(str(row["role"]), [0, 0])
        count[0], count[1] = count[0] + row["kept"], count[1] + row["total"]
    shared = set.intersection(*(set(stack.split(".")) for stack, _ in counts))
    grid: dict[str, dict[str, float]] = {}
    for (stack, layer), cells in counts.items():
        name = " ".join([word for word in stack.split(".") if word not in shared] + [layer])
        grid[name] = {role: 1 - kept / total for role, (kept, total) in cells.items()}
    return grid


def show_run(run: Path, console: Console) -> None:
    """Print a run in the terminal: result, sparsity by layer, cost, provenance."""
    facts = read_report(run)
    _print_text(console, run_headline(facts), "bold")
    if not is_dense(facts) and not low_rank_of(facts):
        _print_table(console, *_sparsity_table(facts))
    _print_table(console, "Cost", _cost_table(facts))
    _print_text(console, describe_flops(facts))
    for sentence in describe_notes(facts)[0]:
        _print_text(console, sentence)
    if stages := soup_stages(facts):
        _print_table(console, "Weak masks by stage", _stage_table(stages))
        _print_text(
            console,
            "overlap: of the weights that either of two weak masks keeps, the share that both keep. changed: the share "
            "of all prunable weights that the soup keeps or prunes differently from plain magnitude pruning.",
        )
    _print_table(console, "Provenance", _provenance_table(facts, run))


def _print_text(console: Console, text: str, style: str = "") -> None:
    # Text, not str: brackets in names of models or datasets are not markup.
    console.print(Text(text, style=style))


def _print_table(console: Console, title: str, table: Table) -> None:
    _print_text(console, f"\n{title}", "bold")
    console.print(table)


def _sparsity_table(facts: Mapping[str, Any]) -> tuple[str, Table]:
    layers = sparsity_grid(facts["matrices"])
    if not layers:
        rows = [(name, format_percent(share)) for name, share in matrix_sparsities(facts)]
        return "Sparsity by matrix, share of its weights pruned", text_table(("matrix", "pruned"), rows)
    roles = list(dict.fromkeys(role for row in layers.values() for role in row))
    cells = [(layer, *(f"{100 * row[role]:.1f}" if role in row else "" for role in roles))
             for layer, row in layers.items()]  # fmt: skip
    return "Sparsity by layer and role, % of the weights pruned", text_table(("layer", *roles), cells)


def _cost_table(facts: Mapping[str, Any]) -> Table:
    rows = [(label_name(label), cost) for label, cost in ordered_costs(facts)] + [("all", total_cost(facts))]
    return text_table(("", "steps", "examples", "tokens", "padding", "FLOPs", "time"), [
        (name, f"{c['steps']:,}", f"{c['examples']:,}", format_count(c["tokens"], ""),
         format_percent(c["padding"] / c["tokens"]) if c["tokens"] else "", format_count(c["flops"]),
         format_duration(c["seconds"]))
        for name, c in rows
    ])  # fmt: skip


def _stage_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    keys = ("same", "unanimous", "overlap")
    return text_table(("stage", "step", "sparsity", "weak masks", *keys, "changed"), [
        (str(i), str(s["step"]), format_percent(s["sparsity"]), str(s["weak_masks"]),
         *(format_percent(s[k]) if k in s else "" for k in keys), format_percent(s["changed"], 2))
        for i, s in enumerate(stages, start=1)
    ])  # fmt: skip


def _provenance_table(facts: Mapping[str, Any], run: Path) -> Table:
    table = Table.grid(padding=(0, 2))
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    rows = f"{facts.get('train_rows', '?')} rows to train, {facts.get('validation_rows', '?')} to validate"
    values: dict[str, Any] = {
        split: ", ".join(f"{name} {value:.4f}" for name, value in flatten_scores(facts.get(split)).items())
        for split in ("validation", "test")
    }
    values |= {"model": facts["model"], "data": f"{facts['dataset']}, {rows}", "task": facts.get("task"),
               "seed": facts["seed"], "T": f"{facts['steps']:,} steps", "head": facts.get("head"), "versions": versions,
               "machine": facts["machine"], "run": run, "repeat": command_line(facts["command"])}  # fmt: skip
    for name, value in values.items():
        if value not in (None, ""):
            table.add_row(Text(name, style="bold"), Text(printable_line(str(value)), overflow="fold"))
    return table
