"""Structures: what of a model falls together where whole parts of it do, so that they can be cut out of it."""

import math

from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Block, Column, CoupledGroups, Element, Pattern, Row, Structure
from sparsesoup.core.masking import check_enough_prunable, check_rows, check_scope, check_sparsity
from sparsesoup.core.targets import Targets, attention_head_groups, feed_forward_groups


def structured_groups(structure: Structure, targets: Targets) -> tuple[CoupledGroups, ...]:
    """What falls together, for `topk_masks`; matrices that have no such part are spared.

    Args:
        structure: rows (all that makes one output), columns (all that reads one input), heads, units, or
            heads-and-units, which compete with each other. Single weights are no structure.
    Raises: UserError if the model lacks one of them.
    """
    if structure in ("rows", "columns"):
        tiles = {turned: Row if (structure == "rows") != turned else Column for turned in (False, True)}
        return tuple(CoupledGroups(((name, tiles[target.transposed]),)) for name, target in targets.items())
    parts = {
        word: find(targets)
        for word, find in (("heads", attention_head_groups), ("units", feed_forward_groups))
        if word in structure
    }
    if lacking := [word for word, ties in parts.items() if not ties]:
        # Not the other part alone: a sparsity would be one of something else than was asked.
        raise UserError(
            f"this model has no {' and no '.join(lacking)} to prune (heads need query, key, value and output as "
            f"matrices of their own, and keys that are not shared; units need two linear maps that are known by their "
            f"names); say --method.structure {next((word for word in parts if word not in lacking), 'rows')}"
        )
    found = [tie for ties in parts.values() for tie in ties]
    tied = {name for tie in found for name, _ in tie.members}
    return (*found, *(CoupledGroups(((name, Block(0, 0)),), spared=True) for name in targets if name not in tied))


def block_groups(targets: Targets, pattern: Block) -> tuple[CoupledGroups, ...]:
    """Every matrix by itself, in tiles of [out, in] however it is stored; UserError if one does not fit."""
    turned = Block(pattern.cols, pattern.rows)
    ties = tuple(CoupledGroups(((name, turned if target.transposed else pattern),)) for name, target in targets.items())
    for tie in ties:
        tie.num_groups({name: target.shape for name, target in targets.items()})
    return ties


def resolve_groups(targets: Targets, structure: Structure, pattern: Block = Element) -> Pattern:
    """What falls together, for `topk_masks`: the structure, or where it is weights the tile of `pattern`."""
    if structure != "weights":
        return structured_groups(structure, targets)
    return pattern if pattern == Element else block_groups(targets, pattern)


def validate_groups(
    targets: Targets, structure: Structure, sparsity: float, pattern: Block = Element, scope: str = "global"
) -> Pattern:
    """The grouping of a method; what cannot be had is refused before its first step.

    Args:
        structure: what of the model; weights leaves it to `pattern`.
        sparsity: the highest that is going to be asked of these groups.
        pattern: the tile into which each matrix falls apart by itself.
        scope: who will compete with whom.
    Raises: UserError if structure and pattern both say something, if the model has no such structure, if tiles or
        neighbours do not fill a matrix, if the scope chooses single weights or fixes another sparsity, or if what may
        fall holds less than is to be pruned.
    """
    if structure == "weights":
        check_scope(scope, sparsity, pattern)
        for name, target in targets.items():
            *others, rows, cols = target.shape
            check_rows(scope, (*others, cols, rows) if target.transposed else target.shape, name)
        return resolve_groups(targets, structure, pattern)
    if pattern != Element:
        raise UserError(
            f"structure {structure} says what falls together, and so does a pattern of {pattern.rows}x{pattern.cols}; "
            f"leave one of them out"
        )
    if scope not in ("global", "tensor"):
        raise UserError(
            f"structure {structure} takes or leaves whole groups, scope {scope} does not; say --method.scope global or "
            f"tensor"
        )
    check_sparsity(sparsity)
    ties = structured_groups(structure, targets)
    check_enough_prunable(ties, {name: math.prod(target.shape) for name, target in targets.items()}, sparsity)
    return ties
