"""Graphs for other engines: they answer as the masked model, for any number and length of texts, without sparsesoup."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from sparsesoup import export
from sparsesoup.core.errors import UserError
from sparsesoup.exports import graphs
from sparsesoup.exports.graphs import CLOSE_IN_HALF, compare_outputs, graph_inputs, opset_of
from sparsesoup.exports.runtimes import EXACT, open_onnx, require_library
from sparsesoup.hub.models.dummy_inputs import dummy_inputs, forward_outputs
from sparsesoup.hub.models.layer_layouts import prunable_layers
from sparsesoup.hub.quiet import quiet_libraries
from tiny_exports import EVEN, SOME, close, export_command, pruned, refused, saved, stock, trace_once
from tiny_hub import tokenizer
from tiny_models import model_of

pytestmark = pytest.mark.integration

openvino = require_library("openvino")  # which reports to its makers where it is imported otherwise
LARGE = graphs.LARGE
CASES = [  # family, what is gone, type of its weights, bytes above which they lie beside the file, settings
    ("roberta", SOME, torch.float32, LARGE, {}),
    ("xlm-roberta", SOME, torch.float32, LARGE, {}),  # RoBERTa's blocks, with a span head
    ("electra", EVEN, torch.float32, LARGE, {"opset": 18}),
    ("distilbert", {}, torch.float32, 1000, {}),
    ("vit", SOME, torch.float64, LARGE, {}),
]  # test_verifying.py has BERT, and below is CLIP


def asked(model, names, rows, length):
    """Random inputs, of which some rows are padded on the left."""
    batch = dummy_inputs(model, rows, length, seed=length)
    if "attention_mask" in batch:
        batch["attention_mask"][-1, 0] = int(rows == 1)  # one token has to be there
    return {name: t for name, t in batch.items() if name in names}


def said_alone(folder) -> str:
    """What the lines in export.json print of their answers, in a fresh process that cannot import sparsesoup."""
    lines = json.loads((folder / "export.json").read_text())["example"]
    end = "import sys\nassert 'sparsesoup' not in sys.modules\nprint(len(answers), answers[0].shape[0])"
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"CI": "true"}
    call = [sys.executable, "-I", "-c", "\n".join([*lines, end])]
    return subprocess.run(call, check=True, env=clean, cwd=folder, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("name", "plan", "dtype", "large", "more"),
    [pytest.param(*case, id=case[0], marks=[pytest.mark.slow] * (case[0] == "roberta")) for case in CASES],
)
def test_onnx_runtime_answers_as_the_masked_model(name, plan, dtype, large, more, tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "LARGE", large)
    source = pruned(tmp_path / "source", name, plan, dtype)
    if name == "distilbert":
        tokenizer(False).save_pretrained(source)
    written = export(source, "onnx", tmp_path / "out", **more)
    model, facts, file = stock(source).float(), written.facts, written.path / "model.onnx"
    session = onnxruntime.InferenceSession(file)
    assert [i.name for i in session.get_inputs()] == facts["inputs"]
    for rows, length in ((1, 3), (7, 5), (3, 16)):
        batch = asked(model, facts["inputs"], rows, length)
        found = session.run(None, {n: t.numpy() for n, t in batch.items()})
        assert close(found, [t.numpy() for t in forward_outputs(model, batch)], 1e-4), (rows, length)
    assert facts["largest_difference"] < 1e-4
    assert (facts["sizes"]["parameters"][1] < facts["sizes"]["parameters"][0]) == bool(plan)
    assert ("nothing was cut out" in facts["notes"][0]) == (not plan)
    assert any("its weights were float64" in note for note in facts["notes"]) == (dtype is torch.float64)
    assert not [*written.path.glob("*.safetensors")]
    beside = [path for path in (file.with_name("model.onnx.data"),) if path.exists()]
    assert bool(beside) == (large < LARGE)
    assert facts["sizes"]["weights"][1] == sum(path.stat().st_size for path in (file, *beside))
    assert not [p for p in (transformers, graphs) if str(Path(p.__file__).parent).encode() in file.read_bytes()]
    onnx.checker.check_model(file, full_check=True)
    assert onnx.load(file).opset_import[0].version == more.get("opset", 23)
    config = json.loads((written.path / "config.json").read_text())
    assert "compact_config" not in config
    assert config["architectures"] == [type(model).__name__]
    if name == "distilbert":
        assert said_alone(written.path) == "1 2\n"  # logits of the two texts of the example


SMALL = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "d_model": 16,
         "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 3}  # fmt: skip
OTHERS = {  # families of which nothing is cut out
    "bart": lambda: transformers.BartForSequenceClassification(
        transformers.BartConfig(**SMALL, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
    ),
    "t5": lambda: transformers.T5ForSequenceClassification(
        transformers.T5Config(**SMALL, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ),
    "llama": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_sample_row_ends_in_the_end_of_text_that_its_head_reads(name):
    model = OTHERS[name]().eval()
    batch = dummy_inputs(model, 3, 7)
    ends = batch["attention_mask"].sum(1) - 1
    assert (batch["input_ids"] == 3).nonzero()[:, 1].tolist() == ends.tolist() == [4, 6, 6]
    assert (batch["input_ids"] == 0).equal(batch["attention_mask"] == 0)
    assert forward_outputs(model, batch)[0].shape[0] == 3


@pytest.mark.parametrize("name", ["bart", "llama"])
def test_heads_that_read_the_end_and_rotary_positions_become_a_graph(name, tmp_path):
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    saved(tmp_path / "source", model, method="magnitude", seed=0)
    assert export_command(tmp_path / "source", "--to", "onnx", "--out", tmp_path / "out") == 0
    batch = dummy_inputs(model, 3, 11)
    found = [*open_onnx(tmp_path / "out" / "model.onnx")({n: t.numpy() for n, t in batch.items()}).values()]
    assert close(found, [t.numpy() for t in forward_outputs(model, batch)], 1e-4)


def test_an_opset_whose_rotary_positions_cannot_be_run_is_refused_at_once():
    assert [opset_of(OTHERS["llama"](), asked) for asked in (0, 18, 22)] == [22, 18, 22]
    assert [opset_of(model_of("bert"), asked) for asked in (0, 23)] == [23, 23]
    with pytest.raises(UserError, match=r"LlamaForSequenceClassification has rotary positions.* set opset 22 or"):
        graphs.trace_model(OTHERS["llama"](), ["input_ids", "attention_mask"], 23)


def test_both_engines_answer_as_the_masked_model_of_images(tmp_path, monkeypatch):
    """test_verifying.py has one of texts."""
    trace_once(monkeypatch)
    source = pruned(tmp_path / "source", "clip-vision")
    model = stock(source)
    cases = [("onnx", (), 1e-4, 0), ("openvino", (), 1e-4, 5), ("openvino", ("--fp16",), CLOSE_IN_HALF, 3)]
    for to, words, tolerance, size in cases:
        folder = tmp_path / "-".join((to, *words))
        assert export_command(source, "--to", to, "--out", folder, *words) == 0
        facts = json.loads((folder / "export.json").read_text())
        if to == "onnx":
            ask = open_onnx(folder / "model.onnx")
        else:
            ask = openvino.Core().compile_model(folder / "model.xml", "CPU", EXACT)
            assert (folder / "model.bin").stat().st_size / facts["sizes"]["parameters"][1] < size
        for rows, length in ((1, 3), (7, 5), (3, 16)):
            batch = asked(model, facts["inputs"], rows, length)
            found = ask({n: t.numpy() for n, t in batch.items()})
            assert close([*found.values()], [t.numpy() for t in forward_outputs(model, batch)], tolerance), (to, rows)
        assert any("rounded to float16" in note for note in facts["notes"]) == bool(words)
    assert said_alone(tmp_path / "openvino") == "2 1\n"  # features and their pool, of one image


def test_openvino_reads_heads_that_attend_to_all_alike(tmp_path):
    """Heads whose queries and keys are gone: a matrix without rows, which OpenVINO takes for a scalar."""
    model = model_of("bert", dtype=torch.float32)
    with torch.no_grad():
        prunable_layers(model)[1].module_of("key").weight.zero_()
    source = saved(tmp_path / "source", model, method="magnitude", seed=0)
    written = export(source, "openvino", tmp_path / "out")
    assert written.facts["largest_difference"] < 1e-4


def test_a_graph_that_openvino_cannot_read_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    source = pruned(tmp_path / "source", "bert")
    plain = graphs.trace_source

    def trace(source):
        traced = plain(source)
        traced.program.model.graph[-1].domain = "nobody's"
        return traced

    monkeypatch.setattr(graphs, "trace_source", trace)
    said = refused(capsys, tmp_path, source, "--to", "openvino", "--out", tmp_path / "out")
    assert "OpenVINO cannot read the graph: " in said
    assert "nobody's" in said
    assert said.endswith("; export it --to onnx or compact\n")


def test_a_graph_asks_for_no_token_types_that_its_tokenizer_does_not_make(tmp_path):
    model = model_of("bert")
    assert graph_inputs(model, tmp_path) == ["input_ids", "attention_mask", "token_type_ids"]
    for pairs in (False, True):
        with quiet_libraries():
            model.save_pretrained(tmp_path)
        tokenizer(pairs).save_pretrained(tmp_path)
        assert ("token_type_ids" in graph_inputs(model, tmp_path)) == pairs


@pytest.mark.parametrize(
    ("to", "missing", "extra"),
    [("onnx", "onnxruntime", "onnx"), ("onnx", "onnxscript", "onnx"), ("openvino", "openvino", "openvino")],
)
def test_a_missing_library_is_told_with_the_extra_that_brings_it(to, missing, extra, tmp_path, capsys, monkeypatch):
    source = pruned(tmp_path / "source", "bert")
    monkeypatch.setitem(sys.modules, missing, None)
    said = refused(capsys, tmp_path, source, "--to", to, "--out", tmp_path / "new" / "out")
    assert f"{missing} is not installed" in said
    assert f"pip install 'sparsesoup[{extra}]'" in said


def test_a_graph_that_cannot_be_run_is_told_in_one_line(tmp_path, capfd):
    shape = onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, (1,), [7])
    node = onnx.helper.make_node("Reshape", ["x", "shape"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in "xy")
    opset = onnx.helper.make_opsetid("", 18)
    graph = onnx.helper.make_graph([node], "g", [x], [y], [shape])
    made = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    onnx.save(made, tmp_path / "model.onnx")
    with pytest.raises(UserError, match=r"^ONNX Runtime cannot run the graph: .*Reshape.* opset 22 may do$"):
        open_onnx(tmp_path / "model.onnx")({"x": np.ones(3, np.float32)})
    assert capfd.readouterr().err == ""


def test_an_opset_that_is_not_written_is_refused(tmp_path, capsys):
    source = pruned(tmp_path / "source", "bert")
    said = refused(capsys, tmp_path, source, "--to", "onnx", "--opset", "7", "--out", tmp_path / "new" / "out")
    assert "opset: must be 18 to 23, got 7" in said


def test_a_library_that_reports_its_use_does_not_when_it_is_imported_here(tmp_path, monkeypatch):
    (tmp_path / "reporting.py").write_text(
        "import os\nseen = os.environ.get('CI')\n"
    )  # as openvino_telemetry looks it up
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("CI", raising=False)
    assert require_library("reporting").seen == "true"
    assert "CI" not in os.environ


def test_whatever_the_exporter_stumbles_over_is_told_in_one_line(tmp_path, capsys):
    """Here a feed-forward part in chunks, for which it ends with an error of onnx_ir."""
    source = pruned(tmp_path / "source", "bert")
    (path,) = source.rglob("config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chunk_size_feed_forward": 4}))
    said = refused(capsys, tmp_path, source, "--to", "onnx", "--out", tmp_path / "new" / "out")
    assert "torch cannot make a graph of BertForSequenceClassification" in said
    assert "export it --to compact or packed" in said


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_an_engine_that_answers_otherwise_is_refused(wrong):
    model = model_of("bert", dtype=torch.float32)

    def ask(batch):
        inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
        return {
            "logits": forward_outputs(model, inputs)[0].numpy()
            + np.float32(wrong if len(batch["input_ids"]) == 5 else 0)
        }

    with pytest.raises(UserError, match="the graph of BertForSequenceClassification answers otherwise than torch, by"):
        compare_outputs(model, [*dummy_inputs(model)], ask, 1e-3)
