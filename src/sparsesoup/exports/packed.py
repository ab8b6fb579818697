"""Packed export: one bit per weight and the nonzero values; a small lossless file that is unpacked for use."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_model, save_file
from torch import nn

from sparsesoup.core.errors import UserError, one_line
from sparsesoup.core.files import write_table
from sparsesoup.core.ticket import FACTS
from sparsesoup.exports import bitmask_codec as codec
from sparsesoup.exports.compact import inherited_facts
from sparsesoup.exports.dense import kept_by_layer
from sparsesoup.exports.source import PreparedExport, PrunedSource, forget_masks
from sparsesoup.hub.models.checkpoint import WEIGHTS
from sparsesoup.hub.models.loading import load_as_saved

KINDS = {"same": None, "bf16": torch.bfloat16}  # setting -> type that values are rounded to


@dataclass(frozen=True, kw_only=True)
class PackedFormat:
    """A bit mask and the nonzero values, with a checksum per tensor; `sparsesoup.load_packed` rebuilds the stock model.

    Args:
        dtype: same keeps all values exactly, bf16 rounds those of matrices; they are unpacked in their own type.
        zstd: compress the packed data, which takes some time.
    """

    dtype: Literal["same", "bf16"] = "same"
    zstd: bool = False

    def make(self, source: PrunedSource) -> PreparedExport:
        """Return the packed model in memory; pruned weights are zero."""
        kind = KINDS[self.dtype]
        source.check_zeros()
        packed = [
            (name, *codec.encode_tensor(name, t, kind if t.dim() > 1 else None, self.zstd))
            for name, t in source.iterate_tensors()
        ]
        matrices = [parts for name, entry, parts in packed if source.layer_of(name, entry["shape"])]
        encoder = sum(part.nbytes for parts in matrices for part in parts.values())

        def save(folder: Path) -> None:
            source.copy_other_files(folder)
            if not source.is_module:
                forget_masks(folder)
            codec.write_packed(folder / codec.FILE, packed)
            (folder / "pruning").mkdir(exist_ok=True)
            write_table(folder / "pruning" / FACTS, source.facts)

        notes = ["unpack it before use: the file is small, but it computes like the dense model"]
        if kind is not None:
            notes.append("values were rounded to bf16: check predictions against the source")
        return PreparedExport(
            save=save,
            size=source.model_size() | {"encoder": encoder},
            layers=kept_by_layer(source),
            load=f"sparsesoup.load_packed(folder{', module' * source.is_module})",
            notes=notes,
            facts=inherited_facts(source.folder),
        )


def load_packed(folder: str | Path, module: nn.Module | None = None) -> Any:
    """Load a packed model as the stock class of transformers, with exact zeros.

    Every tensor is first verified against its checksum.

    Args:
        folder: an export of `sparsesoup export --to packed`.
        module: for a model that is not from transformers: a module of its class, into which the weights are loaded.
    Returns: the model, in evaluation mode, in its type before packing; `module` if it is given.
    Raises: UserError if the file is missing, truncated or changed, when it names the first changed tensor; or if the
        module does not fit.

    >>> model = load_packed("packed-model")  # doctest: +SKIP
    """
    tensors = dict(codec.read_packed(Path(folder)))
    if module is None:
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"{folder} is of a module that is none of transformers'; call load_packed(folder, module)")
        return load_as_saved(str(folder), tensors).eval()
    with tempfile.TemporaryDirectory() as temporary:  # which knows weights that share memory and are there once
        save_file(tensors, file := f"{temporary}/{WEIGHTS}")
        try:
            load_model(module, file)
        except RuntimeError as error:
            raise UserError(f"{folder} does not fit this {type(module).__name__}: {one_line(error)[:200]}") from error
    return module.eval()
