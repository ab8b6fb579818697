"""The model for other engines: without dead heads and units, in float32."""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from sparsesoup.core.errors import UserError
from sparsesoup.exports.compact import find_live_units, shrink_model, widths_by_layer, widths_in
from sparsesoup.exports.source import PrunedSource
from sparsesoup.hub.models.layer_layouts import Widths, layer_widths, prunable_layers


@dataclass(frozen=True)
class ShrunkModel:
    """A model prepared for another engine.

    Args:
        model: on the CPU, in float32, in evaluation mode.
        layers: a row per layer, heads and units before and after; empty if they are unknown.
        notes: what was cut, or why nothing was.
    """

    model: Any
    layers: list[dict[str, Any]]
    notes: tuple[str, ...]


def shrink_if_possible(source: PrunedSource) -> ShrunkModel:
    """Return the model of a source, as narrow as its zeros allow.

    Raises: UserError if the outputs differ from those of the masked model.
    """
    kind = source.model.dtype
    notes = [] if kind == torch.float32 else [f"its weights were {str(kind).removeprefix('torch.')}, here float32"]
    try:
        before = widths_in(source.folder, 0) or layer_widths(source.model)
        plan = {layer.name: find_live_units(layer) for layer in prunable_layers(source.model)}
    except UserError:
        notes.insert(0, "nothing was cut out: heads and units of this family are not known here")
        return ShrunkModel(copy.deepcopy(source.model).cpu().float().eval(), [], (*notes,))
    model = (
        copy.deepcopy(source.model)
        if all(stays.keeps_all for stays in plan.values())
        else shrink_model(source.model, plan)[0]
    )
    rows = widths_by_layer(before, layer_widths(model))
    notes.insert(0, _shrink_note(before, layer_widths(model)))
    return ShrunkModel(model.cpu().float().eval(), rows, (*notes,))


def _shrink_note(before: Widths, after: Widths) -> str:
    if before == after:
        return "nothing was cut out, since all heads and units have weights left: zeros alone make it no faster"
    sums = [sum(row[key] for row in table.values()) for key in ("heads", "units") for table in (after, before)]
    return "{:,} of {:,} heads and {:,} of {:,} feed-forward units are in it".format(*sums)
