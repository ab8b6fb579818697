"""Attention maps as targets: those of the model itself, whatever kernel computes them; blocks of a teacher in place."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tiny_images
from conftest import tiny
from sparsesoup.core.errors import UserError
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.training.attention_maps import attention_distance, attention_layers, attention_maps_of
from sparsesoup.training.config import DistillConfig
from sparsesoup.training.distillation import block_names, distillation_objective
from sparsesoup.training.grafting import grafted_blocks
from tiny_bert import bert


def maps_of(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    layers = attention_layers(find_prunable(model))
    with torch.no_grad(), attention_maps_of(dict.fromkeys(layers, model), layers) as maps:
        model(**inputs)
    return maps(inputs.get("attention_mask"))


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_maps_of_text_are_those_that_the_model_returns_padding_left_out(family: str) -> None:
    problem, eager = (bert(torch.float64, family=family, attention=kind) for kind in ("sdpa", "eager"))
    batch = {k: t for k, t in problem.train.batch(range(6)).items() if k != "labels"}
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        wanted = eager.pretrained.eval()(**batch, output_attentions=True).attentions
    found, real = maps_of(problem.pretrained.eval(), batch), batch["attention_mask"].bool()[:, None, :, None]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one * real, other * real, rtol=0, atol=1e-10)


def test_maps_of_images_are_those_that_the_model_returns() -> None:
    model: Any = transformers.ViTForImageClassification(tiny_images.CONFIGS["vit"]()).eval()
    pixels = torch.randn(3, 3, tiny_images.SIDE, tiny_images.SIDE)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(pixel_values=pixels, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for one, other in zip(maps_of(model, {"pixel_values": pixels}), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_the_distance_counts_pairs_of_real_tokens_and_every_row_alike() -> None:
    torch.manual_seed(0)
    one, other, mask = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    first = (one[0, :, :2, :2] - other[0, :, :2, :2]).square().mean()
    second = (one[1] - other[1]).square().mean()
    assert float(attention_distance(one, other, mask)) == pytest.approx(float(first + second) / 2)
    assert float(attention_distance(one, other)) == pytest.approx(float((one - other).square().mean()))


def test_every_method_may_distil_attention_and_a_model_into_itself_costs_nothing_more() -> None:
    problem = bert()
    model, batch = copy.deepcopy(problem.pretrained).eval(), problem.train.batch(range(6))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule("bert.encoder.layer.1.attention.self.query").weight.mul_(2.0)
    plain, own, far = (
        distillation_objective(problem, t, DistillConfig(teacher="x", alpha=0.0, attention=a))(
            model, batch
        ).total.item()
        for t, a in ((other, 0.0), (model, 9.0), (other, 9.0))
    )
    assert own == pytest.approx(plain, abs=1e-6)
    assert far > plain + 1e-3


def test_a_model_without_queries_and_keys_is_refused() -> None:
    with pytest.raises(UserError, match=r"no separate query and key matrices; set train\.distill"):
        distillation_objective(tiny(), tiny().pretrained, DistillConfig(teacher="x", attention=1.0))


def test_a_grafted_block_answers_as_the_teachers_and_is_put_back_even_after_an_error() -> None:
    problem, torch_seed = bert(), 3
    torch.manual_seed(torch_seed)
    student, teacher = copy.deepcopy(problem.pretrained).eval(), copy.deepcopy(problem.pretrained).eval()
    with torch.no_grad():
        for p in teacher.get_submodule("bert.encoder").parameters():
            p.add_(torch.randn_like(p) * 0.1)
    batch, names = problem.train.batch(range(6)), block_names(problem.targets)
    own, other = (problem.predict(m, batch) for m in (student, teacher))
    with grafted_blocks(student, teacher, names):
        assert problem.predict(student, batch).equal(other)
    assert problem.predict(student, batch).equal(own)
    with pytest.raises(RuntimeError), grafted_blocks(student, teacher, names):
        raise RuntimeError
    assert problem.predict(student, batch).equal(own)
    with grafted_blocks(student, teacher, names[:1]):
        problem.predict(student, batch).sum().backward()
    grads = {n: p.grad for n, p in student.named_parameters() if n.startswith("bert.encoder.layer")}
    assert all((g is None) == n.startswith(names[0]) for n, g in grads.items())
    assert all(p.grad is None for p in teacher.parameters())
