"""A ticket: a sparse subnetwork, what it is worth, what it cost and where it came from."""

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
    """What a method returns.

    Args:
        masks: name -> bool [out, in], True = kept; all hard.
        weights: the whole model's state, pruned weights exactly zero.
        metrics: scores on the validation rows; the first one selects.
        cost: the meter, by label.
        notes: what the method saw on its way (agreement of weak masks, the step at which it stopped, ...).
        answers: what stands out in its answers to the validation rows.
    """

    masks: Masks
    weights: dict[str, Tensor] = field(repr=False)
    metrics: dict[str, float]
    cost: dict[str, dict[str, float]]
    notes: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, float] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """The share of prunable weights that is gone."""
        return algebra.sparsity(self.masks)


def save_masks(folder: Path, masks: Masks, facts: Mapping[str, Any]) -> None:
    """Write masks (1 bit a weight) and the facts about them into a folder, each file whole or not at all."""
    shapes = {name: list(m.shape) for name, m in masks.items()}
    # One entry, since safetensors writes several in random order: the same masks are to be the same bytes.
    header = {"sparsesoup": json.dumps({"format": FORMAT, "key_space": "named_parameters", "shapes": shapes})}
    with atomic_write(folder / MASKS) as temporary:
        save_file({name: pack_bits(m) for name, m in masks.items()}, temporary, metadata=header)
    numbers = {"format": FORMAT, "kept": algebra.count_kept(masks), "total": algebra.count_total(masks)}
    write_table(folder / FACTS, {**facts, **numbers, DIGESTS: digests_of(folder, [MASKS])})


def find_mask_folder(path: Path) -> Path:
    """The folder that holds the masks: the path itself, a model folder, or a run directory.

    Raises: UserError if there is none.
    """
    for folder in (path, path / "pruning", path / "model" / "pruning"):
        if (folder / MASKS).is_file():
            return folder
    raise UserError(f"no ticket at {path}: expected a run directory, its model/ or pruning/ folder with {MASKS}")


def load_masks(path: Path) -> tuple[Masks, dict[str, Any]]:
    """(masks, facts) of a saved ticket.

    Raises: UserError if a file is missing, truncated, of another format or not what was written.
    """
    folder = find_mask_folder(Path(path))
    facts = read_table(folder / FACTS, "ticket", "copy it again")
    digests = facts.pop(DIGESTS, {})  # an older version took none
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
            f"weights, "
            f"{FACTS} says {facts.get('kept')} of {facts.get('total')}; copy both again"
        )
    check_digests(folder, digests, FACTS, "copy both again", "ticket")
    return masks, facts


def match_parameter_names(masks: Masks, shapes: Mapping[str, torch.Size], prefix: str = "") -> Masks:
    """The masks under the names of another copy of the model, which may or may not wrap it in a task model.

    Args:
        masks: a ticket's masks.
        shapes: parameter name -> shape of the model they are to fit.
        prefix: name of the wrapped base model inside a task model (`bert`), as transformers' `base_model_prefix`.
    Raises: UserError naming the first parameter that is missing or has another shape.
    """
    fitted: Masks = {}
    for name, mask in masks.items():
        bare = name.removeprefix(f"{prefix}.")
        found = next((n for n in (name, bare, f"{prefix}.{bare}") if n in shapes), None)
        if found is None:
            raise UserError(f"foreign ticket: it prunes {name}, which the model does not have; take its base model")
        if shapes[found] != mask.shape:
            raise UserError(
                f"foreign ticket: its mask of {name} has shape {tuple(mask.shape)}, the model's weight "
                f"{tuple(shapes[found])}; take its base model"
            )
        fitted[found] = mask
    return fitted
