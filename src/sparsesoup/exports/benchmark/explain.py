"""What measurements mean: where a speed is not the one that FLOPs promise, why; and what a user gains."""

from collections.abc import Mapping
from typing import Any

from sparsesoup.exports.benchmark.backends import BACKENDS
from sparsesoup.report.format import format_count, format_percent

FAR = 0.25  # how far a speed may lie from what FLOPs promise without a word
GAIN = 1.05  # the lower quartile from which on a speed is called a gain
Facts = Mapping[str, Any]


def explain_speed(row: Facts, table: Facts) -> str:
    """Why a speed is not the one that FLOPs promise; nothing where it is, within 25 %."""
    promise, faster = row["promise"], row["faster"]
    if abs(faster / promise - 1) <= FAR:
        return ""
    low, high = row["quartiles"]
    if low <= promise <= high:
        return "the promise lies within the spread: the machine was busy, measure again"
    rates = [table["flops"]["dense"] / row["dense_seconds"], table["flops"]["dense"] / promise / row["seconds"]]
    dense, own = (format_count(rate, "FLOP/s") for rate in rates)
    if BACKENDS[row["on"]].dense:
        return f"a sparse kernel looks up each value's place: it does {own} of what is left, the dense one {dense}"
    return f"it does {own} as a whole, the dense model {dense}; {_in_torch(row, table)}"


def _in_torch(row: Facts, table: Facts) -> str:
    """Which part of the work did not shrink as FLOPs promise, or shrank more, by torch's profiler."""
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
    return "in torch its parts shrank as promised, so it is this engine's own overhead"


def summary_sentences(table: Facts) -> list[str]:
    """What a user gains and what gives nothing, in plain sentences."""
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
        f"times as fast as the dense model there ({low:.2f} to {high:.2f}; FLOPs promise {best['promise']:.2f})"
    )
    plain = next((row for row in table["rows"] if row["on"] == "torch"), None)
    if plain and best["on"] != "torch":
        told += f" and {plain['dense_seconds'] / best['seconds']:.2f} times as fast as the dense model in torch"
    return [f"{told}."]


def _departure_sentences(table: Facts) -> list[str]:
    """A sentence for each gain that is not the promised one."""
    return [
        f"On {describe_row(row)}, it is {row['faster']:.2f} times as fast, FLOPs promise {row['promise']:.2f}: "
        f"{row['why']}."
        for row in table["rows"]
        if row["why"] and row["quartiles"][0] >= GAIN
    ]


def _no_gain_sentences(table: Facts) -> list[str]:
    """A sentence for each way that gives no speed."""
    return [_no_speed(row) for row in table["rows"] if row["quartiles"][0] < GAIN]


def _no_speed(row: Facts) -> str:
    low, high = row["quartiles"]
    if min(row["promise"], row["faster"]) >= GAIN:
        return (
            f"No sure speed on {describe_row(row)}: {row['faster']:.2f} times, but {low:.2f} to {high:.2f} "
            f"between rounds; "
            f"measure again, with more --rounds."
        )
    # What FLOPs promise anything at all was cut, or its zeros are left out: these are not multiplied.
    few = f"FLOPs promise no more than {row['promise']:.2f}"
    because = (row["why"] or few) if row["promise"] > 1 else "zeros are multiplied like anything else"
    return f"No speed on {describe_row(row)}, {row['faster']:.2f} times: {because}."


def describe_row(row: Facts) -> str:
    """A row's backend and form, as in sentences."""
    return f"{row['label']}, {row['form']}"


def format_megabytes(size: float) -> str:
    """Bytes in words.

    >>> format_megabytes(45_234_000), format_megabytes(2_500)
    ('45.2 MB', '2.5 kB')
    """
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def format_milliseconds(seconds: float) -> str:
    """A short time in words.

    >>> format_milliseconds(0.1234), format_milliseconds(0.0012), format_milliseconds(2.5)
    ('123 ms', '1.20 ms', '2500 ms')
    """
    return f"{1e3 * seconds:.2f} ms" if seconds < 0.01 else f"{1e3 * seconds:.0f} ms"
