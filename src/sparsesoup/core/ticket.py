"""Ticket: a sparse subnetwork with its metrics, cost and provenance."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.files import DIGESTS, atomic_write, check_digests, digests_of, from_json, read_table, write_table
from sparsesoup.core.masks import Masks, pack_bits, unpack_bits

FORMAT = "1"  # of masks.safetensors and ticket.json
MASKS, FACTS = "masks.safetensors", "ticket.json"


@dataclass(frozen=True)
class Ticket:
    """The result of a pruning method.

    Args:
        masks: name -> bool [out, in], True = kept.
        weights: state of the whole model, pruned weights exactly zero.
        metrics: scores on the validation rows; the first one is used for selection.
        cost: costs by label.
        notes: facts recorded by the method (agreement of weak masks, the step at which it stopped, ...).
        answers: statistics of its predictions on the validation rows.
    """

    masks: Masks
    weights: dict[str, Tensor] = field(repr=False)
    metrics: dict[str, float]
    cost: dict[str, dict[str, float]]
    notes: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, float] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """The share of prunable weights removed."""
        return algebra.sparsity(self.masks)


def save_masks(folder: Path, masks: Masks, facts: Mapping[str, Any]) -> None:
    """Write masks (1 bit per weight) and their metadata into a folder, each file atomically."""
    shapes = {name: list(m.shape) for name, m in masks.items()}
    # One header entry, since safetensors writes several in random order: equal masks must give equal bytes.
    header = {"sparsesoup": json.dumps({"format": FORMAT, "key_space": "named_parameters", "shapes": shapes})}
    with atomic_write(folder / MASKS) as temporary:
        save_file({name: pack_bits(m) for name, m in masks.items()}, temporary, metadata=header)
    numbers = {"format": FORMAT, "kept": algebra.count_kept(masks), "total": algebra.count_total(masks)}
    write_table(folder / FACTS, {**facts, **numbers, DIGESTS: digests_of(folder, [MASKS])})


def find_mask_folder(path: Path) -> Path:
    """Return the folder that holds the masks: the path itself, a model folder, or a run directory.

    Raises: UserError if there is none.
    """
    for folder in (path, path / "pruning", path / "model" / "pruning"):
        if (folder / MASKS).is_file():
            return folder
    raise UserError(f"no ticket at {path}: expected a run directory, its model/ or pruning/ folder with {MASKS}")


def load_masks(path: Path) -> tuple[Masks, dict[str, Any]]:
    """Return (masks, metadata) of a saved ticket.

    Raises: UserError if a file is missing, truncated, changed or of another format.
    """
    folder = find_mask_folder(Path(path))
    facts = read_table(folder / FACTS, "ticket", "copy it again")
    digests = facts.pop(DIGESTS, {})  # older versions recorded none
    try:
        with safe_open(folder / MASKS, framework="pt") as file:
            header = from_json((file.metadata() or {}).get("sparsesoup", "{}"))
            if header.get("format") != FORMAT:
                raise UserError(f"{folder / MASKS} has format {header.get('format')}; this version reads {FORMAT}")
            masks = {name: unpack_bits(file.get_tensor(name), shape) for name, shape in header["shapes"].items()}
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"damaged ticket: {folder / MASKS} cannot be read ({error}); copy it again") from error
    if (algebra.count_kept(masks), algebra.count_total(masks)) != (facts.get("kept"), facts.get("total")):
        raise UserError(
            f"damaged ticket: {folder / MASKS} keeps {algebra.count_kept(masks)} of {algebra.count_total(masks)} "
            f"weights, {FACTS} says {facts.get('kept')} of {facts.get('total')}; copy both again"
        )
    check_digests(folder, digests, FACTS, "copy both again", "ticket")
    return masks, facts


def match_parameter_names(masks: Masks, shapes: Mapping[str, torch.Size], prefix: str = "") -> Masks:
    """Return the masks under the names of another copy of the model, which may be wrapped in a task model.

    Args:
        shapes: parameter name -> shape in the other model.
        prefix: name of the wrapped base model inside a task model (`bert`), as transformers' `base_model_prefix`.
    Raises: UserError naming the first parameter that is missing or has another shape.
    """
    fitted: Masks = {}
    for name, mask in masks.items():
        bare = name.removeprefix(f"{prefix}.")
        found = next((n for n in (name, bare, f"{prefix}.{bare}") if n in shapes), None)
        if found is None:
            raise UserError(f"foreign ticket: it prunes {name}, which the model does not have; use its base model")
        if shapes[found] != mask.shape:
            raise UserError(
                f"foreign ticket: its mask of {name} has shape {tuple(mask.shape)}, the model's weight "
                f"{tuple(shapes[found])}; use its base model"
            )
        fitted[found] = mask
    return fitted
