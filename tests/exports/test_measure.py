"""`sparsesoup benchmark`: what it counts and times, what it says of it, and that one failure stops nothing else."""

import io
import json
import resource
import time
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from torch import nn

import sparsesoup
from sparsesoup import export, load_compact
from sparsesoup.cli.main import main
from sparsesoup.cli.tables import print_benchmark
from sparsesoup.core.errors import UserError
from sparsesoup.core.timing import speedup_ratios, time_interleaved
from sparsesoup.exports.benchmark import BenchmarkConfig, _check_answers, run_benchmark
from sparsesoup.exports.benchmark.backends import (
    SparseLinear,
    forward_flops,
    nonzeros_by_layer,
    profile_model,
    sparse_flops,
    sparse_model,
    stored_values,
)
from sparsesoup.exports.benchmark.candidate import open_candidate
from sparsesoup.exports.benchmark.explain import explain_speed, summary_sentences
from sparsesoup.hub.models.cut_layers import layer_widths
from sparsesoup.hub.models.dummy_inputs import dummy_inputs
from sparsesoup.hub.models.layer_layouts import prunable_layers
from sparsesoup.hub.models.loading import unpruned_model
from sparsesoup.hub.models.prunable import find_prunable
from sparsesoup.report.run_page import write_report
from tiny_exports import EVEN, FEWER, SOME, pruned, saved, stock
from tiny_hub import older, run_of
from tiny_models import HEADS, LAYERS, UNITS
from tiny_reports import write_run

pytestmark = pytest.mark.integration

SMALL = ("--batch", "2", "--length", "8", "--rounds", "3")


def command(*words: object) -> int:
    return main(["benchmark", *map(str, words)])


def test_works_take_turns_and_the_order_turns_around():
    seen: list[str] = []

    def work(name):
        seen.append(name)
        time.sleep(0.021)

    times = time_interleaved([lambda: work("a"), lambda: work("b")], 3)
    assert "".join(seen[6:]) == "ab" + "ba" + "ab"  # after two calls to warm up, and one to see how long it takes
    assert [len(row) for row in times] == [3, 3]
    assert min(min(row) for row in times) >= 0.02
    assert speedup_ratios([4.0, 9.0], [2.0, 3.0]) == [2.0, 3.0]


@pytest.mark.parametrize("kind", ["csr", "bsr"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_sparse_map_answers_as_the_dense_one(kind, bias):
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, bias=bias)
    with torch.no_grad():
        linear.weight[:32, :32] = 0
        linear.weight[40, 50] = 0
    x = torch.randn(2, 5, 64)
    assert torch.allclose(SparseLinear(linear, kind)(x), linear(x), atol=1e-5)
    # One block of 1024 is left out by both, the lone zero only by csr.
    assert stored_values(linear.weight.detach(), kind) == 64 * 96 - 1024 - (kind == "csr")


def test_a_matrix_that_blocks_do_not_tile_keeps_all_its_values_in_bsr():
    assert stored_values(torch.zeros(40, 64), "bsr") == 40 * 64
    assert stored_values(torch.zeros(40, 64), "csr") == 0


def test_only_a_linear_module_has_a_sparse_form():
    gpt = transformers.GPT2Model(transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "num_local_experts": 2}
    shape |= {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    experts = transformers.MixtralModel(transformers.MixtralConfig(**shape))
    with torch.no_grad():
        for model in (gpt, experts):
            for name in find_prunable(model):
                model.get_parameter(name)[..., 0] = 0
    with pytest.raises(UserError, match=r"no nn\.Linear has zeros"):
        nonzeros_by_layer(gpt, "csr")
    assert {name.rpartition(".")[2] for name in nonzeros_by_layer(experts, "csr")} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }


def test_flops_without_zeros_are_two_for_each_value_and_token_less(tmp_path):
    model = stock(pruned(tmp_path, "bert", SOME))
    batch = dummy_inputs(model, 3, 11)
    params = dict(model.named_parameters())
    zeros = sum(int((params[name] == 0).sum()) for name in find_prunable(model))
    assert forward_flops(model, batch) - sparse_flops(model, "csr", batch) == 2 * 3 * 11 * zeros > 0
    assert (
        sum(
            m.weight.numel() - nonzeros_by_layer(model, "csr")[n]
            for n, m in model.named_modules()
            if n in nonzeros_by_layer(model, "csr")
        )
        == zeros
    )
    with pytest.raises(UserError, match=r"no nn\.Linear has a 32 x 32 block of zeros"):
        sparse_model(model, "bsr")
    one, other = (m(**batch).logits for m in (model, sparse_model(model, "csr")))
    assert torch.allclose(one, other, atol=1e-5)


def test_the_time_of_what_flops_count_is_told_apart():
    class Two(nn.Module):
        def forward(self, x, return_dict):
            return {"products": x @ x, "others": x.exp()}

    found = profile_model(Two(), {"x": torch.ones(600, 600)})
    assert found["products"] > 0.0005  # 432 MFLOP
    assert 0 < found["others"] < found["products"]


@pytest.mark.parametrize(("name", "plan"), [("bert", SOME), ("bert", EVEN), ("distilbert", EVEN), ("vit", FEWER)])
def test_the_dense_model_of_a_compact_one_has_the_widths_before(name, plan, tmp_path):
    source = pruned(tmp_path / "source", name, plan)
    small = export(source, "compact", tmp_path / "small")
    length = None if name == "vit" else 4
    (subject,) = run_benchmark([small.path], BenchmarkConfig(batch=1, length=length, rounds=3, backends=("torch",)))
    assert subject["sizes"]["dense"]["parameters"] == sum(p.numel() for p in stock(source).parameters())
    assert subject["sizes"]["this"]["parameters"] == small.facts["sizes"]["parameters"][1]
    before = {row["layer"]: {key: row[key][0] for key in ("heads", "units")} for row in small.facts["layers"]}
    dense = unpruned_model(str(small.path), before)
    assert [*layer_widths(dense).values()] == [{"heads": HEADS, "units": UNITS}] * LAYERS
    assert all((layer.module_of("up").weight != 0).all() for layer in prunable_layers(dense))
    assert subject["flops"]["dense"] > subject["flops"]["as it is"]
    assert [row["flops_ratio"] for row in subject["rows"]] == [subject["flops"]["dense"] / subject["flops"]["as it is"]]


def test_what_was_cut_out_of_a_compact_model_again_is_measured_against_the_model_before_both(tmp_path):
    plan = {"heads": [["stays"] * (HEADS - 1) + ["out"]] * LAYERS}  # three heads do not divide the hidden size
    source = pruned(tmp_path / "source", "bert", plan)
    model = load_compact(export(source, "compact", tmp_path / "one").path)
    with torch.no_grad():
        prunable_layers(model)[0].module_of("up").weight[:2] = 0
    saved(tmp_path / "again", model)
    paths = [export(tmp_path / "again", to, tmp_path / to).path for to in ("compact", "onnx")]
    shapes = {n: p.shape for n, p in stock(source).named_parameters()}
    for path in paths:
        assert {n: p.shape for n, p in open_candidate(path).dense.named_parameters()} == shapes


@pytest.mark.parametrize(("name", "plan"), [("bert", SOME), ("distilbert", EVEN), ("vit", FEWER)])
def test_what_was_cut_out_is_still_known_of_a_compact_model_in_other_forms(name, plan, tmp_path):
    """The test above has a graph of BERT."""
    small = export(pruned(tmp_path / "source", name, plan), "compact", tmp_path / "small")
    packed = export(small.path, "packed", tmp_path / "packed")
    forms = ("dense", "onnx") if name == "vit" else ("dense",)
    paths = [small.path, packed.path, *(export(packed.path, to, tmp_path / to).path for to in forms)]
    first, *others = [open_candidate(path) for path in paths]
    shapes = {n: p.shape for n, p in first.dense.named_parameters()}
    for other in others:
        assert {n: p.shape for n, p in other.dense.named_parameters()} == shapes
        assert other.notes == first.notes


def test_a_run_pruned_weight_by_weight_gains_nothing_and_is_told_so(place, tmp_path, capsys):
    words = ("--model", place / "bert", "--dataset", place / "reviews", "--steps", 2, "--sparsity", 0.3)
    assert main(["prune", "magnitude", *map(str, words), "--out", str(tmp_path)]) == 0
    run = run_of(tmp_path)
    page = (run / "report.html").read_text()
    assert "Size and speed" not in page
    capsys.readouterr()
    assert command(run, *SMALL, "--backends", "torch,csr,bsr") == 0
    shown = " ".join(capsys.readouterr().out.split())
    facts = json.loads((run / "benchmark.json").read_text())
    assert [(row["on"], row["form"]) for row in facts["rows"]] == [("torch", "as it is"), ("csr", "as it is")]
    assert [row["flops_ratio"] > 1 for row in facts["rows"]] == [False, True]
    assert facts["failed"] == {"torch BSR": "no nn.Linear has a 32 x 32 block of zeros"}
    assert "Nothing was cut out, since all heads and units have weights left" in shown
    assert "torch BSR was not measured: no nn.Linear has a 32 x 32 block of zeros." in shown
    assert (facts["batch"], facts["length"], facts["rounds"]) == (2, 8, 3)
    sizes = facts["sizes"]["this"]
    assert sizes["raw"] == facts["sizes"]["dense"]["raw"]  # no header is counted, on neither side
    for each in facts["rows"]:
        assert each["faster"] == each["dense_seconds"] / each["seconds"]
    packed = export(run, "packed", tmp_path / "packed").path / "packed.safetensors"
    data = packed.read_bytes()
    assert sizes["packed"] == len(data) - 8 - int.from_bytes(data[:8], "little")  # without the file's header
    assert sizes["zstd"] > 0
    page = (run / "report.html").read_text()
    assert "Size and speed" in page
    assert "no nn.Linear has a 32 x 32 block of zeros" in page
    (run / "benchmark.json").unlink()
    assert command(run / "model", *SMALL, "--backends", "torch") == 0  # the same run
    assert (run / "benchmark.json").is_file()
    assert not (run / "model" / "benchmark.json").exists()
    (run / "benchmark.json").write_text('{"format": 1, "rows": 3}')
    write_report(run)  # a damaged one is left out
    assert "Size and speed" not in (run / "report.html").read_text()


def test_several_are_measured_side_by_side_and_each_keeps_its_own_file(tmp_path, capsys):
    source = pruned(tmp_path / "source", "bert", SOME)
    small = export(source, "compact", tmp_path / "small").path
    packed = export(source, "packed", tmp_path / "packed").path
    assert command(source, small, packed, *SMALL, "--backends", "torch") == 0
    facts = [json.loads((folder / "benchmark.json").read_text()) for folder in (source, small, packed)]
    forms = [[row["form"] for row in table["rows"]] for table in facts]
    assert forms == [["as it is", "compact"], ["as it is"], ["as it is", "compact"]]
    assert len({table["flops"]["dense"] for table in facts}) == 1
    assert facts[0]["flops"]["compact"] == facts[1]["flops"]["as it is"] == facts[2]["flops"]["compact"]
    assert "4 of 12 heads" not in capsys.readouterr().err
    again = export(source, "compact", small)  # a measured export can still be replaced
    assert not (again.path / "benchmark.json").exists()
    assert "benchmark.json" not in export(source, "dense", tmp_path / "dense").facts


def test_a_model_stored_in_bf16_is_not_half_of_the_dense_one_for_that(tmp_path):
    source = pruned(tmp_path / "source", "bert", SOME, torch.bfloat16)
    (facts,) = run_benchmark([source], BenchmarkConfig(batch=1, length=4, rounds=3, backends=("torch",)))
    dense, own = facts["sizes"]["dense"], facts["sizes"]["this"]
    assert dense["raw"] == 2 * dense["parameters"] == 2 * own["parameters"]
    assert own["raw"] == dense["raw"]


def test_a_packed_export_is_measured_with_values_of_the_type_that_it_holds(tmp_path):
    source = pruned(tmp_path / "source", "bert", SOME)
    for dtype in ("same", "bf16"):
        folder = export(source, "packed", tmp_path / dtype, dtype=dtype).path
        data = (folder / "packed.safetensors").read_bytes()
        sizes = open_candidate(folder).sizes
        assert sizes["packed"] == len(data) - 8 - int.from_bytes(data[:8], "little")  # without the file's header


def test_tables_of_several_subjects_fit_a_terminal_whatever_their_paths():
    rows = [row("compile", "as it is", label="torch.compile", per_second=1234.0, dense_per_second=2.0)]
    found = table(rows=rows, threads=1, rounds=3, length=8, failed={}, summary=[])
    found["flops"] |= {"compact": 400}
    found["sizes"]["dense"] |= {"parameters": 8}
    found["sizes"]["this"] |= {"parameters": 4, "nonzero": 4}
    paths, console = ("runs/glue/sst2/hybrid-movement-0123456789/seed-0", "b"), Console(width=80, file=io.StringIO())
    print_benchmark([found | {"path": path} for path in paths], console)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert [words[0] for words in lines if words[-2:] == ["2.00", "(1.90-2.10)"]] == ["1", "2"]
    assert all([number, path] in lines for number, path in zip("12", paths, strict=True))


def test_a_graph_is_measured_on_the_engines_that_read_it(tmp_path):
    graph = export(pruned(tmp_path / "source", "vit", FEWER), "onnx", tmp_path / "graph")
    on = ("torch", "onnxruntime", "openvino")
    (facts,) = run_benchmark([graph.path], BenchmarkConfig(batch=2, rounds=3, backends=on))
    assert [(row["on"], row["form"]) for row in facts["rows"]] == [(name, "as it is") for name in on[1:]]
    assert facts["failed"] == {"torch": "a graph for another engine cannot be run on torch"}
    assert facts["sizes"]["this"]["parameters"] == graph.facts["sizes"]["parameters"][1]
    assert facts["flops"]["dense"] > facts["flops"]["as it is"]
    assert facts["length"] is None


def test_a_model_whose_config_names_no_class_is_measured_as_one_without_a_head(tmp_path):
    source = pruned(tmp_path / "source", "bert-relu", {})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": None}))
    (facts,) = run_benchmark([source], BenchmarkConfig(batch=1, length=4, rounds=3, backends=("torch",)))
    assert facts["flops"]["dense"] == facts["flops"]["as it is"]


def test_without_a_compiler_torch_compile_says_so_and_stops_no_other(tmp_path, monkeypatch):
    source = pruned(tmp_path / "source", "distilbert", {})
    monkeypatch.setenv("CXX", "no-such-compiler")
    (facts,) = run_benchmark([source], BenchmarkConfig(batch=1, length=4, rounds=3, backends=("compile", "torch")))
    reason = "there is no C++ compiler (no-such-compiler), which torch.compile needs on a CPU"
    assert facts["failed"] == {"torch.compile": reason}
    assert [row["on"] for row in facts["rows"]] == ["torch"]


def test_an_engine_that_answers_otherwise_is_not_timed():
    _check_answers([torch.tensor([1.0, 100.5])], [torch.tensor([1.0, 100.0])])
    with pytest.raises(UserError, match="it answers otherwise than torch, by 2 of 100"):
        _check_answers([torch.tensor([1.0, 102.0])], [torch.tensor([1.0, 100.0])])


# What is said of a measurement, on made-up numbers.


def row(on="torch", form="compact", **more):
    return {"on": on, "label": on, "form": form, "flops_ratio": 2.0, "faster": 2.0, "quartiles": [1.9, 2.1],
            "seconds": 1.0, "dense_seconds": 2.0, "why": ""} | more  # fmt: skip


def table(dense=(8.0, 2.0), own=(4.0, 1.0), **more):
    parts = {form: dict(zip(("products", "others"), pair, strict=True)) for form, pair in
             {"dense": dense, "compact": own}.items()}  # fmt: skip
    sizes = {"dense": {"raw": 1_000_000}, "this": {"raw": 400_000, "packed": 200_000, "zstd": 150_000}}
    return {
        "flops": {"dense": 800},
        "profiles": parts,
        "batch": 4,
        "sizes": sizes,
        "notes": ["a note"],
        "rows": [],
    } | more


@pytest.mark.parametrize(
    ("found", "parts", "words"),
    [
        (row(faster=1.6), {}, ""),
        (row(faster=2.4), {}, ""),
        (row(faster=1.4, quartiles=[1.0, 2.1]), {}, "the ratio of FLOPs is within the quartiles"),
        (row(on="csr", form="as it is", faster=0.5, quartiles=[0.4, 0.6]), {}, "a sparse kernel looks up"),
        (
            row(faster=1.3, quartiles=[1.2, 1.4]),
            {"own": (4.0, 2.0)},
            "did not shrink with them: in torch they take 33 %",
        ),
        (row(faster=1.3, quartiles=[1.2, 1.4]), {"own": (6.0, 1.0)}, "narrower matrices fill the processor less"),
        (row(faster=3.0, quartiles=[2.9, 3.1]), {"own": (4.0, 0.1)}, "shrank more than they did"),
        (row(faster=3.0, quartiles=[2.9, 3.1]), {"own": (2.0, 1.0)}, "fit its caches better: in torch 200 FLOP/s"),
        (row(faster=1.3, quartiles=[1.2, 1.4]), {"own": (3.9, 0.9)}, "it is this engine's own overhead"),
    ],
)
def test_a_speed_far_from_the_ratio_of_flops_is_explained(found, parts, words):
    assert (words in explain_speed(found, table(**parts))) if words else explain_speed(found, table(**parts)) == ""


def test_what_is_gained_and_what_gives_nothing_is_said():
    rows = [
        row("torch", "as it is", flops_ratio=1.0, faster=1.01, quartiles=[0.98, 1.02], seconds=2.0),
        row("csr", "as it is", flops_ratio=9.0, faster=0.6, quartiles=[0.5, 0.7], seconds=3.3, why="a reason"),
        row("onnxruntime", "compact", seconds=0.5),
        row("torch", "compact", faster=1.4, quartiles=[1.3, 1.5], why="its reason"),
    ]
    first, best, *others = summary_sentences(table(rows=rows))
    assert first == "Its weights take 400 kB, the dense model's 1.00 MB (0.40 of it); packed 200 kB, with zstd 150 kB."
    assert best.startswith(
        "Fastest is onnxruntime, compact: 500 ms a batch of 4, 2.00 times as fast as the dense model"
    )
    assert best.endswith("(1.90 to 2.10; 2.00 by FLOPs) and 4.00 times as fast as the dense model in torch.")
    assert others == [
        "On torch, compact, it is 1.40 times as fast, 2.00 by FLOPs: its reason.",
        "No speed-up on torch, as it is, 1.01 times: zeros are multiplied like anything else.",
        "No speed-up on csr, as it is, 0.60 times: a reason.",
        "A note.",
    ]
    (unsure,) = summary_sentences(table(rows=[row(faster=1.58, quartiles=[0.9, 1.9], why="its parts")], notes=[]))[2:]
    assert unsure.startswith("No certain speed-up on torch, compact: 1.58 times, but 0.90 to 1.90 between rounds;")
    little = row(flops_ratio=1.2, faster=1.01, quartiles=[0.98, 1.03])  # within 25 % of the ratio of FLOPs, and no gain
    few = row("csr", "as it is", flops_ratio=1.02, faster=0.97, quartiles=[0.96, 0.99])
    assert summary_sentences(table(rows=[little, few], notes=[]))[2:] == [
        "No speed-up on torch, compact, 1.01 times: it is no more than 1.20 by FLOPs.",
        "No speed-up on csr, as it is, 0.97 times: it is no more than 1.02 by FLOPs.",
    ]
    assert (
        summary_sentences(table(rows=rows[:2]))[1] == "Nothing that was measured makes it faster than the dense model."
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--batch", "0"), "--batch: must be at least 1, got 0"),
        (("--rounds", "2"), "--rounds: must be at least 3, got 2"),
        (("--threads", "100000"), "--threads is at most"),
        (("--batch", str(10**12)), "--batch 1000000000000 of --length 128 is too large: the"),
        (("--batch", str(10**19), "--length", "8"), "--batch 10000000000000000000 of --length 8 is too large: the"),
        (("--length", "4000"), "--length 4000 is above the 132 positions"),
        (("--backends", "torch,tpu"), "--backends: unknown backend 'tpu'; allowed: torch, compile, csr"),
        (("--backends", ","), "--backends: unknown backend ''; allowed: torch, compile, csr"),
        (("--threads", "x"), "--threads: expected a whole number or null, got 'x'"),
        (("--backends", "bsr"), "could be measured (torch BSR: no nn.Linear has a 32 x 32 block of zeros); name other"),
    ],
)
def test_wrong_words_are_refused_in_one_line(words, told, tmp_path, capsys):
    source = pruned(tmp_path / "source", "distilbert", {})
    before = sorted(tmp_path.rglob("*"))
    assert command(source, *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_that_tells_of_other_layers_is_refused(tmp_path, capsys):
    small = export(pruned(tmp_path / "source", "distilbert", FEWER), "compact", tmp_path / "small").path
    facts = json.loads((small / "export.json").read_text())
    facts["layers"][0]["layer"] = "a"
    older(small / "export.json", layers=facts["layers"])
    assert command(small) == 2
    assert "damaged export: its export.json and its model differ in layer a" in capsys.readouterr().err


def test_a_batch_that_the_model_has_no_memory_for_is_refused_in_one_line(tmp_path, capsys):
    source = pruned(tmp_path / "source", "distilbert", {})
    limits = resource.getrlimit(resource.RLIMIT_AS)
    held_now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held_now + 200_000_000, limits[1]))
    try:
        assert command(source, "--batch", "40000", "--length", "64", "--rounds", "3", "--backends", "torch") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sparsesoup: --batch 40000 is too large for the memory here (")
    assert line.endswith("; set a smaller --batch or --length")
    assert not (source / "benchmark.json").exists()


def test_a_length_of_images_is_refused(tmp_path, capsys):
    source = pruned(tmp_path / "source", "vit", {})
    assert command(source, "--length", "32", "--rounds", "3", "--backends", "torch") == 2
    said = capsys.readouterr().err
    assert said == f"sparsesoup: --length: it is for texts, and {source} reads images, got 32; leave it out\n"


def test_what_is_no_run_and_no_export_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="nothing to measure; give a run or an export"):
        run_benchmark([], BenchmarkConfig())
    with pytest.raises(UserError, match="batch: expected a whole number, got '2'"):
        sparsesoup.benchmark(tmp_path, batch="2")
    with pytest.raises(UserError, match="bach: unknown setting; did you mean batch"):
        sparsesoup.benchmark(tmp_path, bach=2)
    assert command(tmp_path / "nowhere") == 2
    assert "no run and no export at" in capsys.readouterr().err
    (tmp_path / "export.json").write_text("{")
    assert command(tmp_path) == 2
    assert "damaged export" in capsys.readouterr().err
    (tmp_path / "export.json").write_text("[1]")
    assert command(tmp_path) == 2
    assert "export.json cannot be read (it holds no table)" in capsys.readouterr().err
    (tmp_path / "export.json").write_text('{"to": "onnx"}')
    assert command(tmp_path) == 2
    assert "model.onnx is missing; export it again" in capsys.readouterr().err
    (tmp_path / "model.onnx").write_text("a graph")
    assert command(tmp_path) == 2
    assert "export.json lacks 'sizes'; export it again" in capsys.readouterr().err


def test_a_page_shows_times_and_reasons(tmp_path):
    write_run(tmp_path)
    found = table(rows=[row(per_second=4.0, dense_per_second=2.0)]) | {
        "format": 1, "summary": ["It is <i>small</i>."], "failed": {"OpenVINO": "openvino is not installed"},
        "length": 8,
        "rounds": 3, "threads": 1, "machine": "x86_64",
    }  # fmt: skip
    (tmp_path / "benchmark.json").write_text(json.dumps(found))
    page = Path(write_report(tmp_path)).read_text()
    assert "It is &lt;i&gt;small&lt;/i&gt;." in page
    assert "<td>1.90 to 2.10</td>" in page
    assert "OpenVINO was not measured: openvino is not installed." in page
