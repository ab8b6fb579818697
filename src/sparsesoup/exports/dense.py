"""Dense export: the stock directory with pruned weights set to zero."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsesoup.core.targets import block_of
from sparsesoup.core.ticket import save_masks
from sparsesoup.exports.compact import inherited_facts
from sparsesoup.exports.source import INDEX, WEIGHTS, PreparedExport, PrunedSource, in_encoder, masks_from_zeros


@dataclass(frozen=True, kw_only=True)
class DenseFormat:
    """The folder for `from_pretrained` of transformers, with pruned weights exactly zero and the masks beside it."""

    def make(self, source: PrunedSource) -> PreparedExport:
        """Return the export, after checking that pruned weights are zero."""
        masks = source.masks or masks_from_zeros(source.model)
        facts = {k: v for k, v in source.facts.items() if k not in ("kept", "total", "format")}

        def save(folder: Path) -> None:
            source.copy_beside(folder)
            if source.is_packed:
                save_file(dict(source.iterate_tensors()), folder / WEIGHTS, metadata={"format": "pt"})
            else:
                index, files = source.folder / INDEX, source.weight_files()
                for path in [*files, index] if index.is_file() and files != [source.folder / WEIGHTS] else files:
                    shutil.copyfile(path, folder / path.name)
            save_masks(folder / "pruning", masks, facts)

        return PreparedExport(
            save=save,
            size=source.model_size(),
            layers=kept_by_layer(source.iterate_tensors()),
            load=loading_code(source),  # loads the model, which fails if its weights do not match its masks
            notes=["zeros alone make a model neither smaller nor faster: see --to packed and --to compact"],
            facts=inherited_facts(source.folder),
        )


def kept_by_layer(tensors: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Return a row per layer: the number of weights in its matrices, and of nonzero ones."""
    counts: dict[str, list[int]] = {}
    for name, tensor in tensors:
        if in_encoder(name, tensor.shape):
            row = counts.setdefault(block_of(name), [0, 0])
            row[0] += tensor.numel()
            row[1] += int(torch.count_nonzero(tensor))
    by_number = sorted(counts, key=lambda layer: (layer.rpartition(".")[0], int(layer.rpartition(".")[2])))
    return [{"layer": layer, "weights": counts[layer]} for layer in by_number]


def loading_code(source: PrunedSource) -> str:
    """Return the line of Python that loads a folder with the layers of the source."""
    if source.has_own_widths:
        return "sparsesoup.load_compact(folder)"
    kind = type(source.model)
    home = "transformers" if kind.__module__.startswith("transformers.") else kind.__module__
    return f"{home}.{kind.__name__}.from_pretrained(folder)"
