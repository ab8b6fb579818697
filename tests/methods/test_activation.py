"""Wanda's scores against slow twins: every token by itself, padding that must not count, matrices stored either way."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor, nn

from conftest import same, tiny
from sparsesoup.core.errors import UserError
from sparsesoup.core.targets import Target, target_parameters, to_out_in_layout
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.methods import METHODS
from sparsesoup.methods.scores.activation import input_norms, wanda_scores
from sparsesoup.methods.scores.calibration import calibration_batches
from sparsesoup.training.config import TrainingConfig
from tiny_bert import bert, sentences

GPT2 = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32, pad_token_id=0)


def test_the_scores_of_the_tiny_net_are_those_of_a_loop_over_weights_and_rows() -> None:
    problem = tiny()
    model, rows = copy.deepcopy(problem.pretrained).eval(), calibration_batches(problem, 2)
    found = wanda_scores(problem, model, rows)
    state = {n: p.detach() for n, p in target_parameters(model, problem.targets).items()}
    with torch.no_grad():
        inputs: dict[str, list[Tensor]] = {name: [] for name in problem.targets}
        for i in [i for part in rows for i in part]:
            x = model.embed(problem.train.rows[i][0]).relu()
            for number, block in enumerate(model.blocks):
                inputs[f"blocks.{number}.weight"].append(x)
                x = block(x).relu() + x
            inputs["wide.weight"].append(x)
    for name, weight in state.items():
        for o in range(0, weight.shape[0], 7):
            for i in range(weight.shape[1]):
                norm = sum(float(x[i]) ** 2 for x in inputs[name]) ** 0.5
                assert float(found[name][o, i]) == pytest.approx(abs(float(weight[o, i])) * norm, rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2", GPT2])
def test_the_norms_are_those_of_each_sentence_alone_without_padding(family: object) -> None:
    problem = bert(torch.float64, family=family, attention="eager")
    model, rows = copy.deepcopy(problem.pretrained).eval(), calibration_batches(problem, 3)
    found = input_norms(problem, model, rows)
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in problem.targets}
    squares = {name: torch.zeros_like(norm) for name, norm in found.items()}

    def note(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].shape[:-1] == (1, length):  # a sentence, not DeBERTa's relative positions
                for token in inputs[0].detach()[0]:
                    squares[name] += token**2

        return hook

    for name, owner in owners.items():
        owner.register_forward_pre_hook(note(name))
    for i in [i for part in rows for i in part]:
        length = problem.train.lengths[i]
        model(input_ids=problem.train.rows[i][0][None])
    assert all(found[n].allclose(squares[n].sqrt(), rtol=1e-6) for n in found)
    assert all((problem.train.batch(part)["attention_mask"] == 0).any() for part in rows)


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_padding_does_not_change_the_scores(family: str) -> None:
    tight, loose = bert(torch.float64, family=family), bert(torch.float64, family=family, extra=7)
    rows = calibration_batches(tight, 3)
    assert rows == calibration_batches(loose, 3)
    assert loose.train.batch(rows[0])["input_ids"].shape[1] == tight.train.batch(rows[0])["input_ids"].shape[1] + 7
    one, other = wanda_scores(tight, tight.pretrained, rows), wanda_scores(loose, loose.pretrained, rows)
    assert all(t.allclose(other[n], rtol=1e-6, atol=1e-12) for n, t in one.items())
    blind = {n: t for n, t in loose.train.batch(rows[0]).items() if n != "attention_mask"}
    assert blind.keys() == {"input_ids", "labels"}


def test_without_a_mask_every_token_counts() -> None:
    problem = bert(torch.float64)
    data = problem.train
    bare = replace(data, collate=lambda rows: {n: t for n, t in data.collate(rows).items() if n != "attention_mask"})
    rows = [[i] for i in range(4)]  # each alone, so that there is no padding
    one, other = (input_norms(replace(problem, train=d), problem.pretrained, rows) for d in (data, bare))
    assert all(t.allclose(other[n], rtol=1e-6) for n, t in one.items())
    padded = sentences(24, 1, extra=5)
    bare = replace(padded, collate=lambda r: {n: t for n, t in padded.collate(r).items() if n != "attention_mask"})
    more = input_norms(replace(problem, train=bare), problem.pretrained, rows)
    first = next(iter(one))  # its inputs are the embeddings, before any attention mixes them
    assert (more[first] > one[first]).all()


def test_every_output_keeps_as_many_weights_also_where_the_matrix_is_stored_the_other_way_round() -> None:
    for family in ("bert", GPT2):
        problem = bert(family=family, attention="eager")
        ticket = METHODS["wanda"].run(problem, 0.6)
        counts = {n: m.sum(1) for n, m in to_out_in_layout(ticket.masks, problem.targets).items()}
        assert all(int(c.max() - c.min()) <= 1 for c in counts.values())
        assert any(t.transposed for t in problem.targets.values()) == (family is GPT2)
        assert ticket.sparsity == pytest.approx(0.6, abs=1e-3)
        assert all(m.shape == problem.targets[n].shape for n, m in ticket.masks.items())


def test_turning_twice_gives_the_same_back() -> None:
    targets = {"a": Target("other", (2, 3)), "b": Target("other", (2, 3), transposed=True)}
    table = {n: torch.arange(6.0).reshape(2, 3) for n in targets}
    once = to_out_in_layout(table, targets)
    assert {n: tuple(t.shape) for n, t in once.items()} == {"a": (2, 3), "b": (3, 2)}
    assert once["b"][2].tolist() == [2.0, 5.0]
    assert same(to_out_in_layout(once, targets), table)


def test_only_forward_passes_are_charged_and_no_hook_stays() -> None:
    graphs = []

    def predict(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        graphs.append(torch.is_grad_enabled())
        return net(batch["x"])

    problem = tiny(training=TrainingConfig(batch_size=16, precision="bf16"), predict=predict)
    model, rows = problem.start_run().model, calibration_batches(problem, 3)
    mixed = wanda_scores(problem, model, rows)
    cost = problem.meter.costs["score"]
    assert (cost.steps, cost.examples) == (0, 48)
    assert cost.flops == 2 * 48 * (8 * 20 + 2 * 20 * 20 + 20 * 60 + 60 * 3)
    assert graphs == [False] * 3
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.training
    plain = tiny()
    assert same(mixed, wanda_scores(plain, copy.deepcopy(plain.pretrained), rows))  # in float32, without dropout


class Attention(nn.Module):
    """A fused projection whose output matrix is no module that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True)])

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :]
        return self.layers[0](x, x, x)[0][:, 0, :3]


def test_a_matrix_whose_inputs_cannot_be_seen_is_refused_by_name() -> None:
    net = Attention()
    for name, width in (("layers.0.out_proj.weight", 8), ("layers.0.in_proj_weight", 8)):
        shape = tuple(net.get_parameter(name).shape)
        problem = tiny(pretrained=net, targets={name: Target("other", shape)})
        if name.endswith("in_proj_weight"):
            assert wanda_scores(problem, net, [[0, 1]])[name].shape == shape
            continue
        with pytest.raises(UserError, match=rf"^the inputs of {name} cannot be seen: .* {width} features") as caught:
            wanda_scores(problem, net, [[0, 1]])
        assert "\n" not in str(caught.value)
    stack = tiny(targets={"head.weight": Target("other", (1, 3, 60))})
    stack.pretrained.head.weight = nn.Parameter(stack.pretrained.head.weight[None])
    with pytest.raises(UserError, match=r"^the inputs of head\.weight cannot be seen"):
        wanda_scores(stack, stack.pretrained, [[0, 1]])


def test_an_input_that_is_not_finite_is_refused() -> None:
    problem = tiny()
    problem.pretrained.embed.bias.data[3] = torch.inf
    with pytest.raises(UserError, match=r"^the inputs' norm of blocks\.0\.weight has NaN or infinite values"):
        wanda_scores(problem, problem.pretrained, [[0, 1]])


def test_the_targets_of_gpt2_are_stored_the_other_way_round() -> None:
    found = find_prunable(transformers.GPT2ForSequenceClassification(GPT2))
    assert all(t.transposed for t in found.values())
