"""Tables of results that are no study: costs, speeds, exports, memory, perplexities. One function each."""

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

FLAGS = ("dtype", "zstd", "fp16")  # settings of exports


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], *notes: str) -> str:
    """Return a Markdown table, with notes below it."""
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in (heads, *rows)]
    return "\n".join(
        [lines[0], "|" + "---|" * len(heads), *lines[1:], *(part for note in notes for part in ("", _wrapped(note)))]
    )


def _wrapped(note: str) -> str:
    return textwrap.fill(note, 100, break_long_words=False, break_on_hyphens=False)


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
    cost = found["cost"]["main"]
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


def worker_rows(found: dict[str, Any]) -> str:
    """Return the table of benchmarks/image_workers.py."""
    rows = [
        [str(row["workers"]), f"{100 * row['share waited']:.1f} %", f"{100 * row['least share waited']:.1f} %"]
        for row in found["rows"]
    ]
    load = f"{found['load at the beginning']:.0f} to {found['load at the end']:.0f}"
    note = f"`{found['command']}` on {found['cores']} cores; the load average was {load} by other work."
    return markdown(["workers", "share of the time that the training waits", "least of the rounds"], rows, note)


# By what only such a result has.
KINDS = {
    "attach": attach_rows, "peaks": memory_rows, "same bits": worker_rows, "perplexity": perplexity_rows,
    "backends": speed_rows, "exports": export_rows, "grasp": kept_rows, "overlap": overlap_rows,
    "masked_step": cost_rows, "zero_shot": zero_shot_rows,
}  # fmt: skip
