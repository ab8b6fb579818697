"""A model is trained with the attention that is fast where it is trained, and saved as if nothing had been chosen."""

import json

import pytest
import torch
import transformers
from torch.profiler import profile

from sparsesoup.hub.build import ModelAndDataConfig, build_problem, open_task
from sparsesoup.hub.models.loading import use_faster_attention_
from sparsesoup.hub.quiet import quiet_libraries
from sparsesoup.training.config import TrainingConfig
from tiny_images import CONFIGS, SIDE, checkpoint, parquet


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A tiny ViT and pictures; no test writes to it."""
    folder = tmp_path_factory.mktemp("attention")
    checkpoint(folder / "vit")
    parquet(folder / "pictures")
    return folder


def built(model, dataset, precision):
    """A problem of two steps."""
    where = ModelAndDataConfig(model=str(model), dataset=str(dataset))
    return build_problem(where, open_task(where), steps=2, training=TrainingConfig(batch_size=4, precision=precision))


def fused(problem):
    """How often a training step calls torch's fused attention, forth and back."""
    state = problem.start_run()
    with profile() as calls:
        problem.training_loss(state.model, problem.train.batch(range(4))).backward()
    assert any("backward" in event.key.lower() for event in calls.key_averages())
    return sum(event.count for event in calls.key_averages() if "flash_attention" in event.key)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the fused attention is fast on this machine")
def test_images_are_learnt_in_bf16_without_fused_attention_on_a_cpu(seeing):
    assert fused(built(seeing / "vit", seeing / "pictures", "no")) > 0
    assert fused(built(seeing / "vit", seeing / "pictures", "bf16")) == 0


def test_models_of_texts_are_left_as_they_are(place):
    problem = built(place / "bert", place / "reviews", "bf16")
    assert problem.pretrained.config._attn_implementation == "sdpa"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="nothing is chosen on this machine")
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_answers_and_what_is_saved_stay_the_same(tmp_path, family):
    config = CONFIGS[family]()
    config.architectures = []
    model = transformers.AutoModelForImageClassification.from_config(config).eval()
    pixels = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad(), quiet_libraries():
        before = model(pixel_values=pixels).logits
        model.save_pretrained(tmp_path / "before")
        use_faster_attention_(model, "bf16")
        assert model.config._attn_implementation == "eager"
        model.save_pretrained(tmp_path / "after")
        assert model(pixel_values=pixels).logits.allclose(before, atol=1e-5)
    first, second = (json.loads((tmp_path / at / "config.json").read_text()) for at in ("before", "after"))
    assert first == second
