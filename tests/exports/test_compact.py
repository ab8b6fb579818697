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
from sparsesoup.exports.compact import find_live_units, fold_and_prune_layer_
from sparsesoup.hub.models.dummy_inputs import dummy_inputs, forward_outputs
from sparsesoup.hub.models.layer_layouts import layer_widths, prunable_layers, prune_layer_, resize_layers_
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
        fold_and_prune_layer_(layer, find_live_units(layer))
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
    assert find_live_units(layer).keeps_all
    with torch.no_grad():
        layer.module_of("output").weight[:, layer.head_size - 1] = 0  # and that one from the other side
        layer.module_of("down").weight[0, 2] = 0
    assert find_live_units(layer).heads.tolist() == [False] + [True] * (HEADS - 1)
    assert find_live_units(layer).units.tolist() == [True, True, False] + [True] * (UNITS - 3)


def test_what_a_dropped_unit_adds_is_its_bias_through_the_activation():
    model = model_of("bert")
    layer = prunable_layers(model)[1]
    with torch.no_grad():
        layer.module_of("up").weight[4] = 0
    bias, column = layer.module_of("up").bias[4].detach(), layer.module_of("down").weight[:, 4].detach().clone()
    before = layer.module_of("down").bias.detach().clone()
    fold_and_prune_layer_(layer, find_live_units(layer))
    by_hand = before + column * 0.5 * bias * (1 + torch.erf(bias / 2**0.5))
    assert torch.allclose(layer.module_of("down").bias, by_hand, rtol=0, atol=1e-14)


def test_a_value_bias_that_is_left_out_of_the_fold_would_be_seen():
    masked = killed(model_of("roberta"), PLANS["all heads of a layer"])
    wrong = copy.deepcopy(masked)
    for layer in prunable_layers(wrong):
        prune_layer_(
            layer, find_live_units(layer).heads.nonzero().flatten(), find_live_units(layer).units.nonzero().flatten()
        )
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
