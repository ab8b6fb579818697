"""Patterns: what falls together (one weight, a block, a row, a column)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsesoup.errors import UserError


@dataclass(frozen=True)
class Block:
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

    def tile(self, shape: Sequence[int], name: str = "a weight") -> tuple[int, int]:
        """(rows, cols) of a tile in a matrix of this shape; ValueError if the tiles do not fill it."""
        if len(shape) != 2:
            raise UserError(f"a block tiles matrices only, {name} has shape {tuple(shape)}")
        rows, cols = self.rows or shape[0], self.cols or shape[1]
        if shape[0] % rows or shape[1] % cols:
            raise UserError(f"a {rows}x{cols} block does not tile {name} of shape {tuple(shape)}")
        return rows, cols

    def total(self, values: Tensor, name: str = "a weight") -> Tensor:
        """Sum of the values in each tile, [out / rows, in / cols]."""
        rows, cols = self.tile(values.shape, name)
        return values.reshape(values.shape[0] // rows, rows, values.shape[1] // cols, cols).sum(dim=(1, 3))

    def spread(self, groups: Tensor, shape: Sequence[int]) -> Tensor:
        """The value of each tile at all of its weights, [out, in]."""
        rows, cols = self.tile(shape)
        return groups.repeat_interleave(rows, 0).repeat_interleave(cols, 1)


Element, Row, Column = Block(1, 1), Block(1, 0), Block(0, 1)
