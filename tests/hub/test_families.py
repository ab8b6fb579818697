"""Which weights of a transformer are pruned: the linear matrices inside its blocks, in every family, and no others."""

import math

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

from sparsesoup.core.errors import UserError
from sparsesoup.core.targets import attention_head_groups, feed_forward_groups
from sparsesoup.hub.models.prunable import find_prunable
from tiny_hub import CONFIGS, FAMILIES

SIX = ("query", "key", "value", "output", "feed-forward in", "feed-forward out")
BERT = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "output",
    "intermediate.dense": "feed-forward in",
    "output.dense": "feed-forward out",
}
DEBERTA = {k.replace("query", "query_proj").replace("key", "key_proj").replace("value", "value_proj"): v
           for k, v in BERT.items()}  # fmt: skip
DISTILBERT = {
    "attention.q_lin": "query",
    "attention.k_lin": "key",
    "attention.v_lin": "value",
    "attention.out_lin": "output",
    "ffn.lin1": "feed-forward in",
    "ffn.lin2": "feed-forward out",
}
INSIDE = {
    "bert": ("bert.encoder.layer", BERT),
    "distilbert": ("distilbert.transformer.layer", DISTILBERT),
    "roberta": ("roberta.encoder.layer", BERT),
    "deberta-v2": ("deberta.encoder.layer", DEBERTA),
    "electra": ("electra.encoder.layer", BERT),
}


def tiny(family):
    return AutoModelForSequenceClassification.from_config(CONFIGS[family]())


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_six_matrices_of_each_layer_are_pruned_with_their_roles(family):
    prefix, six = INSIDE[family]
    expected = {f"{prefix}.{layer}.{path}.weight": role for layer in range(2) for path, role in six.items()}
    model = tiny(family)
    found = find_prunable(model)
    assert {name: target.role for name, target in found.items()} == expected
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert all(target.shape == shapes[name] and not target.transposed for name, target in found.items())
    assert sum(math.prod(target.shape) for target in found.values()) == 2 * (4 * 16 * 16 + 2 * 16 * 32)


def test_the_wrapped_and_the_bare_model_have_the_same_targets():
    config = CONFIGS["bert"]()
    wrapped = find_prunable(AutoModelForSequenceClassification.from_config(config))
    bare = find_prunable(transformers.AutoModel.from_config(config))
    assert {name.removeprefix("bert."): target for name, target in wrapped.items()} == bare


def test_debertas_matrix_of_relative_positions_is_not_pruned():
    model = tiny("deberta-v2")
    (beside,) = [name for name, p in model.named_parameters() if "rel_embeddings" in name and p.dim() == 2]
    assert beside not in find_prunable(model)


def test_xlnets_table_of_segments_is_an_embedding_and_not_pruned():
    config = transformers.XLNetConfig(vocab_size=64, d_model=16, d_inner=32, n_layer=2, n_head=2)
    model = transformers.XLNetModel(config)
    assert {name.split(".")[-1] for name in find_prunable(model) if "layer.0.rel_attn" in name} == {*"qkvor"}


def test_debertas_own_projections_of_positions_are_linear_weights_of_the_block_too():
    model = AutoModelForSequenceClassification.from_config(CONFIGS["deberta-v2"](share_att_key=False))
    more = {
        name.split("attention.self.")[1]: t.role for name, t in find_prunable(model).items() if ".self.pos_" in name
    }
    assert more == {"pos_key_proj.weight": "key", "pos_query_proj.weight": "query"}


def vit():
    return transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                  image_size=16, patch_size=8)  # fmt: skip


def clip(**more):
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
             "image_size": 16, "patch_size": 8}  # fmt: skip
    return transformers.CLIPVisionConfig(**(small | more))


def test_the_image_encoders_have_the_same_six_matrices():
    for model in (transformers.ViTForImageClassification(vit()), transformers.CLIPVisionModel(clip())):
        found = find_prunable(model)
        assert sorted(t.role for t in found.values()) == sorted(2 * SIX), type(model).__name__
        assert all(name.endswith(".weight") and len(t.shape) == 2 for name, t in found.items())
        assert not [name for name in found if "embed" in name or "classifier" in name or "norm" in name]


def test_gpt2s_transposed_matrices_are_marked_so():
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    found = find_prunable(transformers.GPT2ForSequenceClassification(config))
    assert {n.split(".h.0.")[1]: (t.role, t.shape) for n, t in found.items() if ".h.0." in n} == {
        "attn.c_attn.weight": ("query-key-value", (16, 48)),
        "attn.c_proj.weight": ("output", (16, 16)),
        "mlp.c_fc.weight": ("feed-forward in", (16, 64)),
        "mlp.c_proj.weight": ("feed-forward out", (64, 16)),
    }
    assert len(found) == 8
    assert all(t.transposed for t in found.values())


def test_alberts_shared_layer_is_pruned_once():
    config = transformers.AlbertConfig(hidden_size=16, embedding_size=8, num_hidden_layers=4, num_attention_heads=2,
                                       intermediate_size=32, vocab_size=64)  # fmt: skip
    found = find_prunable(transformers.AlbertForSequenceClassification(config))
    assert sorted(t.role for t in found.values()) == sorted(SIX)
    assert not [name for name in found if "embed" in name or "pooler" in name or "mapping" in name]


def test_a_decoders_two_attentions_and_stacked_feed_forwards_have_parts_of_their_own():
    small = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
             "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    bart = find_prunable(transformers.BartForSequenceClassification(transformers.BartConfig(**small)))
    members = [[name.split(".layers.0.") for name, _ in tie.members] for tie in attention_head_groups(bart)]
    ends = {f"{end}_proj.weight" for end in ("q", "k", "v", "out")}
    assert [({side for side, _ in m}, {own for _, own in m}) for m in members] == [
        ({"model.encoder"}, {f"self_attn.{end}" for end in ends}),
        ({"model.decoder"}, {f"self_attn.{end}" for end in ends}),
        ({"model.decoder"}, {f"encoder_attn.{end}" for end in ends}),
    ]
    config = transformers.MobileBertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                           intermediate_size=32, intra_bottleneck_size=16)  # fmt: skip
    mobile = find_prunable(transformers.MobileBertForSequenceClassification(config))
    starts = [
        [name.split("layer.0.")[1].removesuffix(".dense.weight") for name, _ in t.members]
        for t in feed_forward_groups(mobile)
    ]
    assert starts == [["intermediate", "output"], *([f"ffn.{i}.intermediate", f"ffn.{i}.output"] for i in range(3))]


GAINS = {  # a family, and what of its blocks has several sides and is no matrix
    "swinv2": (
        lambda: transformers.Swinv2ForImageClassification(
            transformers.Swinv2Config(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2])
        ),
        ("logit_scale",),  # and a linear map to one output, where there is one head
    ),
    "convnextv2": (
        lambda: transformers.ConvNextV2ForImageClassification(
            transformers.ConvNextV2Config(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], image_size=32)
        ),
        ("grn.weight", "dwconv.weight"),
    ),
    "cvt": (
        lambda: transformers.CvtForImageClassification(
            transformers.CvtConfig(embed_dim=[8, 8, 8], num_heads=[1, 1, 1], depth=[1, 2, 3])
        ),
        ("cls_token", "convolution.weight"),
    ),
    "jamba": (
        lambda: transformers.JambaForSequenceClassification(
            transformers.JambaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                     num_attention_heads=2, num_key_value_heads=1, attn_layer_period=2,
                                     attn_layer_offset=1, num_experts=2, mamba_dt_rank=4)
        ),
        ("A_log", "conv1d.weight", "D"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", GAINS)
def test_gains_temperatures_tables_and_convolutions_are_no_matrices(family):
    make, others = GAINS[family]
    model = make()
    found = find_prunable(model)
    several = {name for name, p in model.named_parameters() if p.dim() >= 2 or name.endswith(others)}
    assert found
    assert all(any(name.endswith(f".{own}") for name in several) for own in others)
    assert not [name for name in found if name.endswith(tuple(f".{own}" for own in others))]
    assert not [name for name, target in found.items() if min(target.shape[-2:]) < 2]


def test_the_experts_of_a_layer_are_a_stack_of_matrices():
    (found,) = {t.shape for n, t in find_prunable(GAINS["jamba"][0]()).items() if n.endswith("experts.down_proj")}
    assert found == (2, 16, 32)


def test_a_norm_with_a_gain_for_each_head_is_no_matrix():
    class HeadsNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2, 8))

    model = transformers.BertModel(CONFIGS["bert"]())
    model.encoder.layer[0].attention.self.q_norm = HeadsNorm()
    assert len(find_prunable(model)) == 12


def test_an_embedding_inside_a_block_is_not_pruned():
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    model = transformers.T5EncoderModel(config)
    (inside,) = [
        name for name, _ in model.named_parameters() if ".block." in name and "relative_attention_bias" in name
    ]
    found = find_prunable(model)
    assert inside not in found
    assert len(found) == 12


@pytest.mark.parametrize(
    "model",
    [
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig()),
        lambda: transformers.BertModel(transformers.BertConfig()),
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig()),  # ViT-B/32 is the default
    ],
)
def test_bert_base_and_the_vision_tower_of_clip_have_84934656_prunable_weights(model):
    with torch.device("meta"):
        found = find_prunable(model())
    assert sum(math.prod(target.shape) for target in found.values()) == 84_934_656
    assert len(found) == 72
    assert "other" not in {target.role for target in found.values()}


def test_a_model_without_repeated_blocks_is_refused_in_one_line():
    class Flat(transformers.PreTrainedModel):
        config_class = transformers.BertConfig

        def __init__(self, config):
            super().__init__(config)
            self.head = torch.nn.Linear(4, 4)

    with pytest.raises(UserError, match=r"found nothing to prune in Flat: expected .* such as BERT") as caught:
        find_prunable(Flat(CONFIGS["bert"]()))
    assert "\n" not in str(caught.value)
