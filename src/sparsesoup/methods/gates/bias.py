"""Gate on the biases of fully masked rows. Lagunas et al. 2021, in its code."""

import torch
from torch import Tensor, nn

from sparsesoup.methods.gates.straight_through import StraightThroughGate


class BiasGate(nn.Module):
    """A parametrization that keeps the bias of each output whose weight row has an open group.

    No gradient flows through the mask: the scores of a row do not learn from its bias.

    Args:
        gate: gate of the weight.
        shape: shape of the weight.
        transposed: the weight is stored [in, out].
    """

    def __init__(self, gate: StraightThroughGate, shape: tuple[int, ...], transposed: bool) -> None:
        super().__init__()
        self._gate = (gate,)  # in a tuple: as a child of this module it would be registered twice
        self._tile = gate.block.tile_shape(shape)
        self._lines, self._across = shape[0] // self._tile[0], 0 if transposed else 1

    def forward(self, bias: Tensor) -> Tensor:
        """Return the bias where its row is open, 0 elsewhere."""
        return bias * self.open_outputs().view(torch.int8)

    def open_outputs(self) -> Tensor:
        """Return a bool per output: True if its row has an open group."""
        gate = self._gate[0]
        grid = gate.open_groups().view(self._lines, -1)
        return grid.any(self._across).repeat_interleave(self._tile[1 - self._across])
