"""Structured groups: whole rows, columns, heads or units that can be cut out of a model."""

import math

from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Block, Column, CoupledGroups, Element, Pattern, Row, Structure
from sparsesoup.core.masking import check_enough_prunable, check_rows, check_scope, check_sparsity
from sparsesoup.core.targets import Targets, attention_feature_groups, attention_head_groups, feed_forward_groups

PARTS = {"heads": attention_head_groups, "features": attention_feature_groups, "units": feed_forward_groups}


def structured_groups(structure: Structure, targets: Targets) -> tuple[CoupledGroups, ...]:
    """Return the groups of a structure, for `topk_masks`; matrices without that structure are spared.

    Rows are all weights of one output, columns of one input. Features are those of the attention heads, one by one:
    of query and key, and of value and output. Structures that are named together are ranked together.

    Raises: UserError if the model lacks the structure.
    """
    if structure in ("rows", "columns"):
        tiles = {turned: Row if (structure == "rows") != turned else Column for turned in (False, True)}
        return tuple(CoupledGroups(((name, tiles[target.transposed]),)) for name, target in targets.items())
    parts = {word: find(targets) for word, find in PARTS.items() if word in structure}
    if lacking := [word for word, groups in parts.items() if not groups]:
        other = next((word.replace("features", "heads") for word in parts if word not in lacking), "rows")
        # Pruning only the other part would give the sparsity another meaning than requested.
        raise UserError(
            f"this model has no {' and no '.join(lacking)} to prune (heads and features need query, key, value and "
            f"output as matrices of their own, and keys that are not shared; units need two linear maps that are known "
            f"by their names); set --method.structure {other}"
        )
    found = [coupled for groups in parts.values() for coupled in groups]
    covered = {name for coupled in found for name, _ in coupled.members}
    return (*found, *(CoupledGroups(((name, Block(0, 0)),), spared=True) for name in targets if name not in covered))


def block_groups(targets: Targets, pattern: Block) -> tuple[CoupledGroups, ...]:
    """Return a group for every matrix by itself, in tiles of [out, in] whatever its layout.

    Raises: UserError if a tile does not fit.
    """
    turned = Block(pattern.cols, pattern.rows)
    groups = tuple(
        CoupledGroups(((name, turned if target.transposed else pattern),)) for name, target in targets.items()
    )
    for coupled in groups:
        coupled.num_groups({name: target.shape for name, target in targets.items()})
    return groups


def resolve_groups(targets: Targets, structure: Structure, pattern: Block = Element) -> Pattern:
    """Return the groups for `topk_masks`: those of the structure, or tiles of `pattern` if the structure is weights."""
    if structure != "weights":
        return structured_groups(structure, targets)
    return pattern if pattern == Element else block_groups(targets, pattern)


def validate_groups(
    targets: Targets, structure: Structure, sparsity: float, pattern: Block = Element, scope: str = "global"
) -> Pattern:
    """Return the groups of a method, and refuse impossible settings before its first step.

    Args:
        structure: the structure to prune; weights leaves it to `pattern`, the tile to split each matrix into.
        sparsity: the highest sparsity that these groups have to reach.
    Raises: UserError if both structure and pattern are set, if the model lacks the structure, if tiles or N:M groups
        do not fill a matrix, if the scope ranks single weights or fixes another sparsity, or if the prunable groups
        hold fewer weights than are to be pruned.
    """
    if structure == "weights":
        check_scope(scope, sparsity, pattern)
        for name, target in targets.items():
            *others, rows, cols = target.shape
            check_rows(scope, (*others, cols, rows) if target.transposed else target.shape, name)
        return resolve_groups(targets, structure, pattern)
    if pattern != Element:
        raise UserError(
            f"--method.structure and a pattern are mutually exclusive (got {structure} and "
            f"{pattern.rows}x{pattern.cols}); leave one of them out"
        )
    if scope not in ("global", "tensor"):
        raise UserError(
            f"structure {structure} prunes whole groups, scope {scope} does not; set --method.scope global or tensor"
        )
    check_sparsity(sparsity)
    groups = structured_groups(structure, targets)
    check_enough_prunable(groups, {name: math.prod(target.shape) for name, target in targets.items()}, sparsity)
    return groups
