"""`sparsesoup export` by its command line: what it writes, that it loads without us, and what it refuses."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file

from conftest import same
from sparsesoup import export, load_compact, load_packed
from sparsesoup.cli.tables import print_export
from sparsesoup.core.errors import UserError
from sparsesoup.core.ticket import load_masks
from sparsesoup.exports import FORMATS
from sparsesoup.hub.models.cut_layers import layer_widths
from sparsesoup.hub.models.dummy_inputs import dummy_inputs, forward_outputs
from sparsesoup.hub.models.layer_layouts import prunable_layers
from sparsesoup.hub.models.loading import load_as_saved
from sparsesoup.hub.quiet import quiet_libraries
from tiny_exports import EVEN, FEWER, NONE, SOME, close, export_command, pruned, refused, saved, stock
from tiny_hub import CONFIGS, base_model, older, tokenizer
from tiny_models import FREE_HEADS, HEADS, LAYERS, MODELS, UNITS

pytestmark = pytest.mark.integration

TORCH = ("dense", "packed", "compact")  # the formats that need no other engine
ALONE = """
import json, sys
import numpy, torch, transformers
for folder in sys.argv[1:]:
    name = json.load(open(folder + "/config.json"))["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, attn_implementation="sdpa").eval()
    batch = {key: torch.from_numpy(value) for key, value in numpy.load(folder + ".in.npz").items()}
    with torch.no_grad():
        found = [v for v in model(**batch, return_dict=True).values() if torch.is_tensor(v)]
    numpy.savez(folder + ".out.npz", *[v.numpy() for v in found])
assert "sparsesoup" not in sys.modules
"""


@pytest.mark.parametrize("name", MODELS)
def test_every_format_of_every_family_answers_as_the_source(name, tmp_path, capsys):
    source = pruned(tmp_path / "source", name)
    model = stock(source)
    batch = dummy_inputs(model)
    expected = [t.numpy() for t in forward_outputs(model, batch)]
    loaders = {"dense": stock, "packed": load_packed, "compact": load_compact}
    for to, load in loaders.items():
        assert export_command(source, "--to", to, "--out", tmp_path / to) == 0
        found = [t.numpy() for t in forward_outputs(load(tmp_path / to), batch)]
        assert close(found, expected, 0 if to != "compact" else 1e-4), to
    assert type(load_compact(tmp_path / "compact")) is type(model)
    for to in ("dense", "packed"):
        assert same(loaders[to](tmp_path / to).state_dict(), model.state_dict()), to


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_which_no_head_and_no_unit_is_left_is_exported_as_any_other(name, tmp_path):
    source = pruned(tmp_path / "source", name, NONE)
    model = stock(source)
    batch = dummy_inputs(model)
    expected = [t.numpy() for t in forward_outputs(model, batch)]
    assert export_command(source, "--to", "compact", "--out", tmp_path / "compact") == 0
    assert export_command(tmp_path / "compact", "--to", "packed", "--out", tmp_path / "packed") == 0
    assert export_command(tmp_path / "packed", "--to", "dense", "--out", tmp_path / "again") == 0
    for folder, load in (("compact", load_compact), ("packed", load_packed), ("again", load_compact)):
        assert close([t.numpy() for t in forward_outputs(load(tmp_path / folder), batch)], expected, 1e-4), folder


def test_a_fresh_process_without_sparsesoup_loads_what_is_stock_and_answers_the_same(tmp_path):
    """One that cannot even import sparsesoup."""
    expected = {}
    for name, plan in (("bert", EVEN), ("distilbert", EVEN), ("vit", FEWER), ("clip-vision", EVEN)):
        source = pruned(tmp_path / name, name, plan)
        model = stock(source)
        batch = dummy_inputs(model)
        for to in ("dense", "compact"):
            written = export(source, to, tmp_path / f"{name}-{to}")
            config = json.loads((written.path / "config.json").read_text())
            assert not {"compact_config", "quantization_config", "sparsity_config"} & config.keys()
            assert written.facts.get("stock", True)
            files = [load_file(folder / "model.safetensors") for folder in (written.path, source)]
            assert files[0].keys() == files[1].keys()
            np.savez(f"{written.path}.in.npz", **{key: value.numpy() for key, value in batch.items()})
            expected[written.path] = [t.numpy() for t in forward_outputs(model, batch)]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-I", "-c", ALONE, *map(str, expected)], check=True, env=clean, cwd=tmp_path)
    for folder, answers in expected.items():
        assert close([*np.load(f"{folder}.out.npz").values()], answers, 1e-4), folder


@pytest.mark.parametrize("name", MODELS)
def test_uniform_widths_are_stock_where_the_stock_class_can_say_them(name, tmp_path):
    even = export(pruned(tmp_path / "even", name, EVEN), "compact", tmp_path / "out")
    assert even.facts["stock"] == (name not in ("clip", "clip-classifier"))  # these have two configs in one
    fewer = export(pruned(tmp_path / "fewer", name, FEWER), "compact", tmp_path / "heads")
    assert fewer.facts["stock"] == (name in FREE_HEADS)
    said = "stock classes do not know layers of such widths; --stock keeps to what they do"
    assert (said in fewer.facts["notes"]) != fewer.facts["stock"]
    if even.facts["stock"]:
        assert {row["units"] for row in layer_widths(stock(even.path)).values()} == {3}


def test_stock_keeps_heads_and_evens_units_out(tmp_path, capsys):
    plan = {"heads": SOME["heads"], "units": [["in"] * UNITS, ["stays", "out"] * 3, ["in"] * 4 + ["out", "stays"]]}
    source = pruned(tmp_path / "source", "roberta", plan)
    written = export(source, "compact", tmp_path / "out", stock=True)
    assert written.facts["stock"]
    model = stock(written.path)
    assert [*layer_widths(model).values()] == [{"heads": HEADS, "units": 3}] * LAYERS
    one, other = (forward_outputs(m, dummy_inputs(model)) for m in (model, stock(source)))
    assert close([t.numpy() for t in one], [t.numpy() for t in other], 1e-4)
    towers = pruned(tmp_path / "towers", "clip", {"units": 2 * EVEN["units"]})
    said = refused(capsys, tmp_path, towers, "--to", "compact", "--stock", "--out", tmp_path / "new")
    assert "CLIPModel knows no other widths than it has" in said
    full = pruned(tmp_path / "full", "roberta", SOME)  # whose last layer needs all units
    said = refused(capsys, tmp_path, full, "--to", "compact", "--stock", "--out", tmp_path / "new")
    assert "a layer needs all of its 6 feed-forward units" in said


def test_a_stock_class_refuses_layers_it_does_not_know_instead_of_drawing_weights(tmp_path):
    for number, plan in enumerate(({"heads": [["in"] * HEADS]}, {"units": [["in"] * UNITS]}, SOME)):
        written = export(pruned(tmp_path / f"{number}", "bert", plan), "compact", tmp_path / f"out-{number}")
        assert not written.facts["stock"]
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            stock(written.path)


def test_a_compact_model_can_be_saved_loaded_and_exported_again(tmp_path):
    source = pruned(tmp_path / "source", "bert", dtype=torch.float64)
    one = export(source, "compact", tmp_path / "one").path
    model = load_compact(one)
    assert model.dtype == torch.float64
    with quiet_libraries():
        model.save_pretrained(tmp_path / "saved")
    assert same(load_compact(tmp_path / "saved").state_dict(), model.state_dict())
    batch = dummy_inputs(model)
    expected = [t.numpy() for t in forward_outputs(stock(source), batch)]
    packed = export(one, "packed", tmp_path / "packed").path
    dense = export(packed, "dense", tmp_path / "dense").path
    for found in (model, load_packed(packed), load_compact(dense)):
        assert close([t.numpy() for t in forward_outputs(found, batch)], expected, 1e-10)
    with pytest.raises(UserError, match="is compact already"):
        export(one, "compact", tmp_path / "twice")


def test_a_compact_model_that_becomes_uniform_is_stock_and_forgets_its_widths(tmp_path):
    one = export(pruned(tmp_path / "source", "bert", {"units": EVEN["units"][:1]}), "compact", tmp_path / "one").path
    model = load_compact(one)
    with torch.no_grad():
        for layer in prunable_layers(model)[1:]:
            layer.module_of("up").weight[:3] = 0
    saved(tmp_path / "saved", model)
    two = export(tmp_path / "saved", "compact", tmp_path / "two")
    assert two.facts["stock"]
    assert "compact_config" not in json.loads((two.path / "config.json").read_text())
    one, other = (forward_outputs(m, dummy_inputs(model)) for m in (model, stock(two.path)))
    assert close([t.numpy() for t in one], [t.numpy() for t in other], 1e-4)


def test_masks_of_an_export_are_those_of_its_weights(tmp_path):
    source = pruned(tmp_path / "source", "bert")
    dense = export(source, "dense", tmp_path / "dense").path
    assert same(load_masks(dense)[0], load_masks(source)[0])
    back = export(export(source, "packed", tmp_path / "packed").path, "dense", tmp_path / "back").path
    assert same(load_masks(back)[0], load_masks(source)[0])
    assert (back / "model.safetensors").stat().st_size == (source / "model.safetensors").stat().st_size
    compact = export(source, "compact", tmp_path / "compact").path
    masks, facts = load_masks(compact)
    params = dict(load_compact(compact).named_parameters())
    assert all(same({"": mask}, {"": params[name].detach() != 0}) for name, mask in masks.items())
    assert facts["method"] == "magnitude"
    assert "origin" not in facts


def test_sizes_and_what_was_removed_are_told(tmp_path, capsys):
    source = pruned(tmp_path / "source", "bert")
    export_command(source, "--to", "compact", "--out", tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    model, narrow = stock(source), load_compact(tmp_path / "out")
    count = [sum(p.numel() for p in m.parameters()) for m in (model, narrow)]
    assert facts["sizes"]["parameters"] == count
    assert facts["sizes"]["weights"] == [(f / "model.safetensors").stat().st_size for f in (source, tmp_path / "out")]
    assert facts["layers"] == [
        {"layer": "encoder.layer.0", "heads": [4, 1], "units": [6, 0]},
        {"layer": "encoder.layer.1", "heads": [4, 0], "units": [6, 3]},
        {"layer": "encoder.layer.2", "heads": [4, 4], "units": [6, 6]},
    ]
    assert facts["source"] == {"method": "magnitude", "model": "bert", "seed": 0}
    listed = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert set(facts["files"]) == listed
    shown = " ".join(capsys.readouterr().out.split())
    assert f"parameters {count[0]:,} {count[1]:,}" in shown
    assert "encoder.layer.1 0 of 4 3 of 6" in shown
    assert "load sparsesoup.load_compact(folder)" in shown


def test_the_line_that_loads_an_export_can_be_copied_from_a_narrow_terminal():
    console = Console(width=30, file=io.StringIO())
    load = 'openvino.Core().compile_model("model.xml", "CPU", {})'
    print_export({"sizes": {"weights": (2, 1)}, "layers": [], "notes": [], "load": load}, console)
    assert console.file.getvalue().splitlines()[-1] == f"load    {load}"


@pytest.mark.parametrize(("words", "bound"), [((), 0.14), (("--dtype", "bf16"), 0.085)])
def test_packed_encoders_take_the_promised_share_at_ninety_percent(words, bound, tmp_path):
    config = CONFIGS["bert"](hidden_size=64, intermediate_size=256)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which are 0 and 1 in a fresh model
            parameter.normal_()
        for layer in prunable_layers(model):
            for role in ("query", "key", "value", "output", "up", "down"):
                weight = layer.module_of(role).weight
                weight.view(-1)[torch.randperm(weight.numel())[: round(0.9 * weight.numel())]] = 0
    saved(tmp_path / "source", model)
    assert export_command(tmp_path / "source", "--to", "packed", "--out", tmp_path / "out", *words) == 0
    before, after = json.loads((tmp_path / "out" / "export.json").read_text())["sizes"]["encoder"]
    assert before == 4 * sum(m.numel() for m in load_masks(tmp_path / "source")[0].values())
    assert after / before <= bound
    loaded = load_packed(tmp_path / "out").state_dict()
    rounded = {
        n: p.detach() if p.dim() < 2 or not words else p.detach().bfloat16().float()
        for n, p in model.named_parameters()
    }
    assert same({n: loaded[n] for n in rounded}, rounded)


def test_tokenizers_come_along_and_pickles_do_not(tmp_path):
    source = pruned(tmp_path / "source", "bert")
    tokenizer(True).save_pretrained(source)
    (source / "training_args.bin").write_bytes(b"pickle")
    for to in TORCH:
        out = export(source, to, tmp_path / to).path
        assert transformers.AutoTokenizer.from_pretrained(out)("good film")["input_ids"]
        assert not [*out.rglob("*.bin")]


def test_weights_in_several_files_are_exported_whole(tmp_path):
    source = pruned(tmp_path / "source", "bert")
    model = stock(source)
    with quiet_libraries():
        (source / "model.safetensors").unlink()
        model.save_pretrained(source, max_shard_size="10KB")
    assert len([*source.glob("model-*.safetensors")]) > 1
    for to, load in {"dense": stock, "packed": load_packed}.items():
        assert same(load(export(source, to, tmp_path / to).path).state_dict(), model.state_dict())
    assert not (tmp_path / "packed" / "model.safetensors.index.json").exists()
    first = min(source.glob("model-*.safetensors"))
    first.unlink()
    with pytest.raises(UserError, match=rf"damaged model: .*{first.name} is missing"):
        export(source, "dense", tmp_path / "new")


# What is refused: one line, exit code 2, and nothing written.


def test_nothing_to_compact_says_what_would_help(tmp_path, capsys):
    source = pruned(tmp_path / "source", "bert", {})
    for more in ((), ("--stock",)):
        said = refused(capsys, tmp_path, source, "--to", "compact", "--out", tmp_path / "new" / "out", *more)
        assert "all 12 heads and 18 feed-forward units have weights left" in said
        assert "sparsesoup prune gradual --method.structure heads-and-units" in said
        assert "sparsesoup prune hybrid-movement" in said


def test_an_unknown_family_is_refused_before_anything_is_written(tmp_path, capsys):
    model = transformers.DebertaV2Model(CONFIGS["deberta-v2"]())
    saved(tmp_path / "source", model)
    said = refused(capsys, tmp_path, tmp_path / "source", "--to", "compact", "--out", tmp_path / "new" / "out")
    assert "model type deberta-v2" in said
    assert "--to packed" in said


def test_weights_that_the_masks_prune_and_that_are_not_zero_are_refused(tmp_path, capsys):
    source = pruned(tmp_path / "source", "bert")
    model = stock(source)
    with torch.no_grad():
        prunable_layers(model)[1].module_of("value").weight[0, :3] = 1.0
    with quiet_libraries():
        model.save_pretrained(source)
    for to in FORMATS:
        said = refused(capsys, tmp_path, source, "--to", to, "--out", tmp_path / "out")
        assert "3 weights of bert.encoder.layer.1.attention.self.value.weight" in said
        assert "SparsityCallback" in said


def test_out_that_holds_something_else_is_refused_and_an_earlier_export_replaced(tmp_path, capsys, monkeypatch):
    source, out = pruned(tmp_path / "source", "bert"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "holds something else (notes.txt)" in refused(capsys, tmp_path, source, "--to", "dense", "--out", out)
    (out / "notes.txt").unlink()
    assert export_command(source, "--to", "dense", "--out", out) == 0
    assert export_command(source, "--to", "packed", "--out", out) == 0
    assert not (out / "model.safetensors").exists()
    (out / "notes.txt").write_text("mine")
    assert "holds something else (notes.txt)" in refused(capsys, tmp_path, source, "--to", "dense", "--out", out)
    (tmp_path / "file").write_text("a file")
    assert "file is a file; give a" in refused(capsys, tmp_path, source, "--to", "dense", "--out", tmp_path / "file")
    for place in (source, tmp_path):
        assert "holds the model that is exported" in refused(capsys, tmp_path, source, "--to", "dense", "--out", place)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "is the folder you are in" in refused(capsys, tmp_path, source, "--to", "dense", "--out", ".")


def test_out_may_be_a_link_that_leads_nowhere_yet_or_have_a_long_name_but_no_loop(tmp_path, capsys):
    source, long = pruned(tmp_path / "source", "bert"), tmp_path / ("a" * 250)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for out in (tmp_path / "link", long):
        assert export_command(source, "--to", "packed", "--out", out) == 0
    assert (tmp_path / "link").is_symlink()
    assert load_packed(tmp_path / "elsewhere") is not None
    assert "File name too long" in refused(capsys, tmp_path, source, "--to", "packed", "--out", tmp_path / ("a" * 300))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    said = refused(capsys, tmp_path, source, "--to", "packed", "--out", tmp_path / "loop")
    assert "is a link that leads to itself" in said


def test_what_is_compact_already_and_what_another_loader_reads_is_told_so(tmp_path, capsys):
    source = pruned(tmp_path / "source", "bert")
    compact, packed = (export(source, to, tmp_path / to).path for to in ("compact", "packed"))
    said = refused(capsys, tmp_path, compact, "--to", "compact", "--out", tmp_path / "again")
    assert "is compact already: all" in said
    with pytest.raises(UserError, match=r"packed is packed: load it with sparsesoup\.load_packed"):
        load_compact(packed)
    (tmp_path / "graph").mkdir()
    for name in ("config.json", "model.onnx"):
        (tmp_path / "graph" / name).write_text("{}")
    with pytest.raises(UserError, match=r"graph holds a graph \(model\.onnx\)"):
        load_compact(tmp_path / "graph")


def test_a_damaged_packed_file_is_refused_by_the_loader_and_by_export(tmp_path, capsys):
    packed = export(pruned(tmp_path / "source", "bert"), "packed", tmp_path / "packed").path
    data = (packed / "packed.safetensors").read_bytes()
    (packed / "packed.safetensors").write_bytes(data[: len(data) - 9])
    with pytest.raises(UserError, match=r"damaged file .*packed\.safetensors: .*; copy it again"):
        load_packed(packed)
    assert "damaged file" in refused(capsys, tmp_path, packed, "--to", "dense", "--out", tmp_path / "out")


def test_a_graph_and_a_packed_model_with_a_damaged_ticket_are_refused(tmp_path, capsys):
    for name in ("model.onnx", "model.xml"):
        (tmp_path / name).write_text("a graph")
        said = refused(capsys, tmp_path, tmp_path, "--to", "dense", "--out", tmp_path / "out")
        assert f"holds a graph ({name}), which no other form is made of; give the run" in said
        (tmp_path / name).unlink()
    packed = export(pruned(tmp_path / "source", "bert"), "packed", tmp_path / "packed").path
    (packed / "pruning" / "ticket.json").write_text('{"method": ')
    said = refused(capsys, tmp_path, packed, "--to", "dense", "--out", tmp_path / "out")
    assert "damaged ticket" in said
    assert "ticket.json cannot be read" in said


WRONG = [
    ({"num_hidden_layers": LAYERS + 1}, r"not fit its config\.json: bert\.encoder\.layer\.3\.\S+ is missing"),
    ({"num_hidden_layers": LAYERS - 1}, r"have bert\.encoder\.layer\.2\.\S+, which its config\.json does not know"),
    ({"vocab_size": 65}, r"bert\.embeddings\.word_embeddings\.weight has shape \(64, 16\), expected \(65, 16\)"),
]


@pytest.mark.parametrize(
    ("to", "change", "said"),
    [(to, *case) for to in TORCH for case in WRONG],
)
def test_a_config_that_is_not_of_the_weights_is_refused_with_the_name_of_one(to, change, said, tmp_path):
    folder = export(pruned(tmp_path / "source", "bert"), to, tmp_path / "made").path
    config = json.loads((folder / "config.json").read_text())
    if to == "compact":
        config["compact_config"]["layers"]["encoder.layer.3"] = {"heads": HEADS, "units": UNITS}
    (folder / "config.json").write_text(json.dumps(config | change))
    older(folder / "export.json")
    with pytest.raises(UserError, match=said):
        load_as_saved(str(folder)) if to == "dense" else {"packed": load_packed, "compact": load_compact}[to](folder)


def test_a_packed_model_whose_config_names_no_class_is_one_without_a_head(tmp_path):
    folder = export(pruned(tmp_path / "source", "bert-relu"), "packed", tmp_path / "made").path
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": None}))
    older(folder / "export.json")
    assert type(load_packed(folder)) is transformers.BertModel


@pytest.mark.parametrize("damage", [3, {"format": 3, "layers": {}}, {"format": 1, "layers": []}])
def test_a_compact_config_that_cannot_be_read_is_refused(damage, tmp_path):
    out = export(pruned(tmp_path / "source", "bert"), "compact", tmp_path / "out").path
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"compact_config": damage}))
    older(out / "export.json")
    with pytest.raises(UserError, match=r"compact_config that cannot be read: expected format 1 or 2"):
        load_compact(out)


def test_wrong_words_are_refused_in_one_line(tmp_path, capsys):
    source = pruned(tmp_path / "source", "bert")
    out = ("--out", tmp_path / "out")
    assert "invalid choice: 'zip'" in refused(capsys, tmp_path, source, "--to", "zip", *out)
    assert "--zstd: this is a setting of --to packed, not of compact" in refused(
        capsys, tmp_path, source, "--to", "compact", "--zstd", *out
    )
    assert "'fp8'" in refused(capsys, tmp_path, source, "--to", "packed", "--dtype", "fp8", *out)
    assert "required: --to" in refused(capsys, tmp_path, source, *out)
    assert "no run and no export at" in refused(capsys, tmp_path, tmp_path / "nowhere", "--to", "dense", *out)
    (source / "config.json").unlink()
    (source / "model.safetensors").unlink()
    assert "no model beside the masks" in refused(capsys, tmp_path, source, "--to", "dense", *out)
    with pytest.raises(UserError, match="format dense has no setting 'zstd'; it has none"):
        export(source, "dense", tmp_path / "out", zstd=True)
    with pytest.raises(UserError, match="zstd: expected true or false, got 'no'"):
        export(source, "packed", tmp_path / "out", zstd="no")
    with pytest.raises(UserError, match="unknown format 'zip'; allowed: dense, packed, compact"):
        export(source, "zip", tmp_path / "out")
    with pytest.raises(UserError, match="dtype: expected one of same, bf16, got 'fp8'"):
        export(source, "packed", tmp_path / "out", dtype="fp8")


def test_a_model_without_weights_and_a_truncated_one_are_refused(tmp_path, capsys):
    source = pruned(tmp_path / "source", "bert")
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-100])
    assert "damaged model" in refused(capsys, tmp_path, source, "--to", "dense", "--out", tmp_path / "out")
    (source / "model.safetensors").unlink()
    assert "no weights at" in refused(capsys, tmp_path, source, "--to", "dense", "--out", tmp_path / "out")


def test_help_names_every_format_and_every_setting_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as ended:
        export_command("--help")
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for name, row in FORMATS.items():
        assert f"{name} {row.summary}: {row.gain}" in said
    for words in ("--dtype {same,bf16}", "--zstd", "--stock", "hybrid-movement", "load_packed"):
        assert words in said


def test_a_base_model_is_exported_as_well(tmp_path):
    model = base_model("electra")
    with torch.no_grad():
        prunable_layers(model)[0].module_of("up").weight[:3] = 0
    saved(tmp_path / "source", model)
    assert (
        layer_widths(load_compact(export(tmp_path / "source", "compact", tmp_path / "out").path))["encoder.layer.0"][
            "units"
        ]
        == 29
    )
