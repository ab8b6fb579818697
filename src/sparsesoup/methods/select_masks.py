"""Masks from scores for methods that also support N:M scopes."""

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
    """Return the masks of `topk_masks`; with an N:M scope also below the sparsity of N:M.

    Rows are those of [out, in], however the matrix is stored, and N:M groups are consecutive weights of a row: the
    weights of one output, as 2:4 kernels need. Below the sparsity of the scope, each group loses only weights that the
    scope would prune, the worst of all matrices first; so a method that prunes in steps ends at exactly N:M.

    Args:
        state: holds the scored weights and their layout.
        scores, sparsity, pattern, scope, within: as in `topk_masks`.
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
