"""Redraw every table and figure of README and docs from benchmarks/results/: `make tables`. Needs no GPU.

A figure in the documents comes from here and nowhere else: what stands between `<!-- NAME -->` and `<!-- end -->` is
replaced.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import curve
from drawing import axes
from sparsesoup.study.results.tables import format_entry, paired_interval

HERE = Path(__file__).parent
ROOT = HERE.parent
FLAGS = ("dtype", "zstd", "fp16")  # settings of exports
PUBLISHED = ("dense", "random", "magnitude", "snip", "grasp", "gradual", "early-bird", "lottery-pools", "imp",
             "imp-rewind", "isp-no-soup", "isp")  # rows of the tables of the ISP paper  # fmt: skip
SAME_COST = 1.02  # at most, over a dense run's: validation and a few batches for a score are within it
EQUAL = "-equal"  # ends the name of a result whose rows are cut down to one training
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def summary(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Per row: scores over the seeds that are there, cost relative to the dense row."""
    rows: dict[str, dict[str, Any]] = {}
    for name in result["study"]["rows"]:
        cells = [c for c in result["cells"] if c["row"] == name and not c.get("missing")]
        rows[name] = {
            "validation": [next(iter(c["validation"].values())) for c in cells],
            "test": [next(iter(c["test"].values())) for c in cells if c["test"]],
            "steps": [sum(v["steps"] for k, v in c["cost"].items()) for c in cells],
            "flops": [sum(v["flops"] for v in c["cost"].values()) for c in cells],
            "decided": [c["notes"]["stages"][-1]["decided"] for c in cells if c["notes"].get("stages")],
        }
    return rows


def whole_rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of which every seed is there."""
    seeds = len(result["study"]["seeds"])
    return {name: row for name, row in summary(result).items() if len(row["test"]) == seeds}


def at_one_cost(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """One result of the rows that cost at most what a dense run does: those of a study, and those cut down to it."""
    rows = whole_rows(base)
    most = SAME_COST * statistics.mean(rows["dense"]["flops"])
    cheap = {name: None for name, row in rows.items() if statistics.mean(row["flops"]) <= most}
    cells = [cell for cell in base["cells"] if cell["row"] in cheap.keys() - own["study"]["rows"].keys()]
    return {"study": {**base["study"], "rows": cheap | own["study"]["rows"]}, "cells": cells + own["cells"]}


def table(result: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    """The Markdown table of these rows of a study."""
    study = result["study"]
    dense = statistics.mean(rows["dense"]["flops"]) if rows.get("dense", {}).get("flops") else 0.0
    lines = ["| method | validation | test | steps | FLOPs (dense = 1) |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        cost = f"{statistics.mean(row['flops']) / dense:.2f}" if row["flops"] and dense else "missing"
        steps = f"{statistics.mean(row['steps']):.0f}" if row["steps"] else "missing"
        scores = [format_entry(dict(enumerate(row[split])), len(study["seeds"])) for split in ("validation", "test")]
        lines.append(f"| {name} | {scores[0]} | {scores[1]} | {steps} | {cost} |")
    return "\n".join(lines)


def verdicts(result: dict[str, Any], ours: str) -> str:
    """How far a row is from the others on the test split, paired by seed; within Student's 95 % it is noise."""
    tests = {
        (c["row"], c["seed"]): next(iter(c["test"].values()))
        for c in result["cells"]
        if not c.get("missing") and c["test"]
    }
    lines = []
    for name in result["study"]["rows"]:
        one, other = ({seed: 100 * v for (row, seed), v in tests.items() if row == r} for r in (ours, name))
        mean, half, pairs = paired_interval(one, other)
        if name == ours or pairs < 2:
            continue
        word = "noise" if abs(mean) <= half else ("better" if mean > 0 else "worse")
        lines.append(f"- {ours} against {name}: {mean:+.1f} ± {half:.1f} points over {pairs} seeds: {word}")
    return "\n".join(lines)


def figure(result: dict[str, Any], path: Path) -> None:
    """The rows by their test score, and beside it what each cost."""
    rows, study = whole_rows(result), result["study"]
    dense = statistics.mean(rows["dense"]["flops"])
    order = sorted(rows, key=lambda name: statistics.mean(rows[name]["test"]))
    title = f"{study['dataset']}, sparsity {study['sparsity']}, {len(study['seeds'])} seeds"
    with axes(path, title, widths=(3, 2), height=1.4 + 0.19 * len(rows)) as (score, cost):
        for y, name in enumerate(order):
            row, colour = rows[name], "C3" if name.startswith("isp") else "C7" if name.startswith("dense") else "C0"
            error = 100 * statistics.stdev(row["test"]) if len(row["test"]) > 1 else 0.0
            score.errorbar(100 * statistics.mean(row["test"]), y, xerr=error, fmt="o", capsize=2.5, color=colour)
            times = statistics.mean(row["flops"]) / dense
            cost.barh(y, times, height=0.6, color=colour)
            cost.annotate(
                f"{times:.2f}", (times, y), xytext=(3, 0), textcoords="offset points", fontsize=7, va="center"
            )
        score.set_yticks(range(len(order)), order, fontsize=8)
        score.grid(axis="y", color="0.92")
        score.set(xlabel="test score, points", ylim=(-0.7, len(order) - 0.3))
        cost.set(xlabel="cost, FLOPs of all steps\nand scoring (dense = 1)")
        cost.margins(x=0.2)


def costs(found: dict[str, Any]) -> str:
    """The Markdown table of benchmarks/cost.py."""
    names = {
        "masked_step": "masked training step / dense step (bare loop)",
        "selection": "`keep` over 84,934,656 scores / `torch.topk`",
        "weak_mask": "weak mask, all included / its 30 training steps",
        "movement_step": "step of `movement` / dense step (bare loop)",
        "l0_step": "step of `l0` / dense step",
        "block_step": "step of `movement` in 32 x 32 blocks / dense step",
    }
    lines = ["| what | ratio (median) | quartiles | bound |", "|---|---|---|---|"]
    for key, text in names.items():
        row = found.get(key)
        if row is None:
            lines.append(f"| {text} | missing | | |")
            continue
        low, high = row["quartiles"]
        lines.append(f"| {text} | {row['ratio']:.3f} | {low:.3f} to {high:.3f} | {row['bound']:.3f} |")
    if "movement_step" in found:
        more = found["movement_step"]["memory_over_weights"]
        lines.append(
            f"| memory of a step of `movement` beside a dense one's / prunable weights | {more:.2f} | | 4.00 |"
        )
    part, bound = found["selection"]["memory_over_scores"], found["selection"]["memory_bound"]
    lines.append(f"| memory of `keep` / memory of the scores | {part:.2f} | | {bound:.2f} |")
    for kind, row in found.get("packing", {}).items():
        bound, values = (0.085, "bf16") if kind == "bf16" else (0.14, "float32")
        slowest = min(row["pack_mb_s"], row["unpack_mb_s"])
        lines.append(f"| packed at 90 %, values in {values} / size in float32 | {row['share']:.3f} | | {bound:.3f} |")
        lines.append(
            f"| packing or unpacking them, the slower, MB of float32 a second | {slowest:.0f} | | at least 200 |"
        )
    return "\n".join([*lines, "", f"`make bench` on {found['machine']}."])


def speeds(found: dict[str, Any]) -> str:
    """The Markdown table of benchmarks/speed.py."""
    asked = found["settings"]
    lines = [
        "| on | form | ms a batch | dense | FLOPs promise | times as fast (median) | quartiles |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (row for rows in found["backends"].values() for row in rows):
        low, high = row["quartiles"]
        lines.append(
            f"| {row['label']} | {row['form']} | {1e3 * row['seconds']:.0f} | {1e3 * row['dense_seconds']:.0f} "
            f"| {row['promise']:.2f} | {row['faster']:.2f} | {low:.2f} to {high:.2f} |"
        )
    missing = [f"{label}: {reason}." for label, reason in found["failed"].items()]
    told = f"Batches of {asked['batch']} texts of {asked['length']} tokens, `{asked['command']}` on {asked['machine']}."
    return "\n".join([*lines, "", " ".join([told, *missing])])


def exports(found: dict[str, Any]) -> str:
    """The Markdown table of benchmarks/exports.py."""
    lines = ["| export | bytes | of the source | same predictions | largest difference | loads without sparsesoup |"]
    lines.append("|---" * 6 + "|")
    for row in found["exports"]:
        flags = [str(value) if isinstance(value, str) else key for key, value in row.items() if key in FLAGS]
        lines.append(
            f"| {', '.join([row['to'], *flags])} | {row['bytes']:,} | {100 * row['share']:.1f} % "
            f"| {row['same']:,} of {row['rows']:,} | {row['largest_difference']:.2g} "
            f"| {'yes' if row['without_sparsesoup'] else 'no'} |"
        )
    return "\n".join([*lines, "", f"Of `{found['command']}`, on {found['machine']}."])


def kept(found: dict[str, Any]) -> str:
    """The Markdown table of benchmarks/kept.py."""
    dense = found["dense"]["apart"]
    heads = [
        "score",
        "squared weights that stay",
        "cosine with the dense model's vectors",
        f"apart (dense: {dense:.2f})",
    ]
    lines = [f"| {' | '.join([*heads, 'density, thinnest and densest matrix'])} |", "|---" * 5 + "|"]
    for name, row in ((name, row) for name, row in found.items() if "cosine" in row):
        low, high = (100 * share for share in row["density"])
        shares = [f"{row[key]:.2f}" for key in ("squared weights", "cosine", "apart")]
        lines.append(f"| {' | '.join([name, *shares, f'{low:.0f} to {high:.0f} %'])} |")
    return "\n".join([*lines, "", f"`{found['command']}`"])


def overlaps(found: dict[str, Any]) -> str:
    """The Markdown table of benchmarks/overlap.py."""
    lines = ["| row | share of its kept weights that `magnitude` keeps | that another seed keeps |", "|---|---|---|"]
    for name, row in found["overlap"].items():
        found_here = (row["with magnitude"], row["between seeds"])
        shares = [f"{100 * statistics.mean(values):.1f} %" if values else "missing" for values in found_here]
        lines.append(f"| {name} | {shares[0]} | {shares[1]} |")
    return "\n".join([*lines, "", f"`{found['command']}`"])


def zero_shot(found: dict[str, Any]) -> str:
    """The Markdown table of benchmarks/clip_pretrain.py."""
    lines = ["| images | for the CLIP | zero-shot accuracy of held-out training rows |", "|---|---|---|"]
    for name, scores in found["zero_shot"].items():
        role = "transfer" if name in found["recipe"]["transfer"] else "in-domain"
        lines.append(f"| {name} | {role} | {100 * scores['accuracy']:.1f} |")
    cost = found["cost"]["strong"]
    return "\n".join(
        [*lines, "", f"After {cost['steps']:,} steps, {cost['seconds'] / 60:.0f} minutes on {found['machine']}."]
    )


def pieces() -> dict[str, str]:
    """Marker -> what stands behind it, of every committed result."""
    found: dict[str, str] = {}
    for path in sorted((HERE / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "study" not in result:
            drawn = next(draw for key, draw in KINDS.items() if key in result)
            found[path.stem] = drawn(result)
            continue
        if path.stem.endswith(EQUAL):
            base = path.with_stem(path.stem.removesuffix(EQUAL))
            result = at_one_cost(json.loads(base.read_text(encoding="utf-8")), result)
        if curve.is_one(result):
            found[path.stem] = "\n".join(curve.points(result))
            continue
        found[path.stem] = table(result, summary(result))
        rows = whole_rows(result)
        found[f"{path.stem}-whole"] = table(result, rows)
        found[f"{path.stem}-published"] = table(result, {name: rows[name] for name in PUBLISHED if name in rows})
        for row in result["study"]["rows"]:
            found[f"{path.stem}-{row}-verdicts"] = verdicts(result, row)
    return found


# By what only such a result holds.
KINDS = {
    "backends": speeds,
    "exports": exports,
    "grasp": kept,
    "overlap": overlaps,
    "selection": costs,
    "zero_shot": zero_shot,
}


def redrawn(text: str, found: dict[str, str]) -> str:
    """A document with every piece in its place."""
    for name, piece in found.items():
        between = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = between.sub(lambda m, piece=piece: f"{m.group(1)}{piece}\n{m.group(2)}", text)
    return text


def main() -> None:
    found = pieces()
    shown = ""
    for document in DOCUMENTS:
        text = redrawn(document.read_text(encoding="utf-8"), found)
        document.write_text(text, encoding="utf-8")
        shown += text
    for path in sorted((HERE / "results").glob("*.json")):
        result, name = json.loads(path.read_text(encoding="utf-8")), f"figures/{path.stem}.svg"
        if name in shown and "study" in result:
            (curve.figure if curve.is_one(result) else figure)(result, ROOT / "docs" / name)
    print(f"redrew the tables of {len(DOCUMENTS)} documents")


if __name__ == "__main__":
    main()
