"""2:4 from the command line to the export: what is written, what torch makes of it, and what is refused."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.sparse import _semi_structured_conversions as layout
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from conftest import same
from sparsesoup import load_semi_structured
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.core.ticket import save_masks
from sparsesoup.exports import semi_structured, write_export
from sparsesoup.exports.semi_structured import (
    first_violation,
    missing_device_support,
    require_two_four,
    to_semi_structured_,
    why_unsupported,
)
from sparsesoup.exports.source import masks_from_zeros
from sparsesoup.hub.models.dummy_inputs import dummy_inputs, forward_outputs
from sparsesoup.hub.quiet import quiet_libraries
from tiny_hub import base_model, masks_of, run_of, tokenizer, weights_of

pytestmark = pytest.mark.integration

ABLE = not missing_device_support("cuda")
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """A run of gradual pruning to 2:4 on a BERT whose matrices are large enough, by the real command line."""
    out = tmp_path_factory.mktemp("wide")
    base_model("bert", **WIDE).save_pretrained(out / "base")
    tokenizer(True).save_pretrained(out / "base")
    words = ["gradual", "--method.scope", "2:4", "--model", out / "base", "--dataset", place / "reviews", "--steps", 12]
    assert main(["prune", *map(str, words), "--out", str(out / "runs")]) == 0
    return run_of(out / "runs")


def saved(folder, model):
    with quiet_libraries():
        model.save_pretrained(folder)
    save_masks(folder / "pruning", masks_from_zeros(model), {"method": "magnitude"})
    return folder


def refused(capsys, tmp_path, *words):
    before, _ = sorted(tmp_path.rglob("*")), capsys.readouterr()
    assert main(["export", *map(str, words), "--to", "semi-structured", "--out", str(tmp_path / "new" / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    return error


def test_a_run_with_scope_2_4_is_exported_as_it_is_and_its_matrices_are_named(run, tmp_path, capsys):
    assert json.loads((run / "report.json").read_text())["sparsity"]["reached"] == 0.5
    assert all((mask.reshape(-1, 4).sum(1) == 2).all() for mask in masks_of(run).values())
    assert main(["export", str(run), "--to", "semi-structured", "--out", str(tmp_path / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    table = json.loads((tmp_path / "out" / "semi_structured.json").read_text())
    assert len(table.pop("digest")) == 64
    assert table == {"format": 1, "matrices": [*masks_of(run)], "dense": {}}
    assert same(weights_of(tmp_path / "out"), weights_of(run / "model"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert same(dict(model.state_dict()), weights_of(run / "model"))
    assert "sparsesoup.load_semi_structured(folder)" in shown
    if not ABLE:
        assert "neither its answers nor its speed were tried on a GPU: no CUDA device is there" in shown
        assert json.loads((tmp_path / "out" / "export.json").read_text())["gpu"] is None
    assert (
        not {"quantization_config", "sparsity_config"} & json.loads((tmp_path / "out/config.json").read_text()).keys()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_gives_every_matrix_back_from_its_own_layout(run, dtype):
    weights = weights_of(run / "model")
    for name in masks_of(run):
        dense = weights[name].to(dtype)
        values, places = layout.sparse_semi_structured_from_dense_cutlass(dense)
        assert values.shape == (dense.shape[0], dense.shape[1] // 2)
        assert same({name: layout.sparse_semi_structured_to_dense_cutlass(values, places)}, {name: dense})


def test_an_export_is_exported_on(run, tmp_path):
    two = write_export(run, "semi-structured", tmp_path / "two").path
    packed = write_export(two, "packed", tmp_path / "packed").path
    again = write_export(packed, "semi-structured", tmp_path / "again").path
    assert same(weights_of(again), weights_of(run / "model"))
    assert (again / "semi_structured.json").read_text() == (two / "semi_structured.json").read_text()


def test_it_is_pushed_with_its_table_and_its_loader(run, tmp_path):
    folder = write_export(run, "semi-structured", tmp_path / "out").path
    assert main(["push", str(folder), "me/tiny", "--dry-run", "--out", str(tmp_path / "push")]) == 0
    assert (tmp_path / "push" / "semi_structured.json").read_text() == (folder / "semi_structured.json").read_text()
    text = (tmp_path / "push" / "README.md").read_text()
    assert "model = sparsesoup.load_semi_structured(folder)" in text
    assert "sparsesoup prune gradual --method.scope 2:4" in text


def test_what_is_not_2_4_is_refused_with_the_first_four_and_the_remedy(run, tmp_path, capsys):
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    weight = model.get_parameter("bert.encoder.layer.1.intermediate.dense.weight")
    with torch.no_grad():
        weight[5, 8:12] = torch.tensor([0.5, 0.0, -1.0, 2.0])
        weight[7, 0:4] = 1.0
    said = refused(capsys, tmp_path, saved(tmp_path / "source", model))
    assert (
        "bert.encoder.layer.1.intermediate.dense.weight is not 2:4: row 5 holds 0.5, 0, -1, 2 in columns 8 to 11"
        in said
    )
    assert "sparsesoup prune magnitude --method.scope 2:4" in said


def test_matrices_that_torch_has_no_kernel_for_stay_dense_and_are_named(tmp_path, capsys):
    model = base_model("bert", hidden_size=64, intermediate_size=96)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "encoder" in name and parameter.dim() == 2:
                parameter.view(-1, 2)[:, 0] = 0
    done = write_export(saved(tmp_path / "some", model), "semi-structured", tmp_path / "out")
    table = json.loads((done.path / "semi_structured.json").read_text())
    assert table["dense"] == {
        f"encoder.layer.{i}.output.dense.weight": "shape (64, 96) is no multiple of 32 x 64" for i in (0, 1)
    }
    assert len(table["matrices"]) == 10
    assert any("encoder.layer.0.output.dense.weight stays dense" in note for note in done.facts["notes"])
    said = refused(capsys, tmp_path, saved(tmp_path / "none", base_model("bert")))
    assert "no matrix of BertModel can be 2:4 on a GPU" in said
    assert "shape (16, 16) is no multiple of 32 x 64" in said


def test_only_weights_of_linear_layers_are_turned():
    turned = Conv1D(64, 64)
    assert why_unsupported(turned, turned.weight) == "it is no weight of an nn.Linear but of a Conv1D"
    plain = nn.Linear(64, 32)
    assert why_unsupported(plain, plain.weight) == ""
    small = nn.Linear(64, 16)
    assert why_unsupported(small, small.weight) == "shape (16, 64) is no multiple of 32 x 64"


@given(st.lists(st.lists(st.sampled_from([0.0, -0.0, 1.5, -2.0]), min_size=8, max_size=8), min_size=1, max_size=4))
def test_the_first_offence_is_the_one_that_a_reader_finds(rows):
    found = [
        (i, j, row[j : j + 4]) for i, row in enumerate(rows) for j in (0, 4) if sum(v != 0 for v in row[j : j + 4]) > 2
    ]
    assert first_violation(torch.tensor(rows)) == (found[0] if found else None)


def test_the_loader_refuses_other_devices_in_one_line(run, tmp_path):
    folder = write_export(run, "semi-structured", tmp_path / "out").path
    for device, why in {"cpu": "cpu is no CUDA device", "nowhere": "nowhere is no device"}.items():
        with pytest.raises(
            UserError, match=rf"need a CUDA device of compute capability 8\.0 or more: {why}; here from_pre"
        ):
            load_semi_structured(folder, device)
    with pytest.raises(UserError, match=r"of type torch\.float16 or torch\.bfloat16, got torch\.float32"):
        load_semi_structured(folder, dtype=torch.float32)
    with pytest.raises(UserError, match=r"no .*semi_structured\.json: give a folder that"):
        load_semi_structured(run / "model")
    for text, why in (("[]", "damaged"), ('{"format": 2}', "has format 2; this version reads 1"), ("{", "damaged")):
        (folder / "semi_structured.json").write_text(text)
        with pytest.raises(UserError, match=why):
            load_semi_structured(folder)


def test_a_model_that_was_trained_on_is_refused_before_torch_drops_weights():
    model = nn.Sequential(nn.Linear(64, 32))
    with pytest.raises(UserError, match=r"0\.weight is not 2:4: row 0 holds"):
        to_semi_structured_(model, ["0.weight"])
    with pytest.raises(UserError, match=r"the model has no 1\.weight"):
        to_semi_structured_(model, ["1.weight"])
    assert type(model[0].weight) is nn.Parameter


def on_the_cpu(weight):
    """Torch's form in the layout of CUTLASS, which it can make without a GPU, though not multiply."""
    values, places = layout.sparse_semi_structured_from_dense_cutlass(weight)
    rest = {"packed_t": None, "meta_t": None, "compressed_swizzled_bitmask": None}
    return torch.sparse.SparseSemiStructuredTensorCUTLASS(weight.shape, packed=values, meta=places, **rest)


def test_turned_weights_give_themselves_back_and_reach_the_sparse_kernel(run, monkeypatch):
    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", on_the_cpu)
    dense = AutoModelForSequenceClassification.from_pretrained(run / "model", dtype=torch.float16)
    sparse = copy.deepcopy(dense)
    to_semi_structured_(sparse, masks_of(run), verify=True)
    for name in masks_of(run):
        weight = sparse.get_parameter(name)
        assert isinstance(weight, torch.sparse.SparseSemiStructuredTensor)
        assert torch.equal(weight.to_dense(), dense.get_parameter(name))
    with pytest.raises(NotImplementedError, match="sparse_semi_structured"):
        forward_outputs(sparse, dummy_inputs(dense))
    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", lambda weight: on_the_cpu(2 * weight))
    with pytest.raises(UserError, match=r"torch does not give \S+query\.weight back from its 2:4 form on cpu"):
        to_semi_structured_(dense, masks_of(run), verify=True)


@pytest.mark.gpu
@pytest.mark.skipif(not ABLE, reason="needs a CUDA device of compute capability 8.0 or more")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_the_answers_are_those_of_the_dense_model(run, dtype, tmp_path):
    done = write_export(run, "semi-structured", tmp_path / "out")
    assert done.facts["gpu"]["dense_ms"] > 0
    sparse = load_semi_structured(done.path, dtype=dtype)
    dense = AutoModelForSequenceClassification.from_pretrained(done.path, dtype=dtype).to("cuda").eval()
    batch = dummy_inputs(dense, 8, 32)
    for one, other in zip(forward_outputs(dense, batch), forward_outputs(sparse, batch), strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    for name in masks_of(run):
        weight = sparse.get_parameter(name)
        assert isinstance(weight, torch.sparse.SparseSemiStructuredTensor)
        require_two_four(name, dense.get_parameter(name))
        assert torch.equal(weight.to_dense(), dense.get_parameter(name))
