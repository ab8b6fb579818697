"""Dense export: the stock directory with pruned weights set to zero."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sparsesoup.core.ticket import save_masks
from sparsesoup.exports.compact import inherited_facts
from sparsesoup.exports.low_rank import merged_model
from sparsesoup.exports.source import INDEX, WEIGHTS, PreparedExport, PrunedSource, masks_from_zeros, size_of
from sparsesoup.hub.models.loading import LOW_RANK
from sparsesoup.hub.quiet import quiet_libraries


@dataclass(frozen=True, kw_only=True)
class DenseFormat:
    """The folder for `from_pretrained` of transformers, with pruned weights exactly zero and the masks beside it."""

    def make(self, source: PrunedSource) -> PreparedExport:
        """Return the export, after checking that pruned weights are zero."""
        if source.is_low_rank:
            return _merged_export(source)
        source.check_zeros()
        masks = source.masks or masks_from_zeros(source.model)
        facts = {k: v for k, v in source.facts.items() if k not in ("kept", "total", "format")}

        def save(folder: Path) -> None:
            source.copy_other_files(folder)
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
            layers=kept_by_layer(source),
            load=loading_code(source),
            notes=["zeros alone make a model neither smaller nor faster: see --to packed and --to compact"],
            facts=inherited_facts(source.folder),
        )


def _merged_export(source: PrunedSource) -> PreparedExport:
    """Return the export of a model of low rank, in stock shapes."""
    model, ranks = merged_model(source.model), getattr(source.model.config, LOW_RANK)["ranks"].items()

    def save(folder: Path) -> None:
        source.copy_other_files(folder, config=False)
        with quiet_libraries():
            model.save_pretrained(folder)
        save_masks(folder / "pruning", masks_from_zeros(model), source.facts)

    return PreparedExport(
        save=save, size=size_of(model.named_parameters()),
        layers=[{"layer": name, "rank": [rank, min(model.get_submodule(name).weight.shape)]} for name, rank in ranks],
        load=f"transformers.{type(model).__name__}.from_pretrained(folder)",
        notes=["two thin layers each were merged into one: see --to low-rank"],
    )  # fmt: skip


def kept_by_layer(source: PrunedSource) -> list[dict[str, Any]]:
    """Return a row per layer: the number of weights in its matrices, and of nonzero ones."""
    counts: dict[str, list[int]] = {}
    for name, tensor in source.iterate_tensors():
        if layer := source.layer_of(name, tensor.shape):
            row = counts.setdefault(layer, [0, 0])
            row[0] += tensor.numel()
            row[1] += int(torch.count_nonzero(tensor))
    return [{"layer": layer, "weights": counts[layer]} for layer in sorted(counts, key=_numbers_as_such)]


def _numbers_as_such(name: str) -> list[tuple[bool, int, str]]:
    """Return a key by which layer.10 comes after layer.9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def loading_code(source: PrunedSource) -> str:
    """Return the line of Python that loads a folder with the layers of the source."""
    if source.is_module:
        return f'safetensors.torch.load_model(module, folder + "/{WEIGHTS}")'
    if source.is_low_rank:
        return "sparsesoup.load_low_rank(folder)"
    if source.has_own_widths:
        return "sparsesoup.load_compact(folder)"
    kind = type(source.model)
    home = "transformers" if kind.__module__.startswith("transformers.") else kind.__module__
    return f"{home}.{kind.__name__}.from_pretrained(folder)"
