"""Linear layers with weights stored sparsely, for torch's CPU kernels."""

import copy
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsesoup.core.errors import UserError
from sparsesoup.hub.models.prunable import find_prunable

BLOCK = 32  # side of a stored block of BSR
Kind = Literal["csr", "bsr"]


class SparseLinear(nn.Module):
    """A linear layer with a weight [out, in] in CSR or BSR.

    Args:
        linear: the dense layer.
        kind: csr stores the nonzero values, bsr the 32 x 32 blocks with any nonzero value.
    """

    def __init__(self, linear: nn.Linear, kind: Kind) -> None:
        super().__init__()
        weight = linear.weight.detach()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warning that its sparse kernels are in beta
            self.weight = weight.to_sparse_csr() if kind == "csr" else weight.to_sparse_bsr((BLOCK, BLOCK))
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        # The sparse factor is on the left: torch's own order, with it on the right, is slower.
        found = (self.weight @ x.reshape(-1, x.shape[-1]).t()).t()
        found = found if self.bias is None else found + self.bias
        return found.reshape(*x.shape[:-1], -1)


def stored_values(weight: Tensor, kind: Kind) -> int:
    """Return the number of values that the sparse form of a weight [out, in] stores; all if it has no such form."""
    if kind == "csr":
        return int(torch.count_nonzero(weight))
    rows, columns = weight.shape
    if rows % BLOCK or columns % BLOCK:
        return weight.numel()
    blocks = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK).abs().amax(dim=(1, 3))
    return int(torch.count_nonzero(blocks)) * BLOCK * BLOCK


def nonzeros_by_layer(model: Any, kind: Kind) -> dict[str, int]:
    """Return prunable linear layer -> number of stored values, for layers with any zeros to leave out.

    Raises: UserError if there are none.
    """
    found = {}
    for target in find_prunable(model):
        path, _, own = target.rpartition(".")
        linear = model.get_submodule(path)
        if own != "weight" or not isinstance(linear, nn.Linear):
            continue  # such as a Conv1D of GPT-2, or a stack of experts
        if (count := stored_values(linear.weight.detach(), kind)) < linear.weight.numel():
            found[path] = count
    if not found:
        raise UserError(f"no nn.Linear has {'zeros' if kind == 'csr' else f'a {BLOCK} x {BLOCK} block of zeros'}")
    return found


def sparse_model(model: Any, kind: Kind) -> Any:
    """Return a copy whose prunable linear layers are stored sparsely.

    Raises: UserError if no layer has zeros to leave out.
    """
    names = nonzeros_by_layer(model, kind)
    made = copy.deepcopy(model)
    for name in names:
        made.set_submodule(name, SparseLinear(made.get_submodule(name), kind))
    return made
