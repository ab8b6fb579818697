"""What a selection of masks costs beside reading its scores, and its variants beside a plain one."""

import statistics
from functools import partial
from typing import Any

import torch

from pairs import Memory, paired, seconds
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import count_kept, count_votes

SELECTIONS: dict[str, tuple[float, float, dict[str, Any]]] = {  # bound in plain selections, sparsity, settings
    "within": (2.0, 0.9, {}),
    "consensus": (2.5, 0.9, {}),
    "row": (3.0, 0.9, {"scope": "row"}),
    "2:4": (3.0, 0.5, {"scope": "2:4"}),
}


def selection(rounds: int, threads: int) -> dict[str, Any]:
    """`topk_masks` at 90 % over 84,934,656 scores: share of the read bandwidth, and variants in plain selections.

    The read bandwidth is that of the faster of torch's sum and maximum, measured just before and after. Bounds: at
    least 0.12 of it, half the memory of the scores. The time over that of `torch.topk` is reported.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    flat = torch.randn(84_934_656).abs_()
    scores = {f"w{i}": part.view(3072, -1) for i, part in enumerate(flat.split(flat.numel() // 36))}
    count = round(0.1 * flat.numel())
    with Memory() as memory:
        found = count_kept(topk_masks(scores, 0.9))
    if found != count:
        raise SystemExit(f"kept {found} of {flat.numel()} scores, asked for {count}")
    weak = [topk_masks({n: s + 0.3 * torch.randn(s.shape) for n, s in scores.items()}, 0.9) for _ in range(5)]
    votes, half = count_votes(weak), topk_masks(scores, 0.5)
    del weak

    def read() -> float:
        return min(seconds(flat.sum), seconds(flat.max))

    shares = []
    for _ in range(rounds):
        before, taken = read(), seconds(lambda: topk_masks(scores, 0.9))
        shares.append(min(before, read()) / taken)
    table: dict[str, Any] = {
        "share_of_read_bandwidth": statistics.median(shares),
        "bound": 0.12,
        "threads": threads,
        "memory_over_scores": memory.peak / (flat.numel() * flat.element_size()),
        "memory_bound": 0.5,
        "over_torch_topk": paired(lambda: topk_masks(scores, 0.9), lambda: torch.topk(flat, count), 3)["ratio"],
    }
    for name, (bound, sparsity, settings) in SELECTIONS.items():
        first, more = scores, dict(settings)
        if name == "within":
            more["within"] = half
        if name == "consensus":
            first, more = votes, {"then": scores, "within": half}
        result = paired(partial(topk_masks, first, sparsity, **more), partial(topk_masks, scores, 0.9), rounds)
        table[name] = {**result, "bound": bound}
    return table
