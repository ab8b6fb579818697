"""Compact export: heads and feed-forward units without weights are cut out, which is faster on every machine."""

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import load_table
from sparsesoup.core.low_rank import low_rank_of
from sparsesoup.core.ticket import save_masks
from sparsesoup.exports.bitmask_codec import FILE
from sparsesoup.exports.source import (
    PreparedExport,
    PrunedSource,
    graph_in,
    largest_difference,
    masks_from_zeros,
    size_of,
)
from sparsesoup.hub.models.cut_layers import (
    NARROW,
    KeptParts,
    Widths,
    all_parts,
    full_head_size,
    layer_widths,
    live_parts,
    prune_layer_,
)
from sparsesoup.hub.models.dummy_inputs import dummy_inputs, forward_outputs
from sparsesoup.hub.models.layer_layouts import PrunableLayer, prunable_layers
from sparsesoup.hub.models.loading import COMPACT, class_can_build, compact_table, load_as_saved
from sparsesoup.hub.models.narrow_layers import full_bias, full_weight, used_outputs
from sparsesoup.hub.quiet import quiet_libraries

# Largest output difference from the masked model, as a share of the largest output. Rounding gives 1e-6 in float32, and
# also in float64 where the code takes a softmax in float32; a wrong cut gives 1e-1.
CLOSE, CLOSE_IN_HALF = 1e-3, 1e-1
COUNTS = ("heads", "units")


@dataclass(frozen=True, kw_only=True)
class CompactFormat:
    """Remove attention heads and feed-forward units without weights; their constant output goes into a bias.

    Args:
        stock: cut only what stock classes support: all heads stay, and every layer keeps as many units as the fullest
            one needs.
    """

    stock: bool = False

    def make(self, source: PrunedSource) -> PreparedExport:
        """Return the compact model, compared with the masked one on random inputs."""
        prunable_layers(source.model)  # refuses an unknown model type before anything is copied
        before, plan = _widths_and_plan(source)
        # A compact model that was trained further is written as it is; an unchanged export need not be copied.
        if not source.has_own_widths or (source.folder / "export.json").is_file():
            _check_gain(plan, source)
        if self.stock:
            plan = _uniform_plan(source.model, plan)
        model, difference = shrink_model(source.model, plan)
        own, kind, after = _write_widths(model), type(model).__name__, layer_widths(model)
        if own and self.stock:
            raise UserError(f"{kind} knows no other widths than it has, whatever config.json says; leave --stock out")
        notes = [", ".join(f"{key}: {a:,} of {b:,} left" for key, (b, a) in _summed_widths(before, after).items())]
        notes += _narrow_notes(model)
        if own:
            notes.append("stock classes do not know layers of such widths; --stock keeps to what they do")
        return PreparedExport(
            save=lambda folder: _save_compact(model, source, folder),
            size=size_of(model.named_parameters()),
            layers=widths_by_layer(before, after),
            load="sparsesoup.load_compact(folder)" if own else f"transformers.{kind}.from_pretrained(folder)",
            notes=notes,
            facts={"largest_difference": difference, "stock": not own},
        )


def _save_compact(model: Any, source: PrunedSource, folder: Path) -> None:
    source.copy_other_files(folder, config=False)
    with quiet_libraries():
        model.save_pretrained(folder)
    # Its base model now has other shapes, so the provenance of the masks is of no use.
    save_masks(folder / "pruning", masks_from_zeros(model), {k: v for k, v in source.facts.items() if k != "origin"})


def shrink_if_possible(source: PrunedSource) -> tuple[Any, list[dict[str, Any]], list[str]]:
    """Make the model of a source as narrow as its zeros allow, for other engines, and compare its outputs.

    Returns: the model, on the CPU, in float32, for inference; a row per layer, heads and units before and after, none
        if they are unknown; what was cut, or why nothing was.
    """
    kind = source.model.dtype
    notes = [] if kind == torch.float32 else [f"its weights were {str(kind).removeprefix('torch.')}, here float32"]
    try:
        before, plan = _widths_and_plan(source)
    except UserError:
        model, rows = copy.deepcopy(source.model), []
        what = "nothing was cut out: heads and units of this family are not known here"
    else:
        whole = all(stays.keeps_all for stays in plan.values())
        model = copy.deepcopy(source.model) if whole else shrink_model(source.model, plan)[0]
        rows = widths_by_layer(before, after := layer_widths(model))
        what = "nothing was cut out, since all heads and units have weights left: zeros alone make it no faster"
        if before != after:
            (heads, left), (units, some) = _summed_widths(before, after).values()
            what = f"{left:,} of {heads:,} heads and {some:,} of {units:,} feed-forward units are in it"
            notes = [*_narrow_notes(model), *notes]
    return model.cpu().float().eval(), rows, [what, *notes]


def _narrow_notes(model: Any) -> list[str]:
    """Return sentences on the features of heads, and on the outputs without weights, where any were cut."""
    rows = [
        (layer, row[NARROW])
        for layer, row in zip(prunable_layers(model), layer_widths(model).values(), strict=True)
        if NARROW in row
    ]
    heads = [(layer.num_heads * full_head_size(layer), row) for layer, row in rows if "query_key" in row]
    found = []
    if heads:
        asks, gives = (sum(sum(row[key]) for _, row in heads) for key in ("query_key", "value_output"))
        found.append(
            f"in {len(heads)} layer{'s' * (len(heads) > 1)} heads are narrower: {asks:,} query-key and {gives:,} "
            f"value-output features of {sum(size for size, _ in heads):,} are in them"
        )
    constant = sum(
        int((~used_outputs(layer.module_of(part))).sum()) for layer, _ in rows for part in ("output", "down")
    )
    return [*found, f"{constant:,} outputs are constant and were cut"] if constant else found


def _widths_and_plan(source: PrunedSource) -> tuple[Widths, dict[str, KeptParts]]:
    """Return (widths before anything was cut, what to keep in each layer)."""
    before = widths_in(source.folder, 0) or layer_widths(source.model)
    return before, {layer.name: live_parts(layer) for layer in prunable_layers(source.model)}


def shrink_model(masked: Any, plan: Mapping[str, KeptParts]) -> tuple[Any, float]:
    """Return (a copy of a model cut down to the kept units of each layer, the largest difference of its outputs)."""
    model, batch = copy.deepcopy(masked), dummy_inputs(masked)
    for layer in prunable_layers(model):
        fold_and_prune_layer_(layer, plan[layer.name])
    found, expected = ([t.double() for t in forward_outputs(each, batch)] for each in (model, masked))
    what = "the compact model answers otherwise than the masked one"
    remedy = (
        f"this version of transformers computes {type(masked).__name__} in a way not known here; export it --to packed"
    )
    close = CLOSE if masked.dtype.itemsize >= 4 else CLOSE_IN_HALF
    return model, largest_difference(found, expected, close, what, f"; {remedy}")


def fold_and_prune_layer_(layer: PrunableLayer, kept: KeptParts) -> None:
    """Cut a layer down to the kept parts; the constant output of the others moves into the biases after it."""
    _fold_into_bias(layer, "value", "output", kept.value_output, lambda bias: bias)
    _fold_into_bias(layer, "up", "down", kept.units, layer.module_of("activation"))
    prune_layer_(layer, kept)


@torch.no_grad()
def _fold_into_bias(layer: PrunableLayer, into: str, out_of: str, kept: Tensor, through: Any) -> None:
    """Add the constant output of removed features to the bias of a layer, in float64."""
    first, second = full_bias(layer.module_of(into)), layer.module_of(out_of)
    weight = full_weight(second)
    gone = ~kept.to(weight.device)
    if not gone.any():
        return
    bias = torch.zeros(len(gone), dtype=torch.float64) if first is None else first.double()
    constant = weight[:, gone].double() @ through(bias.to(weight.device))[gone]
    if second.bias is None:
        second.bias = torch.nn.Parameter(torch.zeros_like(weight[:, 0]))
    second.bias.copy_((second.bias.double() + constant).to(second.bias.dtype))


def _uniform_plan(model: Any, plan: dict[str, KeptParts]) -> dict[str, KeptParts]:
    """Keep all heads, and in each layer as many units as the fullest one needs, filled up with dead ones."""
    most = max(1, *(int(kept.units.sum()) for kept in plan.values()))
    found = {}
    for layer in prunable_layers(model):
        # A stable sort by need: needed units first, then the first of the others.
        order = (~plan[layer.name].units).int().argsort(stable=True)[:most]
        units = torch.zeros_like(plan[layer.name].units).index_fill(0, order, True)
        found[layer.name] = replace(all_parts(layer), units=units)
    if all(kept.keeps_all for kept in found.values()):
        raise UserError(
            f"nothing to compact under --stock: all heads stay there, and a layer needs all of its {most} feed-forward "
            f"units, so that no layer may have fewer; leave --stock out"
        )
    return found


def _check_gain(plan: dict[str, KeptParts], source: PrunedSource) -> None:
    """Raise a UserError if nothing would be cut."""
    if not all(stays.keeps_all for stays in plan.values()):
        return
    heads, units = (sum(getattr(stays, key).numel() for stays in plan.values()) for key in ("heads", "units"))
    if source.has_own_widths or widths_in(source.folder, 0):
        raise UserError(
            f"{source.folder} is compact already: all {heads} heads and {units} feed-forward units that it has are in "
            f"use; prune it on with `sparsesoup prune METHOD --model {source.folder}`, or use another format"
        )
    left = f"nothing to compact in {source.folder}: all {heads} heads and {units} feed-forward units have weights left"
    if low_rank_of(source.facts):
        raise UserError(f"{left}; its matrices are of low rank: use --to low-rank, which writes them as thin layers")
    raise UserError(
        f"{left}; prune in groups that can be cut out, `sparsesoup prune gradual --method.structure heads-and-units` "
        f"or `sparsesoup prune hybrid-movement`, or use --to packed"
    )


def _write_widths(model: Any) -> bool:
    """Write the widths into the model's config: as keys of the stock class, or, if it cannot (True), as our own."""
    wanted, layers = layer_widths(model), prunable_layers(model)
    if hasattr(model.config, COMPACT):
        delattr(model.config, COMPACT)
    stock, first = copy.deepcopy(model.config), next(iter(wanted.values()))
    even = all(row == first for row in wanted.values()) and NARROW not in first
    if even and first["heads"] and first["units"]:
        setattr(stock, layers[0].layout.units, first["units"])
        if first["heads"] != getattr(stock, "num_attention_heads", None):
            stock.num_attention_heads, stock.head_dim = first["heads"], layers[0].head_size
        # Compare all shapes, not only counts: a class that divides the hidden size makes two heads of 8 from two of 4.
        if class_can_build(type(model), stock, dict(model.named_parameters())):
            model.config = stock
            return False
    setattr(model.config, COMPACT, compact_table(wanted))
    return True


def widths_by_layer(before: Widths, after: Widths) -> list[dict[str, Any]]:
    """Return a row per layer: heads and units before and after, and what is narrower than these say, if anything is."""
    if foreign := sorted(before.keys() ^ after.keys()):
        raise UserError(f"damaged export: its export.json and its model differ in layer {foreign[0]}; export it again")
    narrow = {layer for layer in before if "narrow" in before[layer] or "narrow" in after[layer]}
    return [
        {"layer": layer}
        | {key: [row[key], after[layer][key]] for key in COUNTS}
        | ({NARROW: [row.get(NARROW), after[layer].get(NARROW)]} if layer in narrow else {})
        for layer, row in before.items()
    ]


def _summed_widths(before: Widths, after: Widths) -> dict[str, list[int]]:
    """Return the sums over all layers: {"heads": [before, after], "units": [before, after]}."""
    return {key: [sum(row[key] for row in widths.values()) for widths in (before, after)] for key in COUNTS}


def widths_in(folder: Path, after: int) -> Widths:
    """Return the widths before (0) or after (1) cutting, from an export.json in the folder; empty if there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        facts = load_table(folder / "export.json")
        rows = facts.get("widths") or facts["layers"]
        return {
            row["layer"]: {
                **{key: int(row[key][after]) for key in COUNTS},
                **({NARROW: row[NARROW][after]} if NARROW in row and row[NARROW][after] else {}),
            }
            for row in rows
        }
    return {}


def inherited_facts(folder: Path) -> dict[str, Any]:
    """Return the facts about cut units that an export inherits from a source that is also an export."""
    before = widths_in(folder, 0)
    return {"widths": widths_by_layer(before, widths_in(folder, 1))} if before else {}


def load_compact(folder: str | Path) -> Any:
    """Load a compact model: the stock class of transformers, with the layer widths of config.json.

    It can be trained, saved with `save_pretrained` and loaded again by this function.

    Args:
        folder: an export of `sparsesoup export --to compact`.
    Returns: the model, in evaluation mode.
    Raises: UserError if there is none or its weights do not match its config.json.

    >>> model = load_compact("compact-model")  # doctest: +SKIP
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"no model at {folder}: give a folder that `sparsesoup export --to compact` wrote")
    if (folder / FILE).is_file():
        raise UserError(f"{folder} is packed: load it with sparsesoup.load_packed")
    if graph := graph_in(folder):
        raise UserError(f"{folder} holds a graph ({graph}), which its engine loads: export.json says how")
    return load_as_saved(str(folder)).eval()
