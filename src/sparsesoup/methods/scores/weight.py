"""Scores from the weights alone."""

from collections.abc import Mapping

import torch
from torch import Tensor


def magnitude(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return |w|. Han et al. 2015, sec. 3."""
    return {name: p.detach().abs() for name, p in params.items()}


def random_scores(params: Mapping[str, Tensor], draw: torch.Generator) -> dict[str, Tensor]:
    """Return uniform scores in [0, 1), sampled on the CPU so that every device gets the same."""
    return {name: torch.rand(p.shape, generator=draw).to(p.device) for name, p in params.items()}
