"""Redraw every table of README and docs from benchmarks/results/: `make tables`. Needs no GPU.

A table in the documents comes from here and nowhere else: what stands between `<!-- NAME -->` and `<!-- end -->` is
replaced. A result with runs is the `study.json` of a study, copied here.
"""

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import cell_rows, comparisons, complete_cells
from curve import BACKENDS
from sparsesoup.exports.benchmark.backends import BACKENDS as LABELS
from sparsesoup.study.results.tables import format_entry, paired_interval, selecting_score

HERE = Path(__file__).parent
ROOT = HERE.parent
FLAGS = ("dtype", "zstd", "fp16")  # settings of exports
PUBLISHED = ("dense", "random", "magnitude", "snip", "grasp", "gradual", "early-bird", "lottery-pools", "imp",
             "imp-rewind", "isp-no-soup", "isp")  # rows of the tables of the ISP paper  # fmt: skip
SAME_COST = 1.02  # at most, over a dense run's: validation and a few batches for a score are within it
EQUAL = "-equal"  # ends the name of a result whose rows are cut down to one training
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
Runs = dict[str, list[dict[str, Any]]]  # row -> its runs


def read_results() -> dict[str, dict[str, Any]]:
    """Return name -> result; beside rows that are cut down to one training stand those that cost no more anyway."""
    paths = sorted((HERE / "results").glob("*.json"))
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    for name in (name for name in found if name.endswith(EQUAL)):
        found[name] = _at_one_cost(found[name.removesuffix(EQUAL)], found[name])
    return found


def _at_one_cost(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    rows = whole_rows(base)
    most = SAME_COST * mean_flops(rows["dense"])
    cheap = {name: None for name, runs in rows.items() if mean_flops(runs) <= most}
    runs = [run for run in base["runs"] if run["row"] in cheap.keys() - own["recipe"]["methods"].keys()]
    return {"recipe": own["recipe"] | {"methods": cheap | own["recipe"]["methods"]}, "runs": runs + own["runs"]}


def rows_of(result: Mapping[str, Any]) -> Runs:
    """Return row -> its runs, for every row of the recipe."""
    return {row: [run for run in result["runs"] if run["row"] == row] for row in result["recipe"]["methods"]}


def whole_rows(result: Mapping[str, Any]) -> Runs:
    """Return the rows with all seeds."""
    return {row: runs for row, runs in rows_of(result).items() if len(runs) == len(result["recipe"]["seeds"])}


def scores_by_seed(runs: Iterable[Mapping[str, Any]], split: str) -> dict[int, float]:
    """Return seed -> first score on a split."""
    return {run["seed"]: selecting_score(run, split) for run in runs}


def mean_flops(runs: Iterable[Mapping[str, Any]]) -> float:
    """Return the FLOPs of a run, all labels together."""
    return statistics.mean(sum(cost["flops"] for cost in run["cost"].values()) for run in runs)


def speed_of(runs: Iterable[Mapping[str, Any]], backend: str) -> float | None:
    """Return how many times as fast as dense a row is; None if no run was timed."""
    found = [run["speed"][backend]["faster"] for run in runs if backend in run.get("speed", {})]
    return statistics.mean(found) if found else None


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], *notes: str) -> str:
    """Return a Markdown table, with notes below it."""
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in (heads, *rows)]
    return "\n".join(
        [lines[0], "|" + "---|" * len(heads), *lines[1:], *(part for note in notes for part in ("", note))]
    )


def score_rows(result: Mapping[str, Any], rows: Runs) -> str:
    """Return the table of these rows of a study."""
    seeds, dense = len(result["recipe"]["seeds"]), rows.get("dense")
    table = []
    for name, runs in rows.items():
        scores = [format_entry(scores_by_seed(runs, split), seeds) for split in ("validation", "test")]
        steps = [sum(cost["steps"] for cost in run["cost"].values()) for run in runs]
        cost = f"{mean_flops(runs) / mean_flops(dense):.2f}" if runs and dense else "missing"
        table.append([name, *scores, f"{statistics.mean(steps):.0f}" if steps else "missing", cost])
    return markdown(["method", "validation", "test", "steps", "FLOPs (dense = 1)"], table)


def verdicts(result: Mapping[str, Any], ours: str) -> str:
    """Return how far a row is from the others on test, paired by seed; within Student's 95 % it is noise."""
    lines, tests = [], {row: scores_by_seed(runs, "test") for row, runs in rows_of(result).items()}
    for name in [name for name in tests if name != ours]:
        mean, half, pairs = paired_interval(tests[ours], tests[name])
        if pairs > 1:
            word = "noise" if abs(mean) <= half else "better" if mean > 0 else "worse"
            points = f"{100 * mean:+.1f} ± {100 * half:.1f} points over {pairs} seeds"
            lines.append(f"- {ours} against {name}: {points}: {word}")
    return "\n".join(lines)


def curve_rows(result: Mapping[str, Any]) -> str:
    """Return quality against speed: mean scores, distance from dense on test paired by seed, times as fast as dense."""
    rows, seeds = rows_of(result), len(result["recipe"]["seeds"])
    heads = ["row", "pruned", "validation", "test", "against dense"]
    heads += [f"times as fast, {LABELS[backend].label}" for backend in BACKENDS]
    table = []
    for row, runs in rows.items():
        if not runs:
            table.append([row, *["missing"] * (len(heads) - 1)])
            continue
        mean, half, pairs = paired_interval(scores_by_seed(runs, "test"), scores_by_seed(rows["dense"], "test"))
        apart = f"{100 * mean:+.1f} ± {100 * half:.1f}" if pairs > 1 and row != "dense" else "-"
        gone = f"{100 * statistics.mean(run['sparsity']['reached'] for run in runs):.1f} %"
        fast = [f"{speed:.2f}" if (speed := speed_of(runs, backend)) else "not timed" for backend in BACKENDS]
        scores = [format_entry(scores_by_seed(runs, split), seeds) for split in ("validation", "test")]
        table.append([row, gone, *scores, apart, *fast])
    return markdown(heads, table)


def cost_rows(found: dict[str, Any]) -> str:
    """Return the table of benchmarks/cost.py."""
    names = {
        "masked_step": "masked training step / dense step (bare loop)",
        "weak_mask": "weak mask, all included / its 30 training steps",
        "movement_step": "step of `movement` / dense step (bare loop)",
        "l0_step": "step of `l0` / dense step",
        "block_step": "step of `movement` in 32 x 32 blocks / dense step",
    }
    rows = []
    for row, text in ((found[key], text) for key, text in names.items()):
        low, high = row["quartiles"]
        rows.append([text, f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}", f"{row['bound']:.3f}"])
    what = "memory of a step of `movement` beside a dense one's / prunable weights"
    rows.append([what, f"{found['movement_step']['memory_over_weights']:.2f}", "", "4.00"])
    rows += selection_rows(found)
    for kind, row in found.get("host_work", {"more": {}})["more"].items():
        plain = found["host_work"]["bare_milliseconds"]
        what = f"ms of a step ({kind}) beside {plain:.0f} of a bare loop, 72 narrow matrices"
        rows.append([what, f"{row['milliseconds']:+.1f}", "", f"{row['bound']:+.1f}"])
    for kind, row in found["packing"].items():
        bound, values = ("0.085", "bf16") if kind == "bf16" else ("0.140", "float32")
        slowest = f"{min(row['pack_mb_s'], row['unpack_mb_s']):.0f}"
        rows.append([f"packed at 90 %, values in {values} / size in float32", f"{row['share']:.3f}", "", bound])
        rows.append(["packing or unpacking them, the slower, MB of float32 a second", slowest, "", "at least 200"])
    return markdown(["what", "ratio (median)", "quartiles", "bound"], rows, f"`make bench` on {found['machine']}.")


def selection_rows(found: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the selections, on one thread and on two."""
    rows = []
    for part in (found[key] for key in ("selection_1", "selection_2") if key in found):
        threads = part["threads"]
        on = f"{threads} thread{'s' * (threads > 1)}"
        share, bound = part["share_of_read_bandwidth"], part["bound"]
        rows.append(
            [
                f"`topk_masks` over 84,934,656 scores, {on}: share of the read bandwidth",
                f"{share:.3f}",
                "",
                f"at least {bound}",
            ]
        )
        rows.append([f"the same / `torch.topk`, {on}", f"{part['over_torch_topk']:.3f}", "", "reported"])
        for name, text in (
            ("within", "within masks"),
            ("consensus", "consensus (votes, then scores, within masks)"),
            ("row", "scope `row`"),
            ("2:4", "scope `2:4`"),
        ):
            low, high = part[name]["quartiles"]
            ratio, bound = f"{part[name]['ratio']:.2f}", f"{part[name]['bound']:.1f}"
            rows.append([f"{text} / plain, {on}", ratio, f"{low:.2f} to {high:.2f}", bound])
    memory = found["selection_1"]["memory_over_scores"]
    return [*rows, ["memory of `topk_masks` / memory of the scores", f"{memory:.2f}", "", "0.50"]]


def speed_rows(found: dict[str, Any]) -> str:
    """Return the table of benchmarks/speed.py."""
    asked, rows = found["settings"], []
    for row in (row for rows in found["backends"].values() for row in rows):
        seconds = [f"{1e3 * row[key]:.0f}" for key in ("seconds", "dense_seconds")]
        times = [f"{row[key]:.2f}" for key in ("flops_ratio", "faster")]
        quartiles = " to ".join(f"{value:.2f}" for value in row["quartiles"])
        rows.append([row["label"], row["form"], *seconds, *times, quartiles])
    told = f"Batches of {asked['batch']} texts of {asked['length']} tokens, `{asked['command']}` on {asked['machine']}."
    missing = [f"{label}: {reason}." for label, reason in found["failed"].items()]
    heads = ["on", "form", "ms a batch", "dense", "by FLOPs", "times as fast (median)", "quartiles"]
    return markdown(heads, rows, " ".join([told, *missing]))


def export_rows(found: dict[str, Any]) -> str:
    """Return the table of benchmarks/exports.py."""
    rows = []
    for row in found["exports"]:
        flags = [str(value) if isinstance(value, str) else key for key, value in row.items() if key in FLAGS]
        sizes, alone = (
            [f"{row['bytes']:,}", f"{100 * row['share']:.1f} %"],
            "yes" if row["without_sparsesoup"] else "no",
        )
        same = [f"{row['same']:,} of {row['rows']:,}", f"{row['largest_difference']:.2g}"]
        rows.append([", ".join([row["to"], *flags]), *sizes, *same, alone])
    heads = ["export", "bytes", "of the source", "same predictions", "largest difference", "loads without sparsesoup"]
    return markdown(heads, rows, f"Of `{found['command']}`, on {found['machine']}.")


def kept_rows(found: dict[str, Any]) -> str:
    """Return the table of benchmarks/kept.py."""
    heads = ["score", "squared weights that stay", "cosine with the dense model's vectors"]
    heads += [f"apart (dense: {found['dense']['apart']:.2f})", "density, thinnest and densest matrix"]
    rows = []
    for name, row in ((name, row) for name, row in found.items() if "cosine" in row):
        low, high = (100 * share for share in row["density"])
        shares = [f"{row[key]:.2f}" for key in ("squared weights", "cosine", "apart")]
        rows.append([name, *shares, f"{low:.0f} to {high:.0f} %"])
    return markdown(heads, rows, f"`{found['command']}`")


def overlap_rows(found: dict[str, Any]) -> str:
    """Return the table of benchmarks/overlap.py."""
    rows = []
    for name, row in found["overlap"].items():
        shares = [row["with magnitude"], row["between seeds"]]
        rows.append([name, *(f"{100 * statistics.mean(values):.1f} %" if values else "missing" for values in shares)])
    heads = ["row", "share of its kept weights that `magnitude` keeps", "that another seed keeps"]
    return markdown(heads, rows, f"`{found['command']}`")


def zero_shot_rows(found: dict[str, Any]) -> str:
    """Return the table of benchmarks/clip_pretrain.py."""
    rows = []
    for name, scores in found["zero_shot"].items():
        role = "transfer" if name in found["recipe"]["transfer"] else "in-domain"
        rows.append([name, role, f"{100 * scores['accuracy']:.1f}"])
    cost = found["cost"]["strong"]
    told = f"After {cost['steps']:,} steps, {cost['seconds'] / 60:.0f} minutes on {found['machine']}."
    return markdown(["images", "for the CLIP", "zero-shot accuracy of held-out training rows"], rows, told)


def attach_rows(found: dict[str, Any]) -> str:
    """Return the table of benchmarks/attach.py."""
    names = {
        "masked": ("`attach`, masks that stay", "1.05"), "gradual": ("`attach`, `gradual` on its ramp", "1.10"),
        "platon": ("`attach`, `platon`", ""), "movement": ("`attach`, `movement`", ""),
        "trainer-masked": ("`PruningCallback`, masks that stay", "1.05"),
        "trainer-gradual": ("`PruningCallback`, `gradual` on its ramp", "1.10"),
    }  # fmt: skip
    rows, cpu = [], any("cpu" in row for row in found["attach"].values())
    for case, row in found["attach"].items():
        name, bound = names[case]
        quartiles = f"{row['low']:.3f} to {row['high']:.3f}"
        rows.append([name + " *" * ("cpu" in row), f"{row['median']:.3f}", quartiles, bound])
    more = " *: CPU seconds of one thread (`--cpu`), beside other work." if cpu else ""
    note = f"`{found['command']}` on {found['machine']}.{more}"
    return markdown(["step of a loop that is not ours / without pruning", "ratio", "quartiles", "bound"], rows, note)


def perplexity_rows(found: dict[str, Any]) -> str:
    """Return the table of benchmarks/smollm2.py: differences of the loss are paired by row of text."""
    dense, rows = found["perplexity"]["dense"], []
    for name, row in found["perplexity"].items():
        worse = [own - other for own, other in zip(row["losses"], dense["losses"], strict=True)]
        error = statistics.stdev(worse) / len(worse) ** 0.5
        shift = "" if row is dense else f"{statistics.mean(worse):.2f} ± {2 * error:.2f}"
        rows.append([name, f"{100 * row['sparsity']:.0f} %", f"{row['perplexity']:.1f}", shift])
    heads = ["row", "removed", "perplexity", "loss above dense, ± two standard errors"]
    return markdown(heads, rows, f"`{found['command']} --model FOLDER` on {found['machine']}.")


def memory_rows(found: dict[str, Any]) -> str:
    """Return the table of benchmarks/memory.py."""
    rows = []
    for name, row in found["peaks"].items():
        bound = f"{row['memory_bound']:.2f}" if row["memory_bound"] else ""
        told = f"{row['predicted_memory'] / row['memory']:.2f}"
        rows.append([name, f"{row['memory'] / 1e9:.2f} GB", f"{row['over_plain']:.2f}", bound, told])
    heads = ["run", "peak memory of its process", "/ plain fine-tuning", "bound", "predicted / measured"]
    return markdown(heads, rows, f"`{found['command']}` of {found['model']} on {found['machine']}.")


# By what only such a result has.
KINDS = {"attach": attach_rows, "peaks": memory_rows, "perplexity": perplexity_rows, "backends": speed_rows,
         "exports": export_rows,
         "grasp": kept_rows, "overlap": overlap_rows, "masked_step": cost_rows,
         "zero_shot": zero_shot_rows}  # fmt: skip


def pieces() -> dict[str, str]:
    """Return marker -> the text behind it, of every committed result."""
    found: dict[str, str] = {}
    for name, result in read_results().items():
        if "runs" not in result:
            found[name] = next(draw for key, draw in KINDS.items() if key in result)(result)
        elif "sparsities" not in result["recipe"]:  # a curve: each row has its own
            found[name] = curve_rows(result)
        else:
            rows = whole_rows(result)
            found[name], found[f"{name}-whole"] = score_rows(result, rows_of(result)), score_rows(result, rows)
            found[f"{name}-published"] = score_rows(result, {row: rows[row] for row in PUBLISHED if row in rows})
            found |= {f"{name}-{row}-verdicts": verdicts(result, row) for row in result["recipe"]["methods"]}
            if len(complete_cells(result)) > 1:
                found[f"{name}-cells"] = markdown(*cell_rows(result))
                found |= {f"{name}-{row}-comparisons": comparisons(result, row) for row in result["recipe"]["methods"]}
    return found


def redrawn(text: str, found: dict[str, str]) -> str:
    """Return a document with every piece in its place."""
    for name, piece in found.items():
        between = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = between.sub(lambda m, piece=piece: f"{m.group(1)}{piece}\n{m.group(2)}", text)
    return text


def main() -> None:
    found = pieces()
    for document in DOCUMENTS:
        document.write_text(redrawn(document.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"redrew the tables of {len(DOCUMENTS)} documents")


if __name__ == "__main__":
    main()
