"""Features between two matrices that have weights on both sides; and masks without weights that change nothing."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsesoup.core.granularity import Block, CoupledGroups
from sparsesoup.core.masks import Masks
from sparsesoup.core.targets import Targets, attention_head_groups, bias_of, feed_forward_groups, to_out_in_layout

INTO, OUT_OF = ("value", "feed-forward in"), ("output", "feed-forward out")


def kept_features(
    coupled: CoupledGroups, lines: Masks, targets: Targets, sides: tuple[str, ...] = INTO + OUT_OF
) -> Tensor:
    """Return a bool per feature of a head or unit that has a weight on each of the sides, [features].

    Args:
        coupled: coupled groups of an attention or a feed-forward part.
        lines: masks as [out, in].
        sides: roles of the matrices that count.
    """
    found = [lines[n].any(1) for n, _ in coupled.members if targets[n].role in INTO and targets[n].role in sides]
    found += [lines[n].any(0) for n, _ in coupled.members if targets[n].role in OUT_OF and targets[n].role in sides]
    return torch.stack(found).all(0)


def head_densities(value: str, output: str, masks: Masks, targets: Targets) -> Tensor:
    """Return the share of each head's value-output features that have weights on both sides, [heads]."""
    coupled = CoupledGroups(((value, Block()), (output, Block())))
    lines = to_out_in_layout({name: masks[name] for name in (value, output)}, targets)
    return kept_features(coupled, lines, targets).view(-1, targets[value].head).float().mean(1)


def close_empty_heads(masks: Masks, found: Masks, targets: Targets) -> Masks:
    """Return masks without the heads that have no value-output feature in the masks `found`."""
    shapes = {name: target.shape for name, target in targets.items()}
    lines, left = to_out_in_layout(found, targets), dict(masks)
    for coupled in attention_head_groups(targets):
        alive = kept_features(coupled, lines, targets).view(coupled.num_groups(shapes), -1).any(1)
        left |= {name: masks[name] & band for name, band in coupled.expand_to_weights(alive, shapes).items()}
    return left


def close_dead_inputs(masks: Masks, targets: Targets) -> Masks:
    """Return the masks without columns of the matrices out that read a feature without a row in the matrix in."""
    lines, found = to_out_in_layout(masks, targets), dict(masks)
    for coupled in [*attention_head_groups(targets), *feed_forward_groups(targets)]:
        alive = kept_features(coupled, lines, targets, sides=INTO)
        for name, _ in coupled.members:
            if targets[name].role in OUT_OF:
                found[name] = masks[name] & (alive[:, None] if targets[name].transposed else alive)
    return found


def sparsity_with_biases(masks: Masks, targets: Targets, biases: Mapping[str, Tensor]) -> float:
    """Return the share removed of the weights and of the biases of rows, where a row without weights has none."""
    kept = sum(int(torch.count_nonzero(mask)) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    for name, mask in masks.items():
        if bias_of(name) in biases and mask.dim() == 2 and targets[name].role not in OUT_OF:
            rows = mask.any(0 if targets[name].transposed else 1)
            kept, total = kept + int(rows.sum()), total + len(rows)
    return 1.0 - kept / total
