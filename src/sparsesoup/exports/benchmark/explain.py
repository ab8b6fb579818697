"""Explain benchmark results: deviations from the speed expected from FLOPs, and a summary for the user."""

from collections.abc import Mapping
from typing import Any

from sparsesoup.exports.benchmark.backends import BACKENDS
from sparsesoup.report.format import format_count, format_percent

FAR = 0.25  # relative deviation from the speed expected from FLOPs that needs no explanation
GAIN = 1.05  # lower quartile of the speed-up from which it counts as a gain
Facts = Mapping[str, Any]


def explain_speed(row: Facts, table: Facts) -> str:
    """Explain a speed that differs from the one expected from FLOPs; return '' if it is within 25 %."""
    promise, faster = row["promise"], row["faster"]
    if abs(faster / promise - 1) <= FAR:
        return ""
    low, high = row["quartiles"]
    if low <= promise <= high:
        return "the ratio of FLOPs is within the quartiles: the machine was busy, measure again"
    rates = [table["flops"]["dense"] / row["dense_seconds"], table["flops"]["dense"] / promise / row["seconds"]]
    dense, own = (format_count(rate, "FLOP/s") for rate in rates)
    if BACKENDS[row["on"]].dense:
        return f"a sparse kernel looks up each value's place: it does {own} of what is left, the dense one {dense}"
    return f"it does {own} as a whole, the dense model {dense}; {_in_torch(row, table)}"


def _in_torch(row: Facts, table: Facts) -> str:
    """Name the part of the work that shrank less, or more, than FLOPs, from torch's profiler."""
    dense, own = table["profiles"]["dense"], table["profiles"][row["form"]]
    sign = 1 if row["faster"] < row["promise"] else -1
    lost = {key: sign * (own[key] - dense[key] / row["promise"]) for key in ("products", "others")}
    if lost["others"] > max(lost["products"], 0):
        one, other = (format_percent(part["others"] / (part["products"] + part["others"]), 0) for part in (own, dense))
        how = "did not shrink with them" if sign > 0 else "shrank more than they did"
        return (
            f"norms, activations, look-ups and copies, which FLOPs do not count, {how}: in torch they take {one} of "
            f"its time, {other} of the dense model's"
        )
    if lost["products"] > 0:
        count, how = table["flops"]["dense"], "fill the processor less" if sign > 0 else "fit its caches better"
        rates = [count / row["promise"] / own["products"], count / dense["products"]]
        one, other = (format_count(rate, "FLOP/s") for rate in rates)
        return f"narrower matrices {how}: in torch {one} of products, {other} dense"
    return "in torch its parts shrank with the FLOPs, so it is this engine's own overhead"


def summary_sentences(table: Facts) -> list[str]:
    """Return plain sentences about gains, and about backends without a gain."""
    notes = [f"{note[0].upper()}{note[1:]}." for note in table["notes"]]
    return [
        _size_sentence(table),
        *_best_sentences(table),
        *_departure_sentences(table),
        *_no_gain_sentences(table),
        *notes,
    ]


def _size_sentence(table: Facts) -> str:
    dense, own = table["sizes"]["dense"], table["sizes"]["this"]
    told = f"On the disk it takes {format_megabytes(own['raw'])}, the dense model {format_megabytes(dense['raw'])}"
    packed = (
        f"; packed {format_megabytes(own['packed'])}, with zstd {format_megabytes(own['zstd'])}"
        if "packed" in own
        else ""
    )
    return f"{told} ({own['raw'] / dense['raw']:.2f} of it){packed}."


def _best_sentences(table: Facts) -> list[str]:
    rows = [row for row in table["rows"] if row["quartiles"][0] >= GAIN]
    if not rows:
        return ["Nothing that was measured makes it faster than the dense model."] if table["rows"] else []
    best = min(rows, key=lambda row: row["seconds"])
    low, high = best["quartiles"]
    told = (
        f"Fastest is {describe_row(best)}: {format_milliseconds(best['seconds'])} a batch of {table['batch']}, "
        f"{best['faster']:.2f} "
        f"times as fast as the dense model there ({low:.2f} to {high:.2f}; {best['promise']:.2f} by FLOPs)"
    )
    plain = next((row for row in table["rows"] if row["on"] == "torch"), None)
    if plain and best["on"] != "torch":
        told += f" and {plain['dense_seconds'] / best['seconds']:.2f} times as fast as the dense model in torch"
    return [f"{told}."]


def _departure_sentences(table: Facts) -> list[str]:
    """Return a sentence for each gain that differs from the expected one."""
    return [
        f"On {describe_row(row)}, it is {row['faster']:.2f} times as fast, {row['promise']:.2f} by FLOPs: {row['why']}."
        for row in table["rows"]
        if row["why"] and row["quartiles"][0] >= GAIN
    ]


def _no_gain_sentences(table: Facts) -> list[str]:
    """Return a sentence for each backend and form without a speed-up."""
    return [_no_speed(row) for row in table["rows"] if row["quartiles"][0] < GAIN]


def _no_speed(row: Facts) -> str:
    low, high = row["quartiles"]
    if min(row["promise"], row["faster"]) >= GAIN:
        return (
            f"No certain speed-up on {describe_row(row)}: {row['faster']:.2f} times, but {low:.2f} to {high:.2f} "
            f"between rounds; "
            f"measure again, with more --rounds."
        )
    # A FLOPs ratio above 1 means that units were cut out or zeros are skipped: these are not multiplied.
    few = f"it is no more than {row['promise']:.2f} by FLOPs"
    because = (row["why"] or few) if row["promise"] > 1 else "zeros are multiplied like anything else"
    return f"No speed-up on {describe_row(row)}, {row['faster']:.2f} times: {because}."


def describe_row(row: Facts) -> str:
    """Return a row's backend and form, as used in sentences."""
    return f"{row['label']}, {row['form']}"


def format_megabytes(size: float) -> str:
    """Format a size in bytes.

    >>> format_megabytes(45_234_000), format_megabytes(2_500)
    ('45.2 MB', '2.5 kB')
    """
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def format_milliseconds(seconds: float) -> str:
    """Format a short time.

    >>> format_milliseconds(0.1234), format_milliseconds(0.0012), format_milliseconds(2.5)
    ('123 ms', '1.20 ms', '2500 ms')
    """
    return f"{1e3 * seconds:.2f} ms" if seconds < 0.01 else f"{1e3 * seconds:.0f} ms"
