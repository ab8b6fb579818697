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
    ratio, faster, flops = row["flops_ratio"], row["faster"], table["flops"]["dense"]
    if abs(faster / ratio - 1) <= FAR:
        return ""
    if row["quartiles"][0] <= ratio <= row["quartiles"][1]:
        return "the ratio of FLOPs is within the quartiles: the machine was busy, measure again"
    dense, own = _flop_rates(flops / row["dense_seconds"], flops / ratio / row["seconds"])
    if BACKENDS[row["on"]].dense:
        return f"a sparse kernel looks up each value's place: it does {own} of what is left, the dense one {dense}"
    return f"it does {own} as a whole, the dense model {dense}; {_explain_profile(row, table)}"


def _explain_profile(row: Facts, table: Facts) -> str:
    """Name the part of the work that shrank less, or more, than FLOPs, from the time of torch's operations."""
    dense, own, ratio = table["profiles"]["dense"], table["profiles"][row["form"]], row["flops_ratio"]
    slower = row["faster"] < ratio
    lost = {key: (own[key] - dense[key] / ratio) * (1 if slower else -1) for key in ("products", "others")}
    if lost["others"] > max(lost["products"], 0):
        one, other = (format_percent(part["others"] / (part["products"] + part["others"]), 0) for part in (own, dense))
        return (
            f"norms, activations, look-ups and copies, which FLOPs do not count, "
            f"{'did not shrink with them' if slower else 'shrank more than they did'}: in torch they take {one} of "
            f"its time, {other} of the dense model's"
        )
    if lost["products"] > 0:
        flops = table["flops"]["dense"]
        one, other = _flop_rates(flops / ratio / own["products"], flops / dense["products"])
        how = "fill the processor less" if slower else "fit its caches better"
        return f"narrower matrices {how}: in torch {one} of products, {other} dense"
    return "in torch its parts shrank with the FLOPs, so it is this engine's own overhead"


def _flop_rates(*rates: float) -> list[str]:
    return [format_count(rate, "FLOP/s") for rate in rates]


def summary_sentences(table: Facts) -> list[str]:
    """Return plain sentences about size, gains, and backends without a gain."""
    dense, own = table["sizes"]["dense"], table["sizes"]["this"]
    packed, zstd = (format_count(own.get(key, 0), "B") for key in ("packed", "zstd"))
    size = f"Its weights take {format_count(own['raw'], 'B')}, the dense model's {format_count(dense['raw'], 'B')}"
    size += f" ({own['raw'] / dense['raw']:.2f} of it)"
    if "packed" in own:
        size += f"; packed {packed}, with zstd {zstd}"
    gains = [row for row in table["rows"] if row["quartiles"][0] >= GAIN]
    return [
        f"{size}.",
        *([_best_sentence(gains, table)] if table["rows"] else []),
        *(
            f"On {describe_row(row)}, it is {row['faster']:.2f} times as fast, {row['flops_ratio']:.2f} by FLOPs: "
            f"{row['why']}."
            for row in gains
            if row["why"]
        ),
        *(_no_gain_sentence(row) for row in table["rows"] if row["quartiles"][0] < GAIN),
        *(f"{note[0].upper()}{note[1:]}." for note in table["notes"]),
    ]


def _best_sentence(gains: list[Facts], table: Facts) -> str:
    if not gains:
        return "Nothing that was measured makes it faster than the dense model."
    best = min(gains, key=lambda row: row["seconds"])
    sentence = (
        f"Fastest is {describe_row(best)}: {format_milliseconds(best['seconds'])} a batch of {table['batch']}, "
        f"{best['faster']:.2f} times as fast as the dense model there, "
        f"{format_milliseconds(best['dense_seconds'])} ({best['quartiles'][0]:.2f} to "
        f"{best['quartiles'][1]:.2f}; {best['flops_ratio']:.2f} by FLOPs)"
    )
    plain = next((row for row in table["rows"] if row["on"] == "torch"), None)
    if plain and best["on"] != "torch":
        sentence += f" and {plain['dense_seconds'] / best['seconds']:.2f} times as fast as the dense model in torch"
    return f"{sentence}."


def _no_gain_sentence(row: Facts) -> str:
    low, high = row["quartiles"]
    if min(row["flops_ratio"], row["faster"]) >= GAIN:
        return (
            f"No certain speed-up on {describe_row(row)}: {row['faster']:.2f} times, but {low:.2f} to {high:.2f} "
            f"between rounds; measure again, with more --rounds."
        )
    because = "zeros are multiplied like anything else"
    if row["flops_ratio"] > 1:  # units were cut out or zeros are skipped: these are not multiplied
        because = row["why"] or f"it is no more than {row['flops_ratio']:.2f} by FLOPs"
    return f"No speed-up on {describe_row(row)}, {row['faster']:.2f} times: {because}."


def describe_row(row: Facts) -> str:
    """Return a row's backend and form, as used in sentences."""
    return f"{row['label']}, {row['form']}"


def format_milliseconds(seconds: float) -> str:
    """Format a short time.

    >>> format_milliseconds(0.1234), format_milliseconds(0.0123), format_milliseconds(0.0012), format_milliseconds(2.5)
    ('123 ms', '12.3 ms', '1.20 ms', '2500 ms')
    """
    digits = 2 if seconds < 0.01 else 1 if seconds < 0.1 else 0
    return f"{1e3 * seconds:.{digits}f} ms"
