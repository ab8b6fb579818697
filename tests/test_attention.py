"""A model is trained with the attention that is fast where it is trained, and saved as if nothing had been chosen."""

import json

import pytest
import torch
import transformers
from torch.profiler import profile

from sparsesoup.hub.attention import attend_fast_
from sparsesoup.hub.build import Place, build, open_task
from sparsesoup.hub.checkpoint import quiet
from sparsesoup.training import Training
from tiny_hub import checkpoint as texts_checkpoint
from tiny_hub import reviews
from tiny_images import CONFIGS, SIDE, checkpoint, parquet
from tiny_models import MODELS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny ViT with pictures, and a tiny BERT with texts; no test writes to it."""
    folder = tmp_path_factory.mktemp("attention")
    checkpoint(folder / "vit")
    parquet(folder / "pictures")
    texts_checkpoint(folder / "bert")
    reviews(folder / "texts")
    return folder


def fused(place, model, dataset, precision):
    """How often a training step calls torch's fused attention, forth and back."""
    where = Place(model=str(place / model), dataset=str(place / dataset))
    problem = build(where, open_task(where), steps=2, training=Training(batch_size=4, precision=precision))
    state = problem.start()
    with profile() as calls:
        problem.loss(state.model, problem.train.batch(range(4))).backward()
    assert any("backward" in event.key.lower() for event in calls.key_averages())
    return sum(event.count for event in calls.key_averages() if "flash_attention" in event.key)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the fused attention is fast on this machine")
def test_images_are_learnt_in_bf16_without_fused_attention_on_a_cpu(place):
    assert fused(place, "vit", "pictures", "no") > 0
    assert fused(place, "vit", "pictures", "bf16") == 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_texts_with_dropout_in_the_attention_are_left_as_they_are(place, precision):
    where = Place(model=str(place / "bert"), dataset=str(place / "texts"))
    problem = build(where, open_task(where), steps=2, training=Training(batch_size=4, precision=precision))
    assert problem.pretrained.config.attention_probs_dropout_prob > 0
    assert problem.pretrained.config._attn_implementation == "sdpa"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="nothing is chosen on this machine")
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_answers_and_what_is_saved_stay_the_same(tmp_path, family):
    config = CONFIGS[family]()
    config.architectures = []
    model = transformers.AutoModelForImageClassification.from_config(config).eval()
    pixels = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad(), quiet():
        before = model(pixel_values=pixels).logits
        model.save_pretrained(tmp_path / "before")
        attend_fast_(model, "bf16")
        assert model.config._attn_implementation == "eager"
        model.save_pretrained(tmp_path / "after")
        assert model(pixel_values=pixels).logits.allclose(before, atol=1e-5)
    first, second = (json.loads((tmp_path / at / "config.json").read_text()) for at in ("before", "after"))
    assert first == second


@pytest.mark.skipif(torch.accelerator.is_available(), reason="nothing is chosen on this machine")
def test_dropout_in_a_part_of_a_model_counts():
    for family in ("clip-classifier", "bert"):
        model = MODELS[family]()
        attend_fast_(model, "bf16")
        assert model.config._attn_implementation == ("eager" if family == "clip-classifier" else "sdpa")
    config = MODELS["clip-classifier"]().config
    config.vision_config.attention_dropout = 0.1
    model = transformers.CLIPForImageClassification(config)
    model.set_attn_implementation("sdpa")
    attend_fast_(model, "bf16")
    assert model.config._attn_implementation == "sdpa"
