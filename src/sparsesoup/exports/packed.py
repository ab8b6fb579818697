"""One bit a weight and the values of those that are left: a small file, lossless, that is unpacked to be used."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import write_table
from sparsesoup.core.ticket import FACTS
from sparsesoup.exports import bitmask_codec as coding
from sparsesoup.exports.base import PreparedExport
from sparsesoup.exports.compact import inherited_facts
from sparsesoup.exports.dense import kept_by_layer
from sparsesoup.exports.source import ModelSize, PrunedSource, forget_masks, in_encoder
from sparsesoup.hub.models.loading import load_as_saved

KINDS = {"same": None, "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class PackedFormat:
    """A bit mask and the surviving values, with a checksum a tensor; `sparsesoup.load_packed` rebuilds the stock model.

    Args:
        dtype: same keeps every bit of the values, bf16 rounds those of matrices; they come back in their own type.
        zstd: compress what was packed, which costs some time.
    """

    dtype: Literal["same", "bf16"] = "same"
    zstd: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in KINDS:
            raise UserError(f"dtype must be {' or '.join(KINDS)}, got {self.dtype!r}")

    def make(self, source: PrunedSource) -> PreparedExport:
        """Packed in memory; what the masks prune is zero."""
        kind = coding.TYPES.get(KINDS[self.dtype] or "")
        _ = source.model  # which is refused where its weights are not those of its masks
        packed = [
            (name, *coding.encode_tensor(name, t, kind if t.dim() > 1 else None, self.zstd))
            for name, t in source.iterate_tensors()
        ]
        encoder = sum(
            part.nbytes for name, entry, parts in packed if in_encoder(name, entry["shape"]) for part in parts.values()
        )
        before = source.model_size()

        def save(folder: Path) -> None:
            source.copy_beside(folder)
            forget_masks(folder)
            coding.write_packed(folder / coding.FILE, packed)
            (folder / "pruning").mkdir(exist_ok=True)
            write_table(folder / "pruning" / FACTS, source.facts)

        notes = ["it is unpacked to be used: it travels light and computes as the dense model does"]
        if kind is not None:
            notes.append("values were rounded to bf16: check predictions against the source")
        size = ModelSize(0, encoder, before.parameters, before.nonzero)
        return PreparedExport(
            save=save,
            size=size,
            layers=kept_by_layer(source.iterate_tensors()),
            load="sparsesoup.load_packed(folder)",
            notes=(*notes,),
            facts=inherited_facts(source.folder),
        )


def load_packed(folder: str | Path) -> Any:
    """The model that was packed, rebuilt as the stock class of transformers, its zeros exact.

    Every tensor is verified against its checksum first.

    Args:
        folder: what `sparsesoup export --to packed` wrote.
    Returns: the model, in evaluation mode, in the type that it had before packing.
    Raises: UserError if the file is missing, truncated or changed; it names the first such tensor.

    >>> model = load_packed("packed-model")  # doctest: +SKIP
    """
    return load_as_saved(str(folder), dict(coding.read_packed(Path(folder)))).eval()
