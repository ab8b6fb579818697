"""The only top-k of the library: scores and a sparsity in, masks out."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from sparsesoup.core.allocation import budget_per_scope, clip_to_available, largest_remainder
from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Block, CoupledGroups, Element, Pattern
from sparsesoup.core.masks import Masks
from sparsesoup.core.topk import kth_largest, topk_exact
from sparsesoup.core.topk_passes import map_in_threads
from sparsesoup.core.topk_rows import best_of_groups, best_of_rows, rank_order

Scores = Mapping[str, Tensor]  # parameter name -> [out, in], higher = keep
Scope = Literal["global", "tensor", "erk", "row", "1:4", "2:4", "4:8"]
Competition = Literal["global", "tensor", "erk", "row"]  # the scopes that take any sparsity
GROUPS = {"1:4": (1, 4), "2:4": (2, 4), "4:8": (4, 8)}  # scope -> (kept, group size along a row)


def topk_masks(
    scores: Scores,
    sparsity: float,
    *,
    then: Scores | None = None,
    pattern: Pattern = Element,
    scope: Scope = "global",
    within: Masks | None = None,
) -> Masks:
    """Return the masks that keep the best-scored weights.

    Args:
        scores: name -> tensor [out, in]; higher = keep.
        sparsity: share of all weights in `scores` to prune, in [0, 1).
        then: secondary scores that break ties; default none.
        pattern: the weights kept or pruned as one group: a tile, or coupled groups that name every parameter once; a
            group's score is the mean over its weights in `within`. Spared groups are always kept and not ranked.
        scope: the ranking scope: all weights; each tensor (or coupled group); each tensor at Erdos-Renyi densities
            (Evci et al. 2020); each row; or N:M, each four (eight) consecutive weights of a row, at a fixed
            sparsity.
        within: keep only among these; default all.
    Returns: name -> bool [out, in]; round((1 - sparsity) * n) True in total. With groups larger than one weight: the
        best groups that fit into that number.
    Raises: ValueError if a score is NaN, the request is impossible, or `within` is already sparser than requested.

    Ties go to the higher `then`, the earlier name, the lower index, so the result is the same on every device.

    >>> topk_masks({"w": torch.tensor([[3.0, 1.0, 2.0, 0.0]])}, 0.5)["w"].tolist()
    [[True, False, True, False]]
    """
    _check_scores(scores, sparsity, then, scope, within)
    check_scope(scope, sparsity, pattern)
    if pattern != Element:
        return _topk_of_groups(scores, sparsity, then, _coupled_groups(scores, pattern), scope, within)
    if scope == "row" or scope in GROUPS:
        return _topk_per_row(scores, sparsity, then, scope, within)
    alive = _count_alive(scores, within)
    masks: Masks = {}
    for names, budget in budget_per_scope(scores, sparsity, scope, alive):
        available = sum(alive[name] for name in names)
        if budget > available:
            what = f"{names[0]}: " if len(names) < len(scores) else ""
            size = sum(scores[n].numel() for n in names)
            raise UserError(
                f"{what}cannot prune to sparsity {1 - budget / size:.4f}: "
                f"the masks given are already at {1 - available / size:.4f}"
            )
        second, live = ([table[n] for n in names] if table else None for table in (then, within))
        best = topk_exact([scores[n] for n in names], budget, then=second, alive=live, available=available)
        masks |= zip(names, best, strict=True)
    return {name: masks[name] for name in scores}


def check_sparsity(sparsity: object) -> None:
    """Raise a UserError unless a sparsity is the share of weights removed, in [0, 1)."""
    if not isinstance(sparsity, Real) or isinstance(sparsity, bool):
        raise UserError(
            f"the share of weights removed is a number in [0, 1), got {sparsity!r}; for 90 % set 0.9", "sparsity"
        )
    share = float(sparsity)
    if not 0.0 <= share < 1.0:
        hint = f"for {share:g} % set {share / 100:g}" if 1.0 < share < 100.0 else "for 90 % set 0.9"
        raise UserError(f"the share of weights removed is in [0, 1), got {share:g}; {hint}", "sparsity")


def fixed_sparsity(scope: str) -> float | None:
    """Return the only sparsity of an N:M scope; None for scopes that take any sparsity.

    >>> fixed_sparsity("2:4"), fixed_sparsity("1:4"), fixed_sparsity("global")
    (0.5, 0.75, None)
    """
    if scope not in GROUPS:
        return None
    count, width = GROUPS[scope]
    return 1 - count / width


def check_scope(scope: str, sparsity: float, pattern: Pattern = Element) -> None:
    """Raise a UserError if an N:M scope is combined with another sparsity or with groups."""
    only = fixed_sparsity(scope)
    if pattern != Element and (scope == "row" or only is not None):
        raise UserError(f"scope {scope} chooses single weights; a pattern of blocks needs scope global, tensor or erk")
    if only is not None and sparsity != only:
        raise UserError(f"scope {scope} fixes the sparsity at {only}, got {sparsity}; give that or none")


def check_rows(scope: str, shape: Sequence[int], name: str) -> int:
    """Return the number of consecutive weights ranked together; raise a UserError if they do not fill a row."""
    width = GROUPS[scope][1] if scope in GROUPS else shape[-1]
    if shape[-1] % width:
        raise UserError(f"scope {scope} needs rows of a multiple of {width} weights, {name} has {tuple(shape)}")
    return width


def _check_scores(scores: Scores, sparsity: float, then: Scores | None, scope: str, within: Masks | None) -> None:
    check_sparsity(sparsity)
    if scope not in get_args(Scope):
        raise UserError(f"unknown scope {scope!r}; allowed: {', '.join(get_args(Scope))}")
    for what, other in (("then", then), ("within", within)):
        if other is not None and other.keys() != scores.keys():
            raise UserError(f"scores and `{what}` name different parameters: {sorted(scores.keys() ^ other.keys())}")
    real = [(name, s) for table in (scores, then or {}) for name, s in table.items() if s.is_floating_point()]
    # A sum is fast and NaN wherever a score is; infinities of both signs give NaN too. All are read back at once.
    if real and bool(torch.stack([s.sum(dtype=torch.float32) for _, s in real]).isnan().any()):
        for name, s in real:
            if bool(s.isnan().any()):
                raise UserError(f"score of {name} has NaN")


def _count_alive(scores: Scores, within: Masks | None) -> dict[str, int]:
    """Return the number of weights to choose among per tensor, read back at once."""
    if not within:
        return {name: s.numel() for name, s in scores.items()}
    counts = torch.stack([torch.count_nonzero(within[name]) for name in scores]).tolist()
    return dict(zip(scores, counts, strict=True))


def _topk_per_row(scores: Scores, sparsity: float, then: Scores | None, scope: str, within: Masks | None) -> Masks:
    """Keep the best weights of each row, or of each few consecutive weights of a row."""
    sizes = [s.numel() for s in scores.values()]
    goal = round((1.0 - sparsity) * sum(sizes))
    ends = [round(goal * seen / sum(sizes)) for seen in accumulate(sizes)]
    alive = [*_count_alive(scores, within).values()]
    budgets = clip_to_available([end - begin for begin, end in pairwise([0, *ends])], alive)

    def work(item: tuple[str, int]) -> Tensor:
        name, budget = item
        return _best_of_rows(name, scores[name], budget, scope, then, within)

    return dict(zip(scores, map_in_threads(work, [*zip(scores, budgets, strict=True)], least=1), strict=True))


def _best_of_rows(
    name: str, score: Tensor, budget: int, scope: str, then: Scores | None, within: Masks | None
) -> Tensor:
    width = check_rows(scope, score.shape, name)
    rows, alive = score.reshape(-1, width), None if within is None else within[name].reshape(-1, width)
    counts = budget // len(rows) + (torch.arange(len(rows), device=score.device) < budget % len(rows)).long()
    if alive is not None and bool((alive.sum(1) < counts).any()):
        row = int((alive.sum(1) < counts).nonzero()[0])
        raise UserError(f"row {row} of {name} cannot keep {int(counts[row])} weights: `within` has fewer left")
    second = then[name].reshape(-1, width) if then else None
    if scope in GROUPS and budget % len(rows) == 0:
        return best_of_groups(rows, budget // len(rows), second, alive).view(score.shape)
    return best_of_rows(rows, counts, second, alive).view(score.shape)


def score_thresholds(
    scores: Scores, sizes: Mapping[str, int], sparsity: float, scope: Scope = "global"
) -> dict[str, Tensor]:
    """Return the smallest kept score per tensor: `score >= threshold` is the mask of `topk_masks`, up to ties.

    At least one group per ranking scope is kept. Scope tensor may round a tensor's share the other way.

    Args:
        scores, sizes: name -> the scores of its groups, of any shape, and the weights in each of them.
        scope: global, or tensor: one threshold per tensor.
    """
    pools = [list(scores)] if scope == "global" else [[name] for name in scores]
    found: dict[str, Tensor] = {}
    for names in pools:
        budget = round((1.0 - sparsity) * sum(scores[n].numel() * sizes[n] for n in names))
        if len({sizes[n] for n in names}) == 1:
            count = max(1, budget // sizes[names[0]])
            value = kth_largest([scores[n] for n in names], count)
        else:
            flat = torch.cat([scores[n].flatten() for n in names])
            order = flat.sort(descending=True, stable=True)
            size = torch.cat([torch.full((scores[n].numel(),), sizes[n]) for n in names]).to(flat.device)
            fits = size[order.indices].cumsum(0) <= budget
            value = order.values[max(int(fits.sum()) - 1, 0)]
        found |= dict.fromkeys(names, value)
    return found


def _coupled_groups(scores: Scores, pattern: Pattern) -> tuple[CoupledGroups, ...]:
    if isinstance(pattern, Block):
        return tuple(CoupledGroups(((name, pattern),)) for name in scores)
    named = [name for coupled in pattern for name, _ in coupled.members]
    if sorted(named) != sorted(scores):
        raise UserError(
            f"coupled groups name every scored parameter once, not so {min({*named} ^ {*scores}, default=named[0])}"
        )
    return pattern


def _topk_of_groups(
    scores: Scores,
    sparsity: float,
    then: Scores | None,
    groups: tuple[CoupledGroups, ...],
    scope: str,
    within: Masks | None,
) -> Masks:
    shapes = {n: s.shape for n, s in scores.items()}
    weight = {n: (within[n] if within else torch.ones_like(s, dtype=torch.bool)) for n, s in scores.items()}
    masks: Masks = {n: weight[n] for coupled in groups if coupled.spared for n, _ in coupled.members}
    goal = check_enough_prunable(groups, {n: s.numel() for n, s in scores.items()}, sparsity)
    groups = tuple(coupled for coupled in groups if not coupled.spared)
    for coupled in groups:
        coupled.num_groups(shapes)
    floats = {n: w.to(torch.float32) for n, w in weight.items()}
    size = [coupled.sum_over_groups(floats) for coupled in groups]
    for chosen, budget in _coupled_pools(groups, scores, goal, sparsity, scope, size):
        flat = torch.cat([size[i] for i in chosen])
        # The kept weights may exceed the budget by part of a group: at the boundary of an earlier selection.
        if budget - float(flat.sum()) >= max(groups[i].group_size(shapes) for i in chosen):
            raise UserError(f"cannot prune to sparsity {sparsity:.4f}: the masks given are already sparser")
        main = torch.cat([_mean_over_groups(scores, groups[i], weight, size[i]) for i in chosen])
        second = torch.cat([_mean_over_groups(then, groups[i], weight, size[i]) for i in chosen]) if then else None
        order = rank_order(main, second, flat > 0)
        stays = torch.zeros_like(flat, dtype=torch.bool)
        stays[order] = flat[order].double().cumsum(0) <= budget + 1e-6
        for i, part in zip(chosen, stays.split([len(size[i]) for i in chosen]), strict=True):
            masks |= {n: m & weight[n] for n, m in groups[i].expand_to_weights(part, shapes).items()}
    return {name: masks[name] for name in scores}


def check_enough_prunable(groups: tuple[CoupledGroups, ...], sizes: Mapping[str, int], sparsity: float) -> int:
    """Return the number of weights to keep in groups that are not spared; raise a UserError if they hold too few."""
    total, spared = (
        sum(sizes.values()),
        sum(sizes[n] for coupled in groups if coupled.spared for n, _ in coupled.members),
    )
    goal = round((1.0 - sparsity) * total) - spared
    if goal < 0:
        raise UserError(
            f"cannot prune to sparsity {sparsity:.4f}: the prunable groups hold {1 - spared / total:.4f} of the "
            f"prunable weights; ask for no more than that, or spare fewer groups"
        )
    return goal


def _coupled_pools(
    groups: tuple[CoupledGroups, ...], scores: Scores, goal: int, sparsity: float, scope: str, size: Sequence[Tensor]
) -> Iterable[tuple[list[int], int]]:
    """Return (coupled groups ranked together, number of weights they keep together)."""
    if scope == "global":
        return [([*range(len(groups))], goal)]
    if scope == "tensor":  # the groups of one matrix, or of the matrices that are coupled
        areas = [sum(scores[n].numel() for n, _ in coupled.members) for coupled in groups]
        counts = largest_remainder([goal * area / sum(areas) for area in areas], goal)
        return [([i], count) for i, count in enumerate(counts)]
    if len(groups) < len(scores):
        raise UserError(
            f"scope {scope} gives every matrix its own share, which groups that span several matrices cannot keep to"
        )
    alive = {coupled.members[0][0]: float(s.sum()) for coupled, s in zip(groups, size, strict=True)}
    index = {coupled.members[0][0]: i for i, coupled in enumerate(groups)}
    return [
        ([index[name] for name in names], count) for names, count in budget_per_scope(scores, sparsity, scope, alive)
    ]


def _mean_over_groups(table: Scores, coupled: CoupledGroups, weight: Masks, size: Tensor) -> Tensor:
    # At least float32, where a sum of half-precision scores does not overflow; -inf * 0 would be NaN.
    exact = {n: table[n] if table[n].dtype == torch.float64 else table[n].float() for n, _ in coupled.members}
    return coupled.sum_over_groups({n: s.masked_fill(~weight[n], 0.0) for n, s in exact.items()}) / size.clamp_min(1)
