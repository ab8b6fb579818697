"""From scores to masks for methods whose scope may be a few neighbours of a row."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsesoup.core.granularity import Element, Pattern
from sparsesoup.core.masking import Scope, fixed_sparsity, topk_masks
from sparsesoup.core.masks import Masks
from sparsesoup.core.targets import to_out_in_layout
from sparsesoup.training.state import TrainState


def select_masks(
    state: TrainState,
    scores: Mapping[str, Tensor],
    sparsity: float,
    *,
    pattern: Pattern = Element,
    scope: Scope = "global",
    within: Masks | None = None,
) -> Masks:
    """What `topk_masks` keeps; with a scope of neighbours also on the way to the sparsity that it fixes.

    A row is one of [out, in], however the matrix is stored, and neighbours are those of a row: the weights that feed
    one output, which is what kernels for 2:4 skip. At a lower sparsity than the scope's each few lose only what the
    scope would take from them, the worst of all matrices first; so a method that prunes in steps ends at exactly N:M.

    Args:
        state: whose weights are scored; it knows how they are stored.
        scores, sparsity, pattern, scope, within: as `topk_masks` takes them.
    Raises: UserError as `topk_masks` does.
    """
    only = fixed_sparsity(scope)
    if only is None and scope != "row":
        return topk_masks(scores, sparsity, pattern=pattern, scope=scope, within=within)
    turned, inside = (
        to_out_in_layout(scores, state.targets),
        to_out_in_layout(within, state.targets) if within else None,
    )
    masks = topk_masks(
        turned, sparsity if only is None else max(only, sparsity), pattern=pattern, scope=scope, within=inside
    )
    if only is not None and sparsity < only:
        last = {name: mask.to(torch.uint8) for name, mask in masks.items()}
        masks = topk_masks(last, sparsity, then=turned, within=inside)
    return to_out_in_layout(masks, state.targets)
