"""Tables and summaries in the terminal: of an export, of a benchmark."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from sparsesoup.exports.benchmark.explain import format_milliseconds
from sparsesoup.report.escaping import text_table
from sparsesoup.report.format import format_count, format_percent
from sparsesoup.report.terminal import flatten_scores
from sparsesoup.runs.summary import format_scores

Rows = Sequence[Sequence[str]]
SIZES = ("", "parameters", "not zero", "on disk", "packed", "zstd", "FLOP")
TIMES = ("", "backend", "form", "batch", "per s", "dense", "by FLOPs", "speed-up")


def print_export(facts: Mapping[str, Any], console: Console) -> None:
    """Print a summary of an export: sizes before and after, weights removed by layer, how to load it."""
    names = {"weights": "weights on disk, bytes", "encoder": "  of its blocks, bytes", "parameters": "parameters",
             "nonzero": "  not zero"}  # fmt: skip
    rows = [
        (names[key], f"{before:,}", f"{after:,}", format_percent(after / before) if before else "")
        for key, (before, after) in facts["sizes"].items()
    ]
    console.print(text_table(("", "before", "after", "left"), rows))
    columns = [key for key in (facts["layers"] or [{}])[0] if key not in ("layer", "narrow")]
    layers = [
        (row["layer"], *(f"{row[key][1]:,} of {row[key][0]:,}" if key in row else "" for key in columns))
        for row in facts["layers"]
    ]
    if layers:
        console.print()
        console.print(text_table(("layer", *columns), layers))
    for note in facts["notes"]:
        console.print(Text(f"{note}."))
    if "verified" in facts:
        console.print(Text(_verification_sentence(facts["verified"])))
    console.print(Text(f"load    {facts['load']}"), soft_wrap=True)  # one line, for copying


def _verification_sentence(found: Mapping[str, Any]) -> str:
    one, other = (format_scores(flatten_scores(found[key])) for key in ("scores", "scores_of_source"))
    where = "in a fresh process" + (" without sparsesoup" if found["without_sparsesoup"] else "")
    return (
        f"Verified {where}: {found['same']:,} of {found['rows']:,} predictions on the test split are those of the "
        f"source, outputs differ by {found['largest_difference']:.3g} at most; {one}, of the source {other}."
    )


def print_benchmark(tables: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the results: sizes and FLOPs, times relative to the dense model, and a summary."""
    first = tables[0]
    shape = f"batches of {first['batch']}" + (f", {first['length']} tokens" if first["length"] else "")
    console.print(Text(f"{shape}, {first['threads']} threads, {first['rounds']} rounds by turns\n", style="bold"))
    # Numbers instead of paths, which would take too much space.
    names = [str(i) for i in range(1, len(tables) + 1)] if len(tables) > 1 else ["this"]
    console.print(text_table(SIZES, _size_rows(tables, names)))
    console.print()
    console.print(text_table(TIMES, _time_rows(tables, names), left=3))
    meaning = (
        "batch, dense: time of a batch, and of one of the dense model. per s: texts or images. by FLOPs: dense FLOPs "
        "over those of this model. speed-up: dense over batch, and its quartiles over the rounds."
    )
    console.print(Text(meaning, style="dim"))
    for name, table in zip(names, tables, strict=True):
        console.print()
        if len(tables) > 1:
            console.print(Text(f"{name}  {table['path']}", style="bold"), soft_wrap=True)
        for sentence in table["summary"]:
            console.print(Text(sentence))
        for label, reason in table["failed"].items():
            console.print(Text(f"{label} was not measured: {reason}."))


def _size_rows(tables: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Rows:
    """Return a row for the dense model and one for each candidate."""
    found: list[tuple[str, ...]] = []
    for i, table in enumerate(tables):
        dense, own = table["sizes"]["dense"], table["sizes"]["this"]
        if i == 0 or dense != tables[i - 1]["sizes"]["dense"]:
            parameters, size = f"{dense['parameters']:,}", format_count(dense["raw"], "B")
            found.append(("dense", parameters, parameters, size, "", "", format_count(table["flops"]["dense"])))
        count = [value for key, value in table["flops"].items() if key not in ("dense", "csr", "bsr")][-1]
        disk = [format_count(own[key], "B") if key in own else "" for key in ("raw", "packed", "zstd")]
        found.append((names[i], f"{own['parameters']:,}", f"{own['nonzero']:,}", *disk, format_count(count)))
    return found


def _time_rows(tables: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Rows:
    """Return a row for each backend and variant of each candidate."""
    return [
        (name if len(names) > 1 else "", row["label"], row["form"], format_milliseconds(row["seconds"]),
         f"{row['per_second']:,.0f}", format_milliseconds(row["dense_seconds"]), f"{row['flops_ratio']:.2f}",
         "{:.2f} ({:.2f}-{:.2f})".format(row["faster"], *row["quartiles"]))
        for name, table in zip(names, tables, strict=True) for row in table["rows"]
    ]  # fmt: skip
