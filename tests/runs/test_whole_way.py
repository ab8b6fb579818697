"""From a checkpoint and a data set to a run directory that any user of transformers can load, in five families."""

import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import sparsesoup as library
from conftest import same
from sparsesoup.cli.main import main
from sparsesoup.cli.prune import parse_arguments
from sparsesoup.core.errors import UserError
from sparsesoup.core.ticket import Ticket
from sparsesoup.hub.build import open_task
from sparsesoup.hub.models.loading import load_model
from sparsesoup.methods import METHODS, TABLE
from sparsesoup.report.terminal import dense_flops, times_dense
from sparsesoup.runs import config as recipe
from sparsesoup.runs.run import fill_default_sparsity
from tiny_hub import (
    FAMILIES,
    base_model,
    checkpoint,
    listing,
    log_of,
    masks_of,
    offline,
    run_of,
    sentences,
    sparsesoup,
    tokenizer,
    weights_of,
    write_rows,
)  # fmt: skip

pytestmark = pytest.mark.integration

TINY_ISP = {"stages": 2, "weak_masks": 2, "look_ahead": 0.05}
FLAGS = ["--method.stages", "2", "--method.weak-masks", "2", "--method.look-ahead", "0.05"]
TOTAL = 2 * (4 * 16 * 16 + 2 * 16 * 32)


def flags_of(place, out, family="bert", sparsity=0.7, steps=20, dataset="reviews"):
    return ["--model", str(place / family), "--dataset", str(place / dataset), "--sparsity", str(sparsity), "--steps",
            str(steps), "--train.batch-size", "8", "--train.learning-rate", "0.003", "--out", str(out)]  # fmt: skip


def drawn(place, out, name="isp", family="bert", **more):
    """A run, drawn from Python with the settings of `flags_of`."""
    settings = {"model": str(place / family), "dataset": str(place / "reviews"), "sparsity": 0.7, "steps": 20} | more
    own = settings.pop("method", TINY_ISP if name == "isp" else {})
    train = {"batch_size": 8, "learning_rate": 0.003} | settings.pop("train", {})
    return library.prune(name, out=out, method=own, train=train, progress=False, **settings)


@pytest.fixture(scope="module")
def soup(place, tmp_path_factory):
    """One run of isp that several tests look at; none writes to it."""
    return drawn(place, tmp_path_factory.mktemp("soup")).path


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("early-bird", {"every_epochs": 0.2}),
        ("lottery-pools", {"cut": 0.5, "neighbours": 2}),
        ("sparse-model-soup", {"phases": 2}),
        ("instant-model-soup", {}),
        ("model-soup", {"members": 2}),
    ],
)
def test_methods_that_keep_several_masks_or_weights_leave_one_product(name, own, place, tmp_path):
    dense = TABLE[name].dense
    run = drawn(place, tmp_path, name, method=own, sparsity=None if dense else 0.7)
    kept, total = run.report["sparsity"]["kept"], run.report["sparsity"]["total"]
    assert kept == (total if dense else round(0.3 * total))
    assert not list((run.path / "stages").glob("*.safetensors"))
    assert (run.path / "report.html").exists()


ALONE = """
import json, sys, torch, transformers
torch.set_num_threads(1)
answers = {}
for folder in json.loads(sys.argv[1]):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tool = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**tool(["a good film", "very dull and cold"], padding=True, return_tensors="pt")).logits
    zeros = sum(int((p == 0).sum()) for n, p in model.named_parameters() if p.dim() > 1)
    answers[folder] = [logits.tolist(), zeros, type(model).__name__, str(next(model.parameters()).dtype)]
assert "sparsesoup" not in sys.modules
print(json.dumps(answers))
"""


def test_every_family_goes_from_checkpoint_to_a_folder_that_transformers_alone_reloads(place, tmp_path, monkeypatch):
    made, plain = [], Ticket.__init__

    def keep_logits(self, masks, weights, *rest, **more):
        plain(self, masks, weights, *rest, **more)
        made.append(self)

    monkeypatch.setattr(Ticket, "__init__", keep_logits)
    runs = {}
    for family, method in [*((family, "magnitude") for family in FAMILIES), ("bert", "isp")]:
        steps = 20 if method == "isp" else 4
        runs[family, method] = (drawn(place, tmp_path / family, method, family, steps=steps), made[-1])
    folders = [str(run.path / "model") for run, _ in runs.values()]
    answer = subprocess.run([sys.executable, "-c", ALONE, json.dumps(folders)], capture_output=True, text=True,
                            env=offline() | {"PYTHONWARNINGS": "default"}, check=False)  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    reloaded = json.loads(answer.stdout)
    for (family, method), (run, ticket) in runs.items():
        name = f"{family}, {method}"
        report = run.report
        # What this process has in its hands: the ticket's own weights in the model that was trained.
        model = load_model(str(place / family), open_task(settings_of(run.path).model_data).task, seed=0)
        model.load_state_dict(ticket.weights)
        tool = tokenizer(family in ("bert", "deberta-v2", "electra"))
        with torch.no_grad():
            own = model.eval()(**tool(["a good film", "very dull and cold"], padding=True, return_tensors="pt")).logits
        logits, zeros, kind, dtype = reloaded[str(run.path / "model")]
        assert torch.equal(torch.tensor(logits), own), name
        assert dtype == "torch.float32"
        assert kind.endswith("ForSequenceClassification")
        kept = round((1 - 0.7) * TOTAL)
        assert report["sparsity"] == {"target": 0.7, "reached": 1 - kept / TOTAL, "kept": kept, "total": TOTAL}, name
        masks, weights = masks_of(run.path), dict(model.named_parameters())
        assert sum(int(m.sum()) for m in masks.values()) == kept
        assert all(torch.equal(weights[n] != 0, m) for n, m in masks.items()), name
        # The padding rows of the embeddings are the only other zeros there may be.
        unpruned = sum(int((p == 0).sum()) for n, p in weights.items() if p.dim() > 1 and n not in masks)
        assert zeros == TOTAL - kept + unpruned, name
        assert unpruned <= 3 * 16, name


def settings_of(run, *more):
    return parse_arguments(["--config", str(run / "run.yaml"), *more])[0]


def test_the_run_directory_holds_what_it_should_and_no_pickle(soup):
    files = {str(p.relative_to(soup)) for p in soup.rglob("*") if p.is_file()}
    model = {"config.json", "model.safetensors", "tokenizer.json", "pruning/masks.safetensors", "pruning/ticket.json"}
    expected = {"run.yaml", "log.jsonl", "report.json", "report.html", *(f"model/{name}" for name in model)}
    assert expected <= files
    allowed = {".yaml", ".jsonl", ".json", ".html", ".safetensors"}
    assert {Path(name).suffix for name in files} <= allowed, files
    config = json.loads((soup / "model" / "config.json").read_text())
    assert config["pruning_config"]["kept"] == round(0.3 * TOTAL)
    assert config["pruning_config"]["method"] == "isp"
    assert not {"quantization_config", "sparsity_config"} & config.keys()


def test_masks_take_a_bit_a_weight_on_the_disk(soup):
    bits = 8 * (soup / "model" / "pruning" / "masks.safetensors").stat().st_size
    header = 8 * (8 + int.from_bytes((soup / "model" / "pruning" / "masks.safetensors").read_bytes()[:8], "little"))
    assert bits - header == TOTAL


def test_the_ticket_says_where_it_came_from(soup):
    facts = json.loads((soup / "model" / "pruning" / "ticket.json").read_text())
    assert facts["format"] == "1"
    assert facts["settings"]["method"]["name"] == "isp"
    assert facts["seed"] == 0
    assert len(facts["origin"]) == 64
    assert facts["cost"]["main"]["steps"] + facts["cost"]["weak"]["steps"] == 20
    assert facts["validation"].keys() == {"accuracy", "macro_f1"}


def test_the_log_has_every_step_and_the_report_is_drawn_from_all_of_it(soup):
    log, cost = log_of(soup), json.loads((soup / "report.json").read_text())["cost"]
    counts = {label: sum(line["label"] == label for line in log) for label in ("main", "weak")}
    assert counts == {label: int(cost[label]["steps"]) for label in counts} == {"main": 16, "weak": 4}
    assert log[-1]["sparsity"] == pytest.approx(0.7, abs=1e-3)
    before = (soup / "report.html").read_text()
    from sparsesoup.report.run_page import write_report

    copy = soup.parent / "copy"
    shutil.copytree(soup, copy)
    write_report(copy)
    assert (copy / "report.html").read_text() == before
    shutil.rmtree(copy)


def test_a_bf16_checkpoint_is_trained_and_saved_in_float32(place, tmp_path):
    checkpoint(tmp_path / "half", dtype=torch.bfloat16)
    assert weights_of(tmp_path / "half")["encoder.layer.0.output.dense.weight"].dtype == torch.bfloat16
    run = drawn(place, tmp_path / "runs", "magnitude", model=str(tmp_path / "half"), steps=4)
    weights = weights_of(run.path / "model")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    pruned = weights["bert.encoder.layer.0.output.dense.weight"]
    assert not torch.equal(pruned.bfloat16().float(), pruned)  # it moved in steps finer than bf16


def test_float_labels_are_a_regression(place, tmp_path):
    rows = [(text, text.count("good") + 0.5 * text.count("warm") - 0.25) for text, _ in sentences(60)]
    write_rows(tmp_path / "scores" / "train.tsv", ("text", "score"), rows)
    run = drawn(place, tmp_path / "runs", dataset=str(tmp_path / "scores"))
    assert run.report["validation"].keys() == {"pearson", "spearman"}
    config = json.loads((run.path / "model" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run.path / "model")
    assert model.classifier.out_features == 1
    assert library.evaluate_on_test(run.path).keys() == {"pearson", "spearman"}


def test_pairs_of_texts_in_jsonl_and_parquet_are_read_with_both_texts(place, tmp_path):
    import datasets

    texts = [text for text, _ in sentences(61)]
    rows = [(a, b, ["same", "other"][i % 2]) for i, (a, b) in enumerate(itertools.pairwise(texts))]
    write_rows(tmp_path / "pairs" / "train.jsonl", ("premise", "claim", "label"), rows)
    table = dict(zip(("premise", "claim", "label"), map(list, zip(*rows, strict=True)), strict=True))
    (tmp_path / "stored" / "pairs").mkdir(parents=True)
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "stored" / "pairs" / "train.parquet")
    runs = [drawn(place, tmp_path / str(i), "magnitude", dataset=str(folder), steps=4)
            for i, folder in enumerate((tmp_path / "pairs", tmp_path / "stored" / "pairs"))]  # fmt: skip
    assert runs[0].report["cost"]["main"]["tokens"] == runs[1].report["cost"]["main"]["tokens"]
    assert runs[0].report["dataset_fingerprint"] == runs[1].report["dataset_fingerprint"]
    assert same(weights_of(runs[0].path / "model"), weights_of(runs[1].path / "model"))
    config = json.loads((runs[0].path / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "other", "1": "same"}
    single = drawn(place, tmp_path / "one", "magnitude", dataset=str(tmp_path / "pairs"), steps=4,
                   text_columns=("premise",))  # fmt: skip
    assert single.report["cost"]["main"]["tokens"] < runs[0].report["cost"]["main"]["tokens"]


def test_the_command_line_python_and_run_yaml_name_the_same_run_and_draw_the_same_ticket(place, soup, tmp_path):
    answer = sparsesoup("prune", "isp", *flags_of(place, tmp_path / "flags"), *FLAGS)
    assert answer.returncode == 0, answer.stderr
    by_flags = run_of(tmp_path / "flags")
    assert by_flags.parent.name == soup.parent.name
    assert (by_flags / "run.yaml").read_text() == (soup / "run.yaml").read_text()
    assert main(["prune", "--config", str(soup / "run.yaml"), "--out", str(tmp_path / "recipe")]) == 0
    by_recipe = run_of(tmp_path / "recipe")
    written = json.loads((soup / "report.json").read_text())["command"]
    assert main([*shlex.split(written)[1:], "--out", str(tmp_path / "command")]) == 0
    by_command = run_of(tmp_path / "command")
    for run in (by_flags, by_recipe, by_command):
        assert run.parent.name == soup.parent.name
        assert same(masks_of(run), masks_of(soup))
        assert same(weights_of(run / "model"), weights_of(soup / "model"))
    lines = answer.stdout.splitlines()
    assert lines[0].startswith(
        f"isp: {round(0.3 * TOTAL):,} of {TOTAL:,} weights kept, 70.0 % pruned, validation accuracy "
    )
    assert lines[1].startswith("guess   right for ")
    assert [line.split()[1] for line in lines[2:]] == [str(by_flags / "report.html"), str(by_flags / "model")]


def test_another_seed_draws_another_ticket_from_another_head(place, soup, tmp_path):
    other = drawn(place, tmp_path, seed=1)
    assert other.path.name == "seed-1"
    assert other.path.parent.name == soup.parent.name
    assert not same(masks_of(other.path), masks_of(soup))


def test_a_flag_wins_over_the_recipe(soup):
    settings = settings_of(soup, "--sparsity", "0.5", "--method.stages", "1", "--train.max-grad-norm", "0")
    plain = settings_of(soup)
    assert (plain.budget.sparsity, plain.method.stages, plain.train.max_grad_norm) == (0.7, 2, 1.0)
    assert (settings.budget.sparsity, settings.method.stages, settings.train.max_grad_norm) == (0.5, 1, 0.0)
    assert dataclasses.replace(settings, budget=plain.budget, method=plain.method, train=plain.train) == plain


def test_a_recipe_may_write_numbers_as_people_do(tmp_path):
    (tmp_path / "recipe.yaml").write_text("method: isp\nsparsity: 9e-1\ntrain:\n  learning_rate: 5e-5\n")
    settings, _ = parse_arguments(["--config", str(tmp_path / "recipe.yaml")])
    assert (settings.budget.sparsity, settings.train.learning_rate) == (0.9, 5e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_recipe_and_the_command_of_every_method_repeat_it(name, tmp_path):
    settings = recipe.RunConfig(
        name=name,
        method=METHODS[name],
        budget=recipe.BudgetConfig(sparsity=0.25, steps=7),
        model_data=recipe.ModelAndDataConfig(
            model="it's here/a b", dataset="x", text_columns=("a", "b c"), seed=3, data_root="~/é"
        ),
        train=recipe.TrainingConfig(learning_rate=3e-5, optimizer="sgd"),
    )
    (tmp_path / "run.yaml").write_text(recipe.dump_config(settings), encoding="utf-8")
    assert parse_arguments(["--config", str(tmp_path / "run.yaml")])[0].to_dict() == settings.to_dict()
    assert parse_arguments(shlex.split(settings.repeat_command())[2:])[0] == settings


def test_run_keys_are_pinned():
    """A key names a run directory: were it made in another way, or did a default change under the same key, a run
    begun by an older version would be taken for another one, or start anew beside the old. A change here is a change
    for the user: say so in the changelog."""
    plain = parse_arguments(["isp"])[0]
    asked = parse_arguments(["isp", "--sparsity", "0.8", "--steps", "200", "--dataset", "glue/cola", "--seed", "4"])[0]
    said = parse_arguments(["isp", "--sparsity", "0.9"])[0]  # what holds where nothing is said of it
    assert fill_default_sparsity(plain).run_key() == fill_default_sparsity(said).run_key() == "eae7c5ba1d"
    assert fill_default_sparsity(asked).run_key() == "6701258aad"
    table = plain.to_dict()
    protocols = table["method"].pop("protocols")
    assert table == {
        "method": {"name": "isp", "stages": 5, "weak_masks": 4, "look_ahead": 0.005, "finish": 0.5,
                   "budget": "included", "moments": "inherited", "merge": "votes", "structure": "weights"},
        "model": "minilm", "dataset": "docstrings", "data_root": None, "dataset_config": None, "text_columns": None,
        "label_column": None, "max_length": None, "doc_stride": None, "prompts": None, "class_names": None,
        "drop_unlabelled": False,
        "trust_remote_code": False, "seed": 0,
        "sparsity": None, "steps": None, "epochs": None, "report_to": [],
        "train": {"learning_rate": 1e-4, "weight_decay": 0.01, "warmup_ratio": 0.1, "batch_size": 32,
                  "gradient_accumulation_steps": 1,
                  "max_grad_norm": 1.0, "precision": "no", "tf32": False, "gradient_checkpointing": False,
                  "torch_compile": False, "full_determinism": False, "dropout": None, "freeze_embeddings": False,
                  "optimizer": "adamw", "extrapolate": 0.0, "eval_steps": None, "early_stopping_patience": None,
                  "dataloader_num_workers": 0,
                  "distill": {"teacher": "", "alpha": 0.5, "temperature": 2.0, "hidden": 0.0, "attention": 0.0}},
    }  # fmt: skip
    assert [(p["rate"], p["weight_decay"], p["dropout"], p["share"]) for p in protocols] == [
        (1.0, 0.0, None, 0.5), (2.0, 0.1, 0.0, 0.5), (0.5, 0.0, 0.2, 0.5), (1.5, 0.01, 0.1, 0.25)
    ]  # fmt: skip


def test_the_test_split_is_scored_once_and_then_read(place, tmp_path, capsys):
    shutil.copytree(place / "reviews", tmp_path / "reviews")
    run = drawn(place, tmp_path / "runs", "magnitude", dataset=str(tmp_path / "reviews"), steps=4).path
    assert json.loads((run / "report.json").read_text())["test"] is None
    answer = sparsesoup("test", run)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("test: accuracy ")
    scores = json.loads((run / "report.json").read_text())["test"]
    shutil.rmtree(tmp_path / "reviews")
    shutil.rmtree(run / "model")
    before = listing(run)
    assert main(["test", str(run)]) == 0
    assert capsys.readouterr().out == answer.stdout
    assert library.evaluate_on_test(run) == scores
    assert listing(run) == before
    page = (run / "report.html").read_bytes()
    (run / "report.html").write_bytes(b"as it was before the test")  # killed before it was drawn anew
    os.utime(run / "report.html", (0, 0))
    assert library.evaluate_on_test(run) == scores
    assert (run / "report.html").read_bytes() == page


def test_the_evaluate_on_test_is_that_of_the_saved_model_on_the_test_rows(place, tmp_path):
    run = drawn(place, tmp_path, steps=30).path
    scores = library.evaluate_on_test(run)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tool = transformers.AutoTokenizer.from_pretrained(run / "model")
    with torch.no_grad():
        right = [
            int(model(**tool(text, return_tensors="pt")).logits.argmax()) == label for text, label in sentences(24, 2)
        ]
    assert scores["accuracy"] == pytest.approx(sum(right) / 24)


def test_no_row_of_the_test_split_is_read_while_pruning(place, tmp_path):
    write_rows(tmp_path / "half" / "train.csv", ("text", "label"), sentences(60))
    (tmp_path / "half" / "validation.csv").write_text("this,is\nno,table,of,texts\n")
    run = drawn(place, tmp_path / "runs", "magnitude", dataset=str(tmp_path / "half"), steps=4)
    with pytest.raises(UserError, match=r"half validation has no column 'text'|validation\.csv"):
        library.evaluate_on_test(run.path)


def test_show_prints_the_matrices_and_where_they_came_from(soup, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["show", str(soup)]) == 0
    out = capsys.readouterr().out
    for word in ("query", "feed-forward out", "weak", "70.0 %", f"{TOTAL:,}", "bert"):
        assert word in out, word


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_of_methods_cuts_nothing_off(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["methods"]) == 0
    assert "…" not in capsys.readouterr().out


def test_methods_lists_every_method_and_one_methods_settings_with_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{out}" for name in METHODS)
    for name, method in METHODS.items():
        assert main(["methods", name]) == 0
        out = capsys.readouterr().out
        for field in dataclasses.fields(method):
            flag, value = f"--method.{field.name.replace('_', '-')}", getattr(method, field.name)
            inner = [part.name for part in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
            (line,) = [x for x in out.splitlines() if x.startswith(f"{flag}.* " if inner else f"{flag} ")]
            parts = [part for part in line.split("  ") if part.strip()]
            assert len(parts) == (2 if value == "" or inner else 3), line  # the flag, its default, what it means
            assert all(re.search(rf"  {flag}\.{part.replace('_', '-')}(\.\*)? ", out) for part in inner)
            if isinstance(value, str | int | float) and value != "":
                assert parts[1].strip() == str(value), line


@pytest.mark.parametrize("name", METHODS)
def test_help_of_a_method_lists_its_settings_with_defaults_and_meaning(name, capsys):
    from docstring_parser import parse

    with pytest.raises(SystemExit) as ended:
        main(["prune", name, "--help"])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    method = METHODS[name]
    meaning = {p.arg_name: " ".join(p.description.split()) for p in parse(type(method).__doc__).params}
    for field in dataclasses.fields(method):
        assert f"--method.{field.name.replace('_', '-')}" in out
        assert meaning[field.name].rstrip(".")[:40] in out, field.name
        value = getattr(method, field.name)
        if isinstance(value, int | float):
            assert f"(default {str(value).lower() if isinstance(value, bool) else value})" in out, field.name
    for flag in ("--model", "--dataset", "--sparsity", "--steps", "--epochs", "--seed", "--out", "--config"):
        assert flag in out


def test_apply_makes_another_copy_of_the_base_model_sparse_by_the_masks_alone(place, soup, tmp_path, capsys):
    copy = checkpoint(tmp_path / "copy")
    before = listing(copy)
    assert main(["apply", str(soup), "--model", str(copy), "--out", str(tmp_path / "sparse")]) == 0
    assert f"{round(0.3 * TOTAL):,} of {TOTAL:,}" in capsys.readouterr().out
    assert listing(copy) == before
    model, plain = transformers.AutoModel.from_pretrained(tmp_path / "sparse"), base_model("bert")
    masks = {name.removeprefix("bert."): mask for name, mask in masks_of(soup).items()}
    for name, parameter in plain.named_parameters():
        expected = parameter * masks[name] if name in masks else parameter
        assert torch.equal(model.get_parameter(name), expected), name
    assert same(masks_of(tmp_path / "sparse"), masks)
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())
    assert config["pruning_config"]["kept"] == round(0.3 * TOTAL)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "sparse")("good film")["input_ids"][0] == 2
    again = ["apply", str(tmp_path / "sparse"), "--model", str(copy), "--out", str(tmp_path / "again")]
    assert main(again) == 0  # what it writes is a ticket like the one it was given
    assert same(weights_of(tmp_path / "again"), weights_of(tmp_path / "sparse"))


@pytest.mark.parametrize("other", ["rounded to bf16", "of another seed", "fine-tuned"])
def test_apply_refuses_weights_that_the_ticket_was_not_drawn_from(other, soup, tmp_path, capsys):
    if other == "fine-tuned":
        model = soup / "model"
    else:
        model = checkpoint(tmp_path / "other", seed=other == "of another seed",
                           dtype=torch.bfloat16 if "bf16" in other else torch.float32)  # fmt: skip
    command = ["apply", str(soup), "--model", str(model), "--out", str(tmp_path / "sparse")]
    capsys.readouterr()
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "foreign ticket" in line
    assert "whose weights differ from those of" in line
    assert "--other-weights" in line
    assert not (tmp_path / "sparse").exists()
    assert main([*command, "--other-weights"]) == 0


def test_a_ticket_is_trained_again_transferred_and_pruned_further(place, soup, tmp_path):
    masks = masks_of(soup)
    again = drawn(place, tmp_path / "again", "ticket", sparsity=None, method={"ticket": str(soup)})
    assert same(masks_of(again.path), masks)
    assert again.report["sparsity"]["kept"] == round(0.3 * TOTAL)
    rows = [(text, ["yes", "no", "maybe"][len(text) % 3]) for text, _ in sentences(60, 5)]
    write_rows(tmp_path / "questions" / "train.csv", ("text", "label"), rows)
    moved = drawn(place, tmp_path / "moved", "ticket", sparsity=None, method={"ticket": str(soup)},
                  dataset=str(tmp_path / "questions"))  # fmt: skip
    assert same(masks_of(moved.path), masks)
    assert json.loads((moved.path / "model" / "config.json").read_text())["id2label"]["2"] == "yes"
    further = drawn(place, tmp_path / "further", "ticket", sparsity=0.9, method={"ticket": str(soup)})
    assert further.report["sparsity"]["kept"] == round((1 - 0.9) * TOTAL)
    assert all(bool((mask <= masks[name]).all()) for name, mask in masks_of(further.path).items())
    own = drawn(place, tmp_path / "own", "ticket", sparsity=None, method={"ticket": str(soup)}, model=str(soup))
    assert same(masks_of(own.path), masks)
    with pytest.raises(UserError, match=r"sparsity 0\.5 is below the ticket's 0\.7"):
        drawn(place, tmp_path / "less", "ticket", sparsity=0.5, method={"ticket": str(soup)})


def test_the_pretrained_model_is_never_written_to(place, tmp_path):
    before = listing(place)
    drawn(place, tmp_path, "imp", steps=4)
    assert listing(place) == before


def test_a_run_directory_is_a_model_too(place, soup, tmp_path):
    run = drawn(place, tmp_path, "dense", sparsity=None, model=str(soup), steps=4)
    assert run.report["sparsity"] == {"target": 0.0, "reached": 0.0, "kept": TOTAL, "total": TOTAL}


def test_settings_that_python_is_given_are_checked_like_flags(place, tmp_path):
    for wrong, message in [({"sparsty": 0.5}, "^sparsty: unknown setting; did you mean sparsity"),
                           ({"method": {"stage": 1}}, "^method.stage: unknown setting .*; did you mean method.stages"),
                           ({"train": {"rate": 1}}, "^train.rate: unknown setting; did you mean train.learning_rate"),
                           ({"sparsity": 90}, r"in \[0, 1\), got 90; for 90 % set 0\.9")]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            drawn(place, tmp_path / "runs", **wrong)
    assert not (tmp_path / "runs").exists()


def test_a_step_with_a_teacher_in_it_is_no_unit_of_cost(place, tmp_path):
    """Neither for pins, whose teacher is itself, nor for a teacher that somebody else has trained."""
    gradual = drawn(place, tmp_path, "gradual", steps=40).report
    pins = drawn(place, tmp_path, "pins", steps=40, method={"every_steps": 5, "window": 5}).report
    teacher = drawn(place, tmp_path, "dense", sparsity=None).path
    with_teacher = drawn(place, tmp_path, "gradual", steps=40, train={"distill": {"teacher": str(teacher)}}).report
    plain = gradual["cost"]["main"]["flops"]
    assert times_dense(gradual) == pytest.approx(1.0)
    for report in (pins, with_teacher):
        spent = sum(cost["flops"] for label, cost in report["cost"].items() if label != "validation")
        assert times_dense(report) >= 0.97 * spent / plain > 1.15
    assert times_dense(with_teacher) == pytest.approx(with_teacher["cost"]["main"]["flops"] / plain, rel=0.03)


def test_what_selects_is_part_of_the_cost_and_the_last_look_is_not(place, tmp_path):
    own = {"cut": 0.5, "beyond": 0}
    report = drawn(place, tmp_path, "lottery-pools", method=own, sparsity=0.5).report
    validation = report["cost"]["validation"]
    passes = validation["examples"] / report["validation_rows"]
    assert passes == 1 + 11 + 1  # its own ticket, eleven shares of the other one, and the end
    training = sum(cost["flops"] for label, cost in report["cost"].items() if label != "validation")
    assert times_dense(report) * dense_flops(report) == pytest.approx(training + validation["flops"] * 12 / 13)


def test_a_ratio_of_neighbours_needs_no_sparsity(place, tmp_path):
    run = drawn(place, tmp_path, "magnitude", sparsity=None, method={"scope": "2:4"})
    assert run.report["sparsity"]["reached"] == 0.5


def test_a_sparsity_that_leaves_no_weight_is_reached(place, tmp_path):
    assert drawn(place, tmp_path, "isp", sparsity=0.99999).report["sparsity"]["kept"] == 0


def test_a_run_says_what_it_predicts_and_when_its_gates_missed(place, tmp_path, capsys):
    line = ["prune", "soft-movement", *flags_of(place, tmp_path, steps=40), "--method.score-rate", "0.5"]
    assert main([*line, "--method.penalty", "0"]) == 0
    said = capsys.readouterr().err
    assert re.search(r"note: the gates alone closed [0-6]?\d\.\d % of the weights instead of 70\.0 %", said)
    assert "leave out --method.penalty" in said
    assert main(["show", str(run_of(tmp_path))]) == 0
    assert "2 classes (" in (out := capsys.readouterr().out)
    assert "in column label from column text" in " ".join(out.split())


def test_a_recipe_may_be_written_with_dashes_as_flags_are(place, tmp_path):
    recipe = {"model": str(place / "bert"), "dataset": str(place / "reviews"), "sparsity": 0.7, "steps": 8,
              "text-columns": "text", "train": {"batch-size": 8}, "method": {"name": "imp", "cut": 0.5}}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["prune", "--config", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "runs")]) == 0
    assert json.loads((run_of(tmp_path / "runs") / "report.json").read_text())["settings"]["train"]["batch_size"] == 8


def test_what_is_doubtful_about_a_method_is_said_before_the_first_step_and_in_the_report(place, tmp_path, capsys):
    line = ["prune", "grasp", *flags_of(place, tmp_path, steps=6), "--method.batches", "2"]
    assert main([*line, "--method.measure", "increase"]) == 0
    said = capsys.readouterr().err
    assert "note: grasp with measure increase removes first what pulls one way" in said
    assert main(["show", str(run_of(tmp_path))]) == 0
    assert "Grasp with measure increase removes first" in " ".join(capsys.readouterr().out.split())


def test_a_fresh_head_is_named_where_scores_ask_it_and_can_be_trained_first(place, tmp_path, capsys):
    line = ["prune", "snip", *flags_of(place, tmp_path, steps=10), "--method.batches", "2"]
    assert main(line) == 0
    assert (
        "note: snip scores by the gradient of the loss, and the head is randomly initialised" in capsys.readouterr().err
    )
    assert main([*line, "--method.warmup", "0.2"]) == 0
    assert "the head is randomly initialised" not in capsys.readouterr().err
    costs = {path.parent: json.loads(path.read_text())["cost"] for path in tmp_path.glob("**/report.json")}
    plain, warm = sorted(costs, key=lambda run: "search" in costs[run])
    assert (costs[warm]["search"]["steps"], costs[warm]["main"]["steps"]) == (2, 8)
    known = flags_of(place, tmp_path / "known", family=plain / "model", steps=10)
    assert main(["prune", "snip", *known, "--method.batches", "2"]) == 0
    assert "the head is randomly initialised" not in capsys.readouterr().err
