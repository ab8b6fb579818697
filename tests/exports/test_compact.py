"""A compact model answers as the masked one, to the last bits of float64, whatever was killed and however."""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsesoup.core.errors import UserError
from sparsesoup.exports.compact import _narrow_notes, fold_and_prune_layer_
from sparsesoup.hub.models.cut_layers import layer_widths, live_parts, prune_layer_, resize_layers_
from sparsesoup.hub.models.dummy_inputs import dummy_inputs, forward_outputs
from sparsesoup.hub.models.layer_layouts import prunable_layers
from tiny_hub import CONFIGS
from tiny_models import HEADS, LAYERS, MODELS, UNITS, WAYS, killed, model_of

pytestmark = pytest.mark.integration

ATTENTION = ("eager", "sdpa")


def bound(name: str, attention: str) -> float:
    """1e-10; where the stock code takes the softmax in float32, the masked model itself is no closer than that."""
    return 1e-5 if attention == "eager" and name.startswith(("vit", "deit", "clip")) else 1e-10


def compacted(masked: Any) -> Any:
    narrow = copy.deepcopy(masked)
    for layer in prunable_layers(narrow):
        fold_and_prune_layer_(layer, live_parts(layer))
    return narrow


def apart(one: Any, other: Any) -> float:
    batch = dummy_inputs(one)
    pairs = list(zip(forward_outputs(one, batch), forward_outputs(other, batch), strict=True))
    assert pairs
    return max(float((a - b).abs().max()) for a, b in pairs)


def rows(width: int, count: int = LAYERS) -> Any:
    return st.lists(st.lists(st.sampled_from(WAYS), min_size=width, max_size=width), min_size=count, max_size=count)


@settings(max_examples=25)
@given(heads=rows(HEADS), units=rows(UNITS), seed=st.integers(0, 3), attention=st.sampled_from(ATTENTION))
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_masked_model_for_any_mask(name, heads, units, seed, attention):
    masked = killed(model_of(name, attention, seed=seed), {"heads": heads, "units": units})
    narrow = compacted(masked)
    assert apart(masked, narrow) < bound(name, attention)
    # Half of a unit's one feature is none: "mixed" zeroes its column alone, and kills it all the same.
    wanted = [
        {"heads": sum(way == "stays" for way in h), "units": sum(way == "stays" for way in u)}
        for h, u in zip(heads, units, strict=True)
    ]
    assert list(layer_widths(narrow).values())[:LAYERS] == wanted


PLANS = {
    "all heads of a layer": {"heads": [["in"] * HEADS]},
    "all units of a layer": {"units": [["stays"] * UNITS, ["in"] * UNITS]},
    "a layer": {"heads": [["out"] * HEADS], "units": [["out"] * UNITS]},
    "everything": {"heads": [["in"] * HEADS] * LAYERS, "units": [["in"] * UNITS] * LAYERS},
    "everything but one head": {"heads": [["in"] * HEADS, ["in"] * (HEADS - 1)], "units": [["in"] * UNITS] * LAYERS},
    "everything but one unit": {"heads": [["in"] * HEADS] * LAYERS, "units": [["in"] * UNITS, ["in"] * (UNITS - 1)]},
    "nothing": {},
}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_masked_model_for_adversarial_masks(name, plan, attention):
    masked = killed(model_of(name, attention), PLANS[plan])
    narrow = compacted(masked)
    assert apart(masked, narrow) < bound(name, attention)
    assert (layer_widths(narrow) == layer_widths(masked)) == (plan == "nothing")


def test_a_head_with_one_live_feature_stays_and_so_does_a_unit_with_one_weight_on_each_side():
    model = model_of("bert")
    layer = prunable_layers(model)[0]
    with torch.no_grad():
        layer.module_of("value").weight[: layer.head_size - 1] = 0  # all features of the first head but the last
        layer.module_of("up").weight[2, 1:] = 0
        layer.module_of("down").weight[1:, 2] = 0
    assert live_parts(layer).heads.all()
    assert live_parts(layer).units.all()
    assert live_parts(layer).value_output.tolist() == [False] * 3 + [True] * 13
    with torch.no_grad():
        layer.module_of("output").weight[:, layer.head_size - 1] = 0  # and that one from the other side
        layer.module_of("down").weight[0, 2] = 0
    assert live_parts(layer).heads.tolist() == [False] + [True] * (HEADS - 1)
    assert live_parts(layer).units.tolist() == [True, True, False] + [True] * (UNITS - 3)


FEATURES, HIDDEN = ("stays", "both", "key", "in", "out"), 16


@torch.no_grad()
def features_killed(model: Any, plan: list[str], rows: list[bool]) -> Any:
    """A copy whose features of heads are killed by turns as planned, query and key with their own ways."""
    masked = copy.deepcopy(model)
    for layer in prunable_layers(masked):
        for feature in range(HEADS * layer.head_size):
            asks, gives = plan[feature % len(plan)], plan[(3 * feature + 1) % len(plan)]
            for part in {"both": ("query", "key"), "key": ("key",)}.get(asks, ()):
                layer.module_of(part).weight[feature] = 0
            if gives in ("in", "both"):
                layer.module_of("value").weight[feature] = 0
            if gives in ("out", "both"):
                layer.module_of("output").weight[:, feature] = 0
        for row in range(HIDDEN):
            if not rows[row % len(rows)]:
                layer.module_of("output").weight[row] = 0
                layer.module_of("down").weight[(row + 5) % HIDDEN] = 0
    return masked


@settings(max_examples=15)
@given(
    plan=st.lists(st.sampled_from(FEATURES), min_size=7, max_size=16), seed=st.integers(0, 3),
    rows=st.lists(st.booleans(), min_size=3, max_size=16), attention=st.sampled_from(ATTENTION),
)  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_heads_of_unequal_widths_and_outputs_without_weights_answer_as_the_masked_model(
    name, plan, seed, rows, attention
):
    masked = features_killed(model_of(name, attention, seed=seed), plan, rows)
    narrow = compacted(masked)
    assert apart(masked, narrow) < bound(name, attention)
    again = compacted(narrow)  # nothing is left to cut
    assert layer_widths(again) == layer_widths(narrow)
    assert apart(masked, again) < bound(name, attention)
    # All zeros of whole rows and columns are gone.
    for layer in prunable_layers(narrow):
        for part in ("query", "key", "value", "output", "up", "down"):
            weight = layer.module_of(part).weight
            assert not weight.numel() or bool((weight != 0).any(0).all() and (weight != 0).any(1).all())


def test_a_head_of_three_features_that_ask_and_five_that_give_and_one_that_is_gone():
    model = model_of("bert-wide")
    layer = prunable_layers(model)[0]
    with torch.no_grad():
        for part in ("query", "key"):
            layer.module_of(part).weight[3:8] = 0
            layer.module_of(part).weight[16:24] = 0  # a third head attends to all alike
        layer.module_of("value").weight[5:16] = 0  # of the first head three, and the second head
    narrow = compacted(model)
    assert apart(model, narrow) < 1e-10
    row = layer_widths(narrow)["encoder.layer.0"]
    assert row == {"heads": 3, "units": 6, "narrow": {"query_key": [3, 0, 8], "value_output": [5, 8, 8]}}
    said = "in 1 layer heads are narrower: 11 query-key and 21 value-output features of 24 are in them"
    assert _narrow_notes(narrow) == [said]
    core = narrow.base_model.encoder.layer[0].attention.self
    assert core.query.weight.shape == (11, 32)
    assert core.scaling == 8**-0.5
    with torch.no_grad():
        core.scaling = 1.0  # a scale of another width would be seen
    assert apart(model, narrow) > 1e-3


def test_rows_that_ask_without_an_answer_are_cut_only_where_the_softmax_does_not_see_them():
    """A query of zeros with a bias still weighs the keys; a key of zeros adds the same to every logit."""
    model = model_of("bert")
    layer = prunable_layers(model)[0]
    with torch.no_grad():
        layer.module_of("query").weight[:2] = 0
        layer.module_of("query").bias[0] = 0
        layer.module_of("key").weight[3] = 0
    assert live_parts(layer).query_key.tolist() == [False, True, True, False] + [True] * 12
    assert apart(model, compacted(model)) < 1e-10


def test_what_a_dropped_unit_adds_is_its_bias_through_the_activation():
    model = model_of("bert")
    layer = prunable_layers(model)[1]
    with torch.no_grad():
        layer.module_of("up").weight[4] = 0
    bias, column = layer.module_of("up").bias[4].detach(), layer.module_of("down").weight[:, 4].detach().clone()
    before = layer.module_of("down").bias.detach().clone()
    fold_and_prune_layer_(layer, live_parts(layer))
    by_hand = before + column * 0.5 * bias * (1 + torch.erf(bias / 2**0.5))
    assert torch.allclose(layer.module_of("down").bias, by_hand, rtol=0, atol=1e-14)


def test_a_value_bias_that_is_left_out_of_the_fold_would_be_seen():
    masked = killed(model_of("roberta"), PLANS["all heads of a layer"])
    wrong = copy.deepcopy(masked)
    for layer in prunable_layers(wrong):
        prune_layer_(layer, live_parts(layer))
    assert apart(masked, wrong) > 1e-3


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit"])
def test_a_compact_model_trains_and_pickles_and_keeps_what_is_frozen(name):
    model = model_of(name, dtype=torch.float32)
    for parameter in prunable_layers(model)[1].block.parameters():
        parameter.requires_grad_(False)
    narrow = compacted(killed(model, PLANS["a layer"]))
    narrow.train()
    narrow(**dummy_inputs(narrow)).logits.square().sum().backward()
    emptied, frozen, whole = prunable_layers(narrow)
    assert emptied.module_of("output").bias.grad is not None
    assert emptied.module_of("down").bias.grad is not None
    assert not any(p.requires_grad for p in frozen.block.parameters())
    assert all(p.grad is not None for p in whole.block.parameters())
    assert apart(narrow.eval(), pickle.loads(pickle.dumps(narrow))) == 0


def test_pictures_that_are_no_squares_are_drawn_as_the_model_takes_them():
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
    model = transformers.ViTModel(transformers.ViTConfig(image_size=[8, 12], patch_size=4, **shape)).eval()
    assert dummy_inputs(model)["pixel_values"].shape == (2, 3, 8, 12)
    assert forward_outputs(model, dummy_inputs(model))[0].shape == (2, 1 + 2 * 3, 8)


def test_the_width_between_layers_is_as_before():
    masked = killed(model_of("bert"), {"heads": [["in", "stays", "out", "stays"]] * LAYERS})
    narrow = compacted(masked)
    assert [p.shape[0] for n, p in narrow.named_parameters() if n.endswith("output.dense.weight")] == [16] * 2 * LAYERS
    assert narrow.base_model.encoder.layer[0].attention.self.num_attention_heads == 2
    assert narrow(**dummy_inputs(narrow)).logits.shape == masked(**dummy_inputs(masked)).logits.shape


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({}, "None of encoder.layer.0"),
        ({"encoder.layer.0": {"heads": 9, "units": 1}}, "heads of 0 to 4 and units of 0 to 6"),
        ({"encoder.layer.0": {"heads": 1, "units": "2"}}, "units of 0 to 6"),
        ({"encoder.layer.0": {"heads": -1, "units": 2}}, "heads of 0 to 4"),
        ({"encoder.layer.0": 3}, "3 of encoder.layer.0"),
    ],
)
def test_widths_that_do_not_fit_are_refused(wanted, said):
    with pytest.raises(UserError, match=r"compact_config of config\.json") as caught:
        resize_layers_(model_of("bert"), wanted)
    assert said in str(caught.value)


def test_a_family_whose_grouping_is_unknown_is_refused():
    model = transformers.DebertaV2ForSequenceClassification(CONFIGS["deberta-v2"]())
    with pytest.raises(
        UserError, match=r"DebertaV2ForSequenceClassification \(model type deberta-v2\).*known are bert"
    ):
        prunable_layers(model)
