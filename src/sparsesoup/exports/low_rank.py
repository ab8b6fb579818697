"""Low-rank export: two thin layers instead of one, which are faster where the rank is low enough."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsesoup.core.errors import UserError, require
from sparsesoup.core.low_rank import check_linear, low_rank_facts, merge_layers_, rank_at, split_layers_
from sparsesoup.core.masks import sparsity
from sparsesoup.core.ticket import save_masks
from sparsesoup.exports.source import PreparedExport, PrunedSource, largest_difference, masks_from_zeros, size_of
from sparsesoup.hub.models.dummy_inputs import dummy_inputs, forward_outputs
from sparsesoup.hub.models.loading import LOW_RANK, load_as_saved
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.hub.quiet import quiet_libraries

NOISE = 1e-5  # singular values below this share of the largest are rounding, in float32
CLOSE = 1e-3  # largest output difference of an exact factorisation, as a share of the largest output


@dataclass(frozen=True, kw_only=True)
class LowRankFormat:
    """Two thin linear layers instead of each prunable one, by singular value decomposition; both are dense.

    Args:
        compression: weights of a matrix divided by those of its two factors, at least; the outputs change. Default:
            the rank that each matrix has, as `pela` leaves it, at which they do not; the others stay whole.
    """

    compression: float | None = None

    def __post_init__(self) -> None:
        require(self.compression is None or self.compression > 1.0, "compression", "above 1", self.compression)

    def make(self, source: PrunedSource) -> PreparedExport:
        """Return the model of thin layers, compared with the source on random inputs."""
        if source.is_low_rank:
            raise UserError(f"{source.folder} has layers of low rank already; export it --to dense to merge them")
        model = copy.deepcopy(source.model)
        targets = find_prunable(model)
        check_linear(model, targets)
        shapes = {name: target.shape for name, target in targets.items()}
        ranks = {name: self._rank_of(source.model.get_parameter(name)) for name in shapes}
        ranks = {
            name: rank for name, rank in ranks.items() if rank * sum(shapes[name]) < shapes[name][0] * shapes[name][1]
        }
        if not ranks:
            raise UserError("no matrix is of low rank; prune with `sparsesoup prune pela`, or set --compression 2")
        lost = sparsity(source.masks or masks_from_zeros(source.model))
        named = {name.removesuffix(".weight"): rank for name, rank in ranks.items()}
        split_layers_(model, named)
        setattr(model.config, LOW_RANK, {"format": 1, "ranks": named})
        batch = dummy_inputs(source.model)
        found, wanted = ([t.double() for t in forward_outputs(each, batch)] for each in (model, source.model))
        close = CLOSE if self.compression is None else float("inf")
        difference = largest_difference(found, wanted, close, "the thin layers answer otherwise than the model")
        facts = low_rank_facts(
            [shapes[n] for n in ranks], ranks.values(), sum(p.numel() for p in source.model.parameters())
        )
        notes = [
            f"{facts['left']:,} of {facts['weights']:,} weights are left in {len(ranks)} matrices of "
            f"{len(shapes)} ({facts['removed']:.1%} removed)"
        ]
        if self.compression is not None:
            notes.append("the answers are no longer those of the source: check predictions, or train it further")
        if lost:
            notes.append(f"its zeros ({lost:.1%} of the prunable weights) are gone: two factors have none")
        return PreparedExport(
            save=lambda folder: _save_low_rank(model, source, folder),
            size=size_of(model.named_parameters()),
            layers=[{"layer": name, "rank": [min(shapes[f"{name}.weight"]), rank]} for name, rank in named.items()],
            load="sparsesoup.load_low_rank(folder)",
            notes=notes,
            facts={"largest_difference": difference, "low_rank": facts},
        )

    def _rank_of(self, weight: torch.Tensor) -> int:
        if self.compression is not None:
            return rank_at(tuple(weight.shape), self.compression)
        values = torch.linalg.svdvals(weight.detach().double())
        return max(1, int((values > NOISE * values[0]).sum()))


def _save_low_rank(model: Any, source: PrunedSource, folder: Path) -> None:
    source.copy_other_files(folder, config=False)
    with quiet_libraries():
        model.save_pretrained(folder)
    # Its base model has other matrices, so the provenance of the masks is of no use.
    save_masks(folder / "pruning", masks_from_zeros(model), {k: v for k, v in source.facts.items() if k != "origin"})


def merged_model(model: Any) -> Any:
    """Return a copy of a model of low rank in stock shapes."""
    merged = copy.deepcopy(model)
    merge_layers_(merged, getattr(merged.config, LOW_RANK)["ranks"])
    delattr(merged.config, LOW_RANK)
    return merged


def load_low_rank(folder: str | Path) -> Any:
    """Load a model of low rank: the stock class of transformers with two thin layers instead of each split one.

    It can be trained, pruned on (`--model folder`), and merged back (`export --to dense`).

    Args:
        folder: an export of `sparsesoup export --to low-rank`.
    Returns: the model, in evaluation mode.
    Raises: UserError if there is none or its weights do not match its config.json.

    >>> model = load_low_rank("thin-model")  # doctest: +SKIP
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"no model at {folder}: give a folder that `sparsesoup export --to low-rank` wrote")
    model: Any = load_as_saved(str(folder)).eval()
    if not hasattr(model.config, LOW_RANK):
        raise UserError(f"{folder} has no layers of low rank; its export.json says how to load it")
    return model
