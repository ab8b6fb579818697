"""Packed export: one bit per weight and the nonzero values; a small lossless file that is unpacked for use."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sparsesoup.core.files import write_table
from sparsesoup.core.ticket import FACTS
from sparsesoup.exports import bitmask_codec as codec
from sparsesoup.exports.compact import inherited_facts
from sparsesoup.exports.dense import kept_by_layer
from sparsesoup.exports.source import PreparedExport, PrunedSource, forget_masks, in_encoder
from sparsesoup.hub.models.loading import load_as_saved

KINDS = {"same": None, "bf16": torch.bfloat16}  # setting -> type that values are rounded to


@dataclass(frozen=True, kw_only=True)
class PackedFormat:
    """A bit mask and the nonzero values, with a checksum per tensor; `sparsesoup.load_packed` rebuilds the stock model.

    Args:
        dtype: same keeps every bit of the values, bf16 rounds those of matrices; they are unpacked in their own type.
        zstd: compress the packed data, which takes some time.
    """

    dtype: Literal["same", "bf16"] = "same"
    zstd: bool = False

    def make(self, source: PrunedSource) -> PreparedExport:
        """Return the packed model in memory; pruned weights are zero."""
        kind = KINDS[self.dtype]
        _ = source.model  # fails if the weights do not match the masks
        packed = [
            (name, *codec.encode_tensor(name, t, kind if t.dim() > 1 else None, self.zstd))
            for name, t in source.iterate_tensors()
        ]
        matrices = [parts for name, entry, parts in packed if in_encoder(name, entry["shape"])]
        encoder = sum(part.nbytes for parts in matrices for part in parts.values())

        def save(folder: Path) -> None:
            source.copy_beside(folder)
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
            layers=kept_by_layer(source.iterate_tensors()),
            load="sparsesoup.load_packed(folder)",
            notes=notes,
            facts=inherited_facts(source.folder),
        )


def load_packed(folder: str | Path) -> Any:
    """Load a packed model as the stock class of transformers, with exact zeros.

    Every tensor is first verified against its checksum.

    Args:
        folder: an export of `sparsesoup export --to packed`.
    Returns: the model, in evaluation mode, in its type before packing.
    Raises: UserError if the file is missing, truncated or changed; it names the first changed tensor.

    >>> model = load_packed("packed-model")  # doctest: +SKIP
    """
    return load_as_saved(str(folder), dict(codec.read_packed(Path(folder)))).eval()
