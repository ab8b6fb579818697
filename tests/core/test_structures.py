"""Whole rows, columns, heads and units: chosen as by hand, by every method that scores, and cut out of the model."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from conftest import Watch, same, tiny, watched
from sparsesoup.cli.main import main
from sparsesoup.core import masks as algebra
from sparsesoup.core.errors import UserError
from sparsesoup.core.granularity import Block, Structure
from sparsesoup.core.groups import validate_groups
from sparsesoup.core.masking import topk_masks
from sparsesoup.core.masks import Masks
from sparsesoup.core.targets import attention_head_groups, target_parameters
from sparsesoup.exports.compact import fold_and_prune_layer_
from sparsesoup.hub.models.cut_layers import layer_widths, live_parts
from sparsesoup.hub.models.dummy_inputs import dummy_inputs, forward_outputs
from sparsesoup.hub.models.layer_layouts import prunable_layers
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.methods import METHODS, TABLE
from sparsesoup.methods.hybrid import HybridMovement
from sparsesoup.methods.learned_masks import PhaseShares
from sparsesoup.methods.refill import refill_masks
from sparsesoup.methods.scores import magnitude
from sparsesoup.report.format import describe_notes, run_warnings
from sparsesoup.training.batching import Batch
from sparsesoup.training.config import TrainingConfig
from sparsesoup.training.problem import Problem
from tiny_bert import bert
from tiny_hub import COMMON, CONFIGS, SHAPE, gpt2, tokenizer
from tiny_models import HEADS, LAYERS, MODELS, model_of

LAYER, SIZE, UNITS = "bert.encoder.layer.{}.", 8, 32  # of the tiny BERT: two layers of two heads
IN, OUT = "intermediate.dense.weight", "output.dense.weight"
BAND = ("attention.self.query.weight", "attention.self.key.weight", "attention.self.value.weight")
BACK = "attention.output.dense.weight"
KINDS: tuple[Structure, ...] = ("rows", "columns", "heads", "units", "heads-and-units", "features-and-units")
SHARE = {"heads": 1024 * 2 / 4096, "units": 1024 * 2 / 4096}  # of the prunable weights


def places(kind: str, shapes: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Every group by hand: name -> bool, True where it has a weight."""

    def spot(*where: tuple[str, Any]) -> dict[str, Tensor]:
        found = {}
        for name, index in where:
            found[name] = torch.zeros(shapes[name], dtype=torch.bool)
            found[name][index] = True
        return found

    for layer in range(2):
        if "heads" in kind:
            for head in range(2):
                band = slice(SIZE * head, SIZE * head + SIZE)
                rows = [(LAYER.format(layer) + name, band) for name in BAND]
                yield spot(*rows, (LAYER.format(layer) + BACK, (slice(None), band)))
        for feature in range(2 * SIZE) if "features" in kind else ():
            asks, keys, values = (LAYER.format(layer) + name for name in BAND)
            yield spot((asks, feature), (keys, feature))
            yield spot((values, feature), (LAYER.format(layer) + BACK, (slice(None), feature)))
    for layer in range(2):
        if "units" in kind:
            for unit in range(UNITS):
                yield spot((LAYER.format(layer) + IN, unit), (LAYER.format(layer) + OUT, (slice(None), unit)))
    if kind in ("rows", "columns"):
        for name, shape in shapes.items():
            for line in range(shape[kind == "columns"]):
                yield spot((name, line if kind == "rows" else (slice(None), line)))


def by_hand(kind: str, scores: dict[str, Tensor], sparsity: float) -> tuple[Masks, int]:
    """(the masks: best mean first, as long as no more is kept than asked; the size of the first group that is not)."""
    shapes = {n: tuple(s.shape) for n, s in scores.items()}
    groups = list(places(kind, shapes))
    covered = {n: torch.zeros(shape, dtype=torch.bool) for n, shape in shapes.items()}
    for group in groups:
        for name, part in group.items():
            covered[name] |= part
    masks = {n: ~c for n, c in covered.items()}

    def mean(group: dict[str, Tensor]) -> float:
        return float(torch.cat([scores[n][part].double() for n, part in group.items()]).mean())

    for group in sorted(groups, key=lambda g: -mean(g)):
        size = sum(int(part.sum()) for part in group.values())
        if algebra.count_kept(masks) + size > round((1 - sparsity) * algebra.count_total(masks)):
            return masks, size
        for name, part in group.items():
            masks[name] |= part
    return masks, 0


@pytest.mark.parametrize("sparsity", [0.05, 0.317, 0.45])
@pytest.mark.parametrize("kind", KINDS)
def test_the_groups_kept_are_those_chosen_by_hand(kind: Structure, sparsity: float) -> None:
    problem = bert()
    scores = magnitude(target_parameters(problem.pretrained, problem.targets))
    found = topk_masks(scores, sparsity, pattern=validate_groups(problem.targets, kind, sparsity))
    wanted, next_one = by_hand(kind, scores, sparsity)
    assert same(found, wanted)
    goal = round((1 - sparsity) * algebra.count_total(found))
    assert goal - next_one < algebra.count_kept(found) <= goal  # the boundary that keeps no more, next to the goal


def test_a_row_makes_one_output_and_a_column_reads_one_input_however_they_are_stored() -> None:
    problem = bert(family=gpt2())
    scores = magnitude(target_parameters(problem.pretrained, problem.targets))
    for kind, side in (("rows", 0), ("columns", 1)):  # GPT-2 stores [in, out]
        for name, mask in topk_masks(scores, 0.5, pattern=validate_groups(problem.targets, kind, 0.5)).items():
            assert bool((mask.all(side) | ~mask.any(side)).all()), name
            assert not bool((mask.all(1 - side) | ~mask.any(1 - side)).all()) or not mask.any() or mask.all(), name


def test_by_scope_tensor_every_layer_loses_the_same_share() -> None:
    problem = bert()
    scores = magnitude(target_parameters(problem.pretrained, problem.targets))
    masks = topk_masks(scores, 0.5, pattern=validate_groups(problem.targets, "heads-and-units", 0.5), scope="tensor")
    model = masked(problem, masks)
    assert layer_widths(compacted(model)) == {f"encoder.layer.{i}": {"heads": 1, "units": 16} for i in range(2)}


def masked(problem: Problem, masks: Masks) -> Any:
    model = copy.deepcopy(problem.pretrained)
    algebra.apply_masks_(dict(model.named_parameters()), masks)
    return model.eval()


def compacted(model: Any) -> Any:
    narrow = copy.deepcopy(model).eval()
    for layer in prunable_layers(narrow):
        fold_and_prune_layer_(layer, live_parts(layer))
    return narrow


def apart(one: Any, other: Any) -> float:
    batch = dummy_inputs(one)
    pairs = zip(forward_outputs(one, batch), forward_outputs(other, batch), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


QUICK: dict[str, dict[str, Any]] = {  # settings in which forty steps are enough
    "imp": {"cut": 0.5}, "imp-rewind": {"cut": 0.5}, "lr-rewind": {"cut": 0.5},
    "lottery-pools": {"cut": 0.5, "neighbours": 1, "beyond": 0, "shares": (0.5,)},
    "isp": {"stages": 2, "weak_masks": 2}, "snip": {"batches": 2}, "grasp": {"batches": 2},
    "wanda": {"batches": 2, "scope": "global"}, "gradient-flow": {"rounds": 2, "batches": 1},
    "gradual-obs": {"prunings": 3, "batches": 1},
    "early-bird": {"every_epochs": 0.34, "masks": 2},
    "platon": {"every_steps": 4, "window": 4}, "pins": {"every_steps": 4, "window": 4},
    "sparse-model-soup": {"phases": 1, "members": 2},
}  # fmt: skip
STRUCTURED = [name for name, method in METHODS.items() if hasattr(method, "structure")]


def test_all_methods_that_score_and_keep_can_be_asked_for_structure() -> None:
    learnt = {name for name, row in TABLE.items() if row.family == "movement"}
    literal = {"isp-paper", "isp-code", "ticket", "sparsegpt"}  # as published; another's masks; single weights of a row
    assert {*METHODS} - {*STRUCTURED} == learnt | literal | {name for name, row in TABLE.items() if row.dense}


@lru_cache
def drawn(name: str, kind: Structure) -> tuple[Any, Any]:
    method = replace(METHODS[name], structure=kind, **QUICK.get(name, {}))
    problem = bert(torch.float64, steps=40, training=TrainingConfig(learning_rate=3e-3, batch_size=8))
    return method.run(problem, 0.45), problem


@pytest.mark.parametrize("name", STRUCTURED)
def test_every_method_cuts_whole_groups_and_the_compact_model_answers_alike(name: str) -> None:
    ticket, problem = drawn(name, "heads-and-units")
    goal = round(0.55 * 4096)
    assert goal - 512 < algebra.count_kept(ticket.masks) <= goal  # the largest group is a head of 512 weights
    shapes = {n: tuple(m.shape) for n, m in ticket.masks.items()}
    for group in places("heads-and-units", shapes):
        assert len({bool(v) for n, part in group.items() for v in ticket.masks[n][part]}) == 1
    model = copy.deepcopy(problem.pretrained)
    model.load_state_dict(ticket.weights)
    narrow = compacted(model.eval())
    assert apart(model, narrow) < 1e-10
    removed = 4096 - sum(512 * row["heads"] + 32 * row["units"] for row in layer_widths(narrow).values())
    assert removed == algebra.count_total(ticket.masks) - algebra.count_kept(ticket.masks)


@pytest.mark.parametrize("kind", ["rows", "columns", "heads", "units", "features-and-units"])
def test_the_compact_model_answers_alike_for_each_structure(kind: Structure) -> None:
    ticket, problem = drawn("gradual", kind)
    model = copy.deepcopy(problem.pretrained)
    model.load_state_dict(ticket.weights)
    narrow = compacted(model.eval())
    assert apart(model, narrow) < 1e-10
    if kind == "features-and-units":
        heads = [w for row in layer_widths(narrow).values() for part in row["narrow"].values() for w in part]
        removed = 4096 - 32 * (sum(heads) + sum(row["units"] for row in layer_widths(narrow).values()))
        # Query-key features of a head that gives nothing are cut too.
        assert removed >= algebra.count_total(ticket.masks) - algebra.count_kept(ticket.masks)
    if kind in ("heads", "units"):
        other = {"heads": "units", "units": "heads"}[kind]
        assert {row[other] for row in layer_widths(narrow).values()} == {{"heads": 2, "units": 32}[other]}
        assert sum(row[kind] for row in layer_widths(narrow).values()) < {"heads": 4, "units": 64}[kind]


def test_what_cannot_be_had_is_refused_in_one_line_before_the_first_step() -> None:
    wrong: list[tuple[Any, Any, float, str]] = [
        ("gradual", {"structure": "heads"}, 0.9, "the prunable groups hold 0.5000 of the prunable weights"),
        ("imp", {"structure": "units"}, 0.501, "ask for no more than that, or spare fewer groups"),
        ("gradual", {"structure": "heads", "pattern": Block(4, 4)}, 0.3, "mutually exclusive (got heads and 4x4)"),
        ("magnitude", {"structure": "rows", "scope": "2:4"}, 0.5, "set method.scope global or tensor"),
        ("wanda", {"structure": "units"}, 0.3, "scope row does not; set method.scope global or tensor"),
    ]
    for name, settings, sparsity, said in wrong:
        problem = bert(steps=40)
        with pytest.raises(UserError) as caught:
            replace(METHODS[name], **settings).run(problem, sparsity)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not problem.meter.to_json()
    with pytest.raises(UserError, match="has no heads and no units to prune"):
        METHODS["one-shot-structured"].run(tiny(), 0.5)
    with pytest.raises(UserError, match="has no heads to prune"):
        replace(METHODS["gradual"], structure="heads").run(bert(family=gpt2()), 0.2)


def llama() -> Any:
    """Four heads of the query share two of key and value."""
    return transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip


@pytest.mark.parametrize("family", [gpt2, llama])
def test_heads_and_units_of_a_model_without_heads_of_its_own_are_not_units_alone(family: Any) -> None:
    problem = bert(family=family(), steps=40)
    with pytest.raises(UserError, match=r"has no heads to prune .*; set method\.structure units$"):
        replace(METHODS["gradual"], structure="heads-and-units").run(problem, 0.2)
    assert not problem.meter.to_json()
    if family is llama:
        assert validate_groups(problem.targets, "units", 0.2)


@pytest.mark.parametrize(("kind", "said"), [("mpnet", True), ("bert", False)])
def test_what_cannot_be_cut_out_later_is_said_before_the_first_step(
    kind: str, said: bool, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {key: value for key, value in SHAPE.items() if key != "type_vocab_size"}
    config = transformers.MPNetConfig(**COMMON, **small) if kind == "mpnet" else CONFIGS["bert"]()
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer(False).save_pretrained(tmp_path / "model")
    words = ["--method.structure", "units", "--sparsity", "0.3", "--steps", "40", "--out", tmp_path / "runs"]
    given = ["gradual", "--model", tmp_path / "model", "--dataset", place / "reviews", *words]
    assert main(["prune", *map(str, given)]) == 0
    before = capsys.readouterr().err
    assert ("note: heads and units that are pruned stay in a mpnet model as zeros" in before) == said
    facts = json.loads(next((tmp_path / "runs").rglob("report.json")).read_text())
    assert bool([doubt for doubt in facts["notes"].get("doubts", []) if "as zeros" in doubt]) == said


def still() -> Any:
    """A tiny BERT without dropout, whose noise would differ where there are fewer features."""
    return CONFIGS["bert"](hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def test_one_shot_structured_is_the_cut_model_trained() -> None:
    """By another road: mask theta_0, cut it, and train what is left as a dense model."""
    problem = bert(torch.float64, family=still(), steps=12)
    ticket = replace(METHODS["one-shot-structured"], scope="global").run(problem, 0.45)
    scores = magnitude(target_parameters(problem.pretrained, problem.targets))
    assert same(ticket.masks, by_hand("heads-and-units", scores, 0.45)[0])
    narrow = compacted(masked(problem, ticket.masks))
    fresh = bert()
    cut = replace(fresh, pretrained=narrow, targets=find_prunable(narrow), steps=12)
    other = copy.deepcopy(narrow)
    other.load_state_dict(METHODS["dense"].run(cut, 0.0).weights)
    model = copy.deepcopy(problem.pretrained)
    model.load_state_dict(ticket.weights)
    assert apart(model.eval(), other.eval()) < 1e-8
    assert apart(model, narrow) > 1e-3  # it did learn
    # The width between the blocks is protected.
    assert {
        layer.module_of(role).weight.shape[0] for layer in prunable_layers(other) for role in ("output", "down")
    } == {16}


@lru_cache
def hybrid(**more: Any) -> tuple[Any, Any, list[Masks], list[dict[str, Tensor]]]:
    settings: dict[str, Any] = {"tile": Block(4, 8), "refill": 0.5, "phases": PhaseShares(warmup=0.05), **more}
    with watched() as watch:
        problem = bert(steps=40, observer=watch)
        ticket = HybridMovement(score_rate=0.5, **settings).run(problem, 0.8)
    return ticket, problem, watch.pruned, watch.before


def test_refilled_masks_are_whole_heads_and_units_and_those_that_were_left() -> None:
    ticket, problem, (trimmed, refilled), _ = hybrid()
    assert same(ticket.masks, refilled)
    shapes = {n: tuple(m.shape) for n, m in refilled.items()}
    union = {n: torch.zeros_like(m) for n, m in refilled.items()}
    for group in places("heads-and-units", shapes):
        parts = {n: part for n, part in group.items() if bool(refilled[n][part].all())}
        if len(parts) == len(group):
            for name, part in group.items():
                union[name] |= part
    assert same(refilled, union)
    few, many = (layer_widths(compacted(masked(problem, masks))) for masks in (trimmed, refilled))
    assert {name: {**row, "narrow": 0} for name, row in few.items()} == {n: {**r, "narrow": 0} for n, r in many.items()}
    assert not any("narrow" in row for row in many.values())
    assert algebra.count_kept(trimmed) < algebra.count_kept(refilled) < algebra.count_total(refilled)


def test_a_head_whose_weights_do_not_meet_is_not_refilled() -> None:
    problem = bert()
    name = LAYER.format(0) + "attention.{}.weight"
    none = {
        n: torch.zeros_like(m)
        for n, m in algebra.dense_masks(target_parameters(problem.pretrained, problem.targets)).items()
    }
    apart_, met = ({n: m.clone() for n, m in none.items()} for _ in range(2))
    apart_[name.format("self.query")][:] = True
    for masks, feature in ((apart_, 3), (met, 2)):
        masks[name.format("self.value")][2, 0] = True  # both features are of the first head
        masks[name.format("output.dense")][5, feature] = True
    assert same(refill_masks(apart_, problem.targets), none)
    assert algebra.count_kept(refill_masks(met, problem.targets)) == 512


def test_what_returns_is_small_noise_and_what_stayed_is_as_it_was() -> None:
    ticket, _, (trimmed, _), (_, before) = hybrid(noise=0.1)
    quiet, *_ = hybrid(noise=0.0)
    assert not same(quiet.weights, ticket.weights)
    assert same(quiet.masks, ticket.masks)
    steps = [label for label, cost in ticket.cost.items() if cost["steps"]]
    assert steps == ["main"]
    assert ticket.cost["main"]["steps"] == 60
    known = ticket.notes["refill"]
    assert known == {"before": algebra.sparsity(trimmed), "after": ticket.sparsity, "steps": 20}
    assert known["after"] < known["before"]
    assert all(not before[n][~m].any() for n, m in trimmed.items())


def test_after_the_refill_the_rate_rises_and_falls_once_more_on_rows_of_another_order() -> None:
    seen: list[Tensor] = []

    def criterion(outputs: Tensor, batch: Batch) -> Tensor:
        seen.append(batch["input_ids"])
        return torch.nn.functional.cross_entropy(outputs, batch["labels"])

    watch = Watch()
    problem = bert(steps=40, observer=watch, criterion=criterion)
    HybridMovement(score_rate=0.5, tile=Block(4, 8), refill=0.5).run(problem, 0.8)
    assert watch.curve("step")[40:] == watch.curve("step")[20:40]
    assert watch.curve("rate")[40:] == [problem.rate_schedule(20)(step) for step in range(20)]
    assert sum(one.equal(other) for one, other in zip(seen[20:40], seen[40:], strict=True)) < 4


def test_refilling_writes_noise_of_the_asked_size_into_what_returns_alone() -> None:
    from sparsesoup.methods.refill import refill_

    problem = bert(steps=40)
    state = problem.start_run()
    trimmed = topk_masks(magnitude(state.prunable_parameters()), 0.5, pattern=Block(4, 8))
    state.set_masks_(trimmed)
    before = {n: p.detach().clone() for n, p in state.prunable_parameters().items()}
    refill_(state, problem, 10, 0.1)
    returned = {n: m & ~trimmed[n] for n, m in state.masks.items()}
    assert any(bool(m.any()) for m in returned.values())
    for name, weight in state.prunable_parameters().items():
        stayed = trimmed[name] & state.masks[name]
        assert weight[stayed].equal(before[name][stayed])
        if int(returned[name].sum()) > 60:
            size = float(weight[returned[name]].detach().std() / before[name][trimmed[name]].square().mean().sqrt())
            assert 0.07 < size < 0.13, name
    assert state.step == 30


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_known_in_every_family_that_can_be_compacted_whole_or_cut(name: str) -> None:
    model = model_of(name, dtype=torch.float32)
    towers = 2 if name == "clip" else 1
    whole = attention_head_groups(find_prunable(model))
    assert [tie.num_groups({n: t.shape for n, t in find_prunable(model).items()}) for tie in whole] == [
        HEADS
    ] * LAYERS * towers
    last = prunable_layers(model)[-1]
    with torch.no_grad():
        last.module_of("value").weight[: 3 * last.head_size] = 0  # three of the last layer's four heads
        for part in ("value", "up"):
            prunable_layers(model)[1].module_of(part).weight.zero_()
    cut = find_prunable(compacted(model))
    ties = attention_head_groups(cut)
    counts = [tie.num_groups({n: t.shape for n, t in cut.items()}) for tie in ties]
    assert counts == [HEADS] * (LAYERS * towers - 2) + [1]
    assert len(cut) == len(find_prunable(model)) - 6  # nothing of the emptied layer is a target


def test_the_report_tells_what_came_back_and_the_terminal_that_it_is_less_than_asked() -> None:
    ticket, *_ = hybrid()
    settings = {"train": {"batch_size": 8, "gradient_accumulation_steps": 1}}
    sparsity = {"target": 0.8, "reached": ticket.sparsity}
    facts = {"notes": ticket.notes, "sparsity": sparsity, "settings": settings, "cost": ticket.cost}
    (told,) = [line for line in describe_notes(facts)[0] if "was restored" in line]
    assert "training continued for 20 steps" in told
    assert f"{100 * ticket.sparsity:.1f} % are pruned" in told
    (note,) = [line for line in run_warnings(facts) if "instead of 80.0 %" in line and "were restored" in line]
    assert "\n" not in note
    assert not [line for line in run_warnings(facts | {"notes": {}}) if "were restored" in line]


def test_the_terminal_says_where_groups_miss_the_sparsity_by_far() -> None:
    ticket = replace(METHODS["magnitude"], structure="heads").run(bert(), 0.3)  # a head is an eighth of the weights
    assert ticket.sparsity == 0.375
    facts = {
        "notes": ticket.notes,
        "settings": {"train": {"batch_size": 8, "gradient_accumulation_steps": 1}},
        "cost": ticket.cost,
    }
    (note,) = run_warnings(facts | {"sparsity": {"target": 0.3, "reached": ticket.sparsity}})
    assert note.startswith("37.5 % of the weights are pruned instead of 30.0 %")
    assert not run_warnings(facts | {"sparsity": {"target": 0.37, "reached": ticket.sparsity}})
