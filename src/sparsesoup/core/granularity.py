"""Patterns: the weights pruned as one group (one weight, a block, a row, a column, or bands of several matrices)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.core.settings import TypedSettings


@dataclass(frozen=True)
class Block(TypedSettings):
    """Tiles of `rows` x `cols` weights that are kept or pruned together; Block(1, 1) is one weight.

    Args:
        rows: height of a tile along the output side; 0 means the whole side.
        cols: width of a tile along the input side; 0 means the whole side.
    """

    rows: int = 1
    cols: int = 1

    def __post_init__(self) -> None:
        if self.rows < 0 or self.cols < 0:
            raise UserError(f"a block has sides of 0 (whole) or more, got {self.rows}x{self.cols}")

    def tile_shape(self, shape: Sequence[int], name: str = "a weight") -> tuple[int, int]:
        """Return (rows, cols) of a tile in a matrix of this shape; raise a ValueError if the tiles do not fill it.

        Single weights also fill a stack of matrices.
        """
        if self == Element:
            return 1, 1
        if len(shape) != 2:
            raise UserError(f"a block tiles matrices only, {name} has shape {tuple(shape)}")
        rows, cols = self.rows or shape[0], self.cols or shape[1]
        if shape[0] % rows or shape[1] % cols:
            raise UserError(
                f"a {rows}x{cols} block does not tile {name} of shape {tuple(shape)}; its sides must divide "
                f"those of the matrix, 0 is a whole side"
            )
        return rows, cols

    def sum_over_tiles(self, values: Tensor, name: str = "a weight") -> Tensor:
        """Return the sum of the values in each tile, [out / rows, in / cols]."""
        if self == Element:
            return values
        rows, cols = self.tile_shape(values.shape, name)
        return values.reshape(values.shape[0] // rows, rows, values.shape[1] // cols, cols).sum(dim=(1, 3))

    def expand_to_weights(self, groups: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the value of each tile, given row by row, at all of its weights, [out, in]."""
        if self == Element:
            return groups.view(*shape)
        rows, cols = self.tile_shape(shape)
        return groups.view(shape[0] // rows, -1).repeat_interleave(rows, 0).repeat_interleave(cols, 1)


@dataclass(frozen=True)
class CoupledGroups:
    """Groups that span several matrices: group i is the i-th tile of every member, row by row.

    A feed-forward unit is a row of one matrix and a column of the next; a head is a band of each of four matrices.

    Args:
        members: (parameter name, its tile); all have the same number of tiles.
        spared: True if its groups are always kept, whatever their scores.
    """

    members: tuple[tuple[str, Block], ...]
    spared: bool = False

    def num_groups(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return the number of groups; raise a UserError if a tile does not fit or the members differ."""
        counts = self.tiles_per_member(shapes)
        if len(set(counts.values())) > 1:
            raise UserError(f"coupled matrices have different numbers of tiles: {counts}")
        return next(iter(counts.values()))

    def tiles_per_member(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Return the number of tiles per member; raise a UserError if one does not fit."""
        counts = {}
        for name, block in self.members:
            rows, cols = block.tile_shape(shapes[name], name)
            counts[name] = math.prod(shapes[name]) // (rows * cols)
        return counts

    def group_size(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return the number of weights in one group."""
        tiles = [block.tile_shape(shapes[name], name) for name, block in self.members]
        return sum(rows * cols for rows, cols in tiles)

    def sum_over_groups(self, table: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the values in each group, [groups]."""
        parts = [block.sum_over_tiles(table[name], name).flatten() for name, block in self.members]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def expand_to_weights(self, groups: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Return the value of each group at all of its weights, in every member."""
        return {name: block.expand_to_weights(groups, shapes[name]) for name, block in self.members}


Pattern = Block | tuple[CoupledGroups, ...]  # one tile for all matrices, or the coupled groups of every matrix
# Structures of a model that can be pruned as groups; `structured_groups` of groups.py turns one into a pattern.
Structure = Literal["weights", "rows", "columns", "heads", "units", "heads-and-units", "features-and-units"]

Element, Row, Column = Block(1, 1), Block(1, 0), Block(0, 1)
