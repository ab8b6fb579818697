"""Bad input ends with one clear line that names the thing, the value, what is allowed and the remedy; exit code 2."""

import json
import os
import pickle
import re
import shutil
import statistics
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import same
from sparsesoup import prune
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.core.timing import time_interleaved
from sparsesoup.runs.yaml_text import dump_yaml, read_yaml
from tiny_hub import (
    MAIN,
    base_model,
    checkpoint,
    listing,
    masks_of,
    older,
    reviews,
    run_of,
    sentences,
    sparsesoup,
    sparsesoup_alone,
    tokenizer,
    weights_of,
    write_rows,
)  # fmt: skip


@pytest.fixture(scope="module")
def ticket(place, tmp_path_factory):
    """A finished run; no test writes to it."""
    out = tmp_path_factory.mktemp("ticket")
    assert main(line_of(place, out, "magnitude")) == 0
    return run_of(out)


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def line_of(place, out, method="magnitude", **changed):
    flags = {"model": place / "bert", "dataset": place / "reviews", "sparsity": 0.7, "steps": 8,
             "train.batch-size": 8} | {k.replace("_", "-"): v for k, v in changed.items()}  # fmt: skip
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    return ["prune", *([method] if method else []), *words, "--out", str(out)]


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a command that must be refused; what it says. Nothing below `clean` may come into being."""

    def check(line, *parts, clean=tmp_path / "runs"):
        capsys.readouterr()
        before = listing(clean) if clean.exists() else None
        code = main([str(word) for word in line])
        out, errors = capsys.readouterr()
        assert code == 2, errors
        assert out == ""
        said = errors.splitlines()[-1]
        told = errors.splitlines()[:-1]  # what was read, where the first step was reached
        assert said.startswith("sparsesoup: ")
        assert all(line.startswith(("data: ", "model: ", "run: ", "note: ")) for line in told), told
        for part in parts:
            assert part in said, said
        assert (listing(clean) if clean.exists() else None) == before
        return said

    return check


@pytest.mark.integration
def test_the_real_command_line_says_one_line_and_leaves_with_2(place, tmp_path):
    answer = sparsesoup_alone(*line_of(place, tmp_path / "runs", "ips"))
    assert (answer.returncode, answer.stdout) == (2, "")
    assert re.fullmatch(r"sparsesoup: unknown method 'ips'; did you mean .*\bisp\b.*\? \(allowed: dense, .*\)\n",
                        answer.stderr)  # fmt: skip
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_says_a_thing_twice_or_what_is_no_setting(refused, tmp_path):
    (tmp_path / "twice.yaml").write_text("method: magnitude\nsparsity: 0.5\nsparsity: 0.6\n")
    refused(["prune", "--config", "twice.yaml"], "twice.yaml", 'found duplicate key "sparsity"', "line 3")
    (tmp_path / "help.yaml").write_text("method: magnitude\nhelp: true\n")
    refused(["prune", "--config", "help.yaml"], "help.yaml, line 2: help: unknown setting")


def test_numbers_that_are_no_classes_are_refused_and_not_counted_up_to(place, refused, tmp_path):
    (tmp_path / "ids").mkdir()
    rows = "".join(f"text {i},{(i % 2) * 30000000}\n" for i in range(40))
    (tmp_path / "ids" / "train.csv").write_text("text,label\n" + rows)
    said = refused(line_of(place, tmp_path / "runs", dataset=tmp_path / "ids"), "--label-column")
    assert "label has 2 different numbers from 0 to 30000000" in said


def test_classes_written_with_a_point_are_regression_and_a_note_says_so(place, tmp_path, capsys):
    rows = [(text, f"{label}.0") for text, label in sentences(40)]
    write_rows(tmp_path / "pointed" / "train.csv", ("text", "label"), rows)
    flags = ["--model", str(place / "bert"), "--steps", "1", "--train.batch-size", "4", "--out", str(tmp_path / "out")]
    assert main(["prune", "random", "--dataset", str(tmp_path / "pointed"), *flags]) == 0
    assert "note: column label holds whole numbers with a point (0.0, 1.0)" in capsys.readouterr().err


@pytest.mark.skipif(torch.accelerator.is_available(), reason="bf16 is fast on this machine")
def test_a_note_warns_of_bf16_where_the_cpu_computes_without_it(place, tmp_path, capsys):
    whole, half = torch.rand(256, 256), torch.rand(256, 256).bfloat16()
    plain, short = map(statistics.median, time_interleaved([lambda: whole @ whole, lambda: half @ half], rounds=9))
    flags = ["--model", str(place / "bert"), "--dataset", str(place / "reviews"), "--out", str(tmp_path / "out")]
    training = ["--steps", "1", "--train.batch-size", "4", "--train.precision", "bf16"]
    assert main(["prune", "dense", *flags, *training, "--sparsity", "0.5"]) == 0
    said = capsys.readouterr().err
    assert ("note: this CPU has no bf16" in said) == (short > 3 * plain)
    assert "note: dense keeps every weight; sparsity 0.5 is not used" in said


def test_a_finished_run_does_not_stand_for_one_on_other_data(place, tmp_path, refused, capsys):
    line = line_of(place, tmp_path / "runs", dataset="mine")
    for root, rows in (("first", 60), ("second", 64)):
        reviews(tmp_path / root / "mine", rows)
    assert main([*line, "--data-root", "first"]) == 0
    run = run_of(tmp_path / "runs")
    for left in (None, run / "report.html"):  # also where it was killed before its very end
        if left:
            left.unlink()
        refused([*line, "--data-root", "second"], f"dataset mine is not the one that {run} was trained on",
                "its training rows differ", "another --out")  # fmt: skip
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    assert main([*line, "--data-root", "moved"]) == 0  # the same rows elsewhere
    older(run / "report.json", "dataset_fingerprint")
    assert main([*line, "--data-root", "second"]) == 0  # of an older version, which did not say


def test_a_finished_run_does_not_stand_for_one_on_a_file_that_changed(place, tmp_path, refused):
    shutil.copytree(place / "reviews", tmp_path / "mine")
    line = line_of(place, tmp_path / "runs", dataset="mine")
    assert main(line) == 0
    with open(tmp_path / "mine" / "train.csv", "a", encoding="utf-8") as file:
        file.write("a good film,1\n")
    refused(line, "dataset mine is not the one that", "its training rows differ")


def test_a_run_is_not_scored_on_data_that_changed(place, tmp_path, capsys):
    shutil.copytree(place / "reviews", tmp_path / "mine")
    assert main(line_of(place, tmp_path / "runs", dataset=tmp_path / "mine")) == 0
    file = tmp_path / "mine" / "train.csv"
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join([rows[0], *rows[2:], rows[1]]))
    (run,) = (tmp_path / "runs").rglob("seed-0")
    before = (run / "report.json").read_text()
    capsys.readouterr()
    assert main(["test", str(run)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "its training rows differ" in said
    assert (run / "report.json").read_text() == before


def test_unknown_method_and_command(place, refused, tmp_path):
    refused(line_of(place, tmp_path / "runs", "magnitud"), "unknown method 'magnitud'", "did you mean magnitude")
    refused(line_of(place, tmp_path / "runs", "zzz"), "unknown method 'zzz'", "see `sparsesoup methods`", "allowed: ")
    refused(["methods", "imp-rewnd"], "unknown method 'imp-rewnd'", "imp-rewind")
    refused(
        ["prnue", "isp"],
        "unknown command 'prnue'",
        "allowed: prune, test, show, methods, apply, export, benchmark, push, compare",
    )
    refused(line_of(place, tmp_path / "runs", None), "no method given", "sparsesoup prune METHOD", "isp")


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("1.0", ["got 1"]),
        ("-0.1", ["got -0.1"]),
        ("90", ["got 90", "for 90 % set 0.9"]),
        ("nan", ["got 'nan'", "for 90 % set 0.9"]),
        ("lots", ["got 'lots'", "for 90 % set 0.9"]),
        ("85%", ["got '85%'", "for 90 % set 0.9"]),
    ],
)
def test_sparsity_outside_its_range(place, refused, tmp_path, value, parts):
    said = refused(line_of(place, tmp_path / "runs", sparsity=value), *parts)
    assert "--sparsity: the share of weights removed is " in said


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--method.stagse", "3"], ["--method.stagse: unknown setting", "did you mean", "--method.stages"]),
        (
            ["--train.distill", '{"temprature": 4}'],
            ["--train.distill.temprature: unknown setting", "did you mean --train.distill.temperature"],
        ),
        (["--sparsty", "0.5"], ["--sparsty: unknown setting; did you mean --sparsity"]),
        (["--train.gamma", "0.5"], ["--train.gamma: unknown setting (train has learning_rate, "]),
        (["--method.stages", "many"], ["--method.stages: expected a whole number, got 'many'"]),
        (["--method.stages", "0"], ["--method.stages: must be at least 1, got 0"]),
        (["--method.budget", "free"], ["method.budget", "free", "included", "extra"]),
        (["--method.protocols", "[]"], ["--method.protocols: must be one or more, got ()"]),
        (["--method.protocols", '[{"rte": 1}]'], ["rte"]),
        (["--train.precision", "fp8"], ["train.precision", "fp8", "bf16"]),
        (["--train.optimizer", "lion"], ["train.optimizer", "lion", "adamw", "sgd"]),
        (["--train.learning-rate", "-1"], ["--train.learning-rate: must be a number of at least 0, got -1"]),
        (["--train.learning-rate", "fast"], ["--train.learning-rate: expected a number, got 'fast'"]),
        (["--train.warmup-ratio", "1"], ["--train.warmup-ratio: ", "[0, 1)", "got 1"]),
        (["--train.batch-size", "0"], ["--train.batch-size: must be at least 1, got 0"]),
        (["--train.gradient-accumulation-steps", "0"], ["--train.gradient-accumulation-steps: must be at least 1"]),
        (["--steps", "-1"], ["--steps: must be at least 0", "got -1"]),
        (["--steps", "1.5"], ["steps", "1.5", "a whole number"]),
        (["--epochs", "0"], ["epochs"]),
        (["--max-length", "1"], ["--max-length: must be at least 2", "got 1"]),
        (["--max-length", "4000"], ["--max-length: 4000 is above the 132 positions", "set 128 or less"]),
        (["--save-every", "-3"], ["--save-every: a number of seconds", "-3"]),
        (["--seed", "x"], ["seed", "x", "a whole number"]),
        (["stray"], ["stray"]),
    ],
)
def test_unknown_settings_and_wrong_values_in_flags(place, refused, tmp_path, flags, parts):
    refused([*line_of(place, tmp_path / "runs", "isp"), *flags], *parts)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--method.scope", "2:4"], ["scope 2:4 fixes the sparsity at 0.5"]),
        (["--method.pattern.rows", "5"], ["a 5x1 block does not tile"]),
        (["--method.pattern.rows", "-1"], ["a block has sides of 0 (whole) or more", "-1x1"]),
        (["--method.score", "random"], ["method magnitude has score magnitude", "got random"]),
    ],
)
def test_groups_that_cannot_be_and_settings_that_a_row_fixes(place, refused, tmp_path, flags, parts):
    refused([*line_of(place, tmp_path / "runs", "magnitude"), *flags], *parts)


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ("method: {name: isp, stagse: 3}", ["line 1: method.stagse: unknown setting", "did you mean method.stages"]),
        ("method: isp\nsparsty: 0.5", ["line 2: sparsty: unknown setting; did you mean sparsity"]),
        ("method: isp\ntrain: {learning_rate: fast}", ["line 2: train.learning_rate: expected a number, got 'fast'"]),
        ("method: {name: isp, stages: many}", ["line 1: method.stages: expected a whole number, got 'many'"]),
        ("method: {name: isp, stages: [1, 2]}", ["method.stages", "a whole number"]),
        ("method: isp\nsparsity: 90", ["in [0, 1)", "got 90", "for 90 % set 0.9"]),
        ("method: isp\ntrain: 3", ["train"]),
        ("method: ips", ["unknown method 'ips'", "isp"]),
        ("method: 7", ["unknown method '7'"]),
        ("sparsity: 0.5", ["no method given"]),
        ("method: {stages: 3}", ["no method given"]),
        ("method: [unclosed", ["cannot read recipe", "recipe.yaml"]),
        ("- a\n- list", ["recipe", "recipe.yaml", "must be a table of settings"]),
        ("", ["recipe", "must be a table of settings"]),
        ("method: isp\n1: 2", ["unknown setting", "1"]),
        ("method: isp\nprompts: 3", ["line 2: prompts: expected text or null, got 3"]),
        ("method: isp\nsteps: !!int x", ["cannot read recipe", "'x' is no int, line 2; correct it"]),
        ("method: isp\ntrain: {max_grad_norm: !!bool x}", ["cannot read recipe", "'x' is no bool, line 2; correct it"]),
        ("method: isp\nprompts: &all [a, *all]", ["what begins in line 2 holds itself by an alias"]),
        ("method: isp\ntrain: &all {<<: *all}", ["what begins in line 2 holds itself by an alias"]),
        ("method: isp\nprompts: " + 2000 * "[" + 2000 * "]", ["cannot read recipe", "nested too deep"]),
    ],
)
def test_bad_recipes(refused, tmp_path, recipe, parts):
    (tmp_path / "recipe.yaml").write_text(recipe)
    refused(["prune", "--config", tmp_path / "recipe.yaml", "--out", tmp_path / "runs"], *parts)


def test_recipes_that_are_missing_or_no_text_or_for_another_method(refused, tmp_path):
    refused(["prune", "--config", tmp_path / "no.yaml"], "cannot read recipe", "no.yaml", "No such file")
    refused(["prune", "--config"], "--config: expected one argument")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(128, 256)))
    refused(["prune", "--config", tmp_path / "binary.yaml"], "cannot read recipe", "binary.yaml")
    (tmp_path / "recipe.yaml").write_text("method: imp")
    refused(["prune", "isp", "--config", tmp_path / "recipe.yaml"], "the recipe is for method imp",
            "the command line says isp", "name one of them")  # fmt: skip


def test_a_model_that_is_not_there(place, refused, tmp_path):
    refused(
        line_of(place, tmp_path / "runs", model=tmp_path / "no"), f"no model at {tmp_path / 'no'}", "no such folder"
    )
    refused(line_of(place, tmp_path / "runs", model=place / "reviews"), "is a folder without config.json",
            "save_pretrained")  # fmt: skip
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    refused(line_of(place, tmp_path / "runs", model=tmp_path / "broken"), "cannot load model", "broken")
    shutil.copytree(place / "bert", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(line_of(place, tmp_path / "runs", model=tmp_path / "cut"), "cannot load model", "cut")


def test_a_model_without_a_tokenizer_is_refused_and_not_read_with_an_empty_one(place, refused, tmp_path):
    shutil.copytree(place / "bert", tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    refused(line_of(place, tmp_path / "runs", model=tmp_path / "mute"), "mute has no tokenizer", "save_pretrained")


def test_a_hub_model_and_a_hub_dataset_offline_are_refused_at_once(place, refused, tmp_path):
    began = time.monotonic()
    refused(line_of(place, tmp_path / "runs", model="nobody/no-such-model"), "cannot load model 'nobody/no-such-model'",
            "minilm")  # fmt: skip
    refused(line_of(place, tmp_path / "runs", dataset="nobody/no-such-set"), "cannot open dataset 'nobody/no-such-set'",
            "SPARSESOUP_DATA", "docstrings")  # fmt: skip
    assert time.monotonic() - began < 10


def data(tmp_path, *columns, rows, split="train"):
    write_rows(tmp_path / "set" / f"{split}.csv", columns, rows)
    return tmp_path / "set"


def test_a_dataset_that_is_not_there_or_has_not_the_columns(place, refused, tmp_path):
    out = tmp_path / "runs"
    refused(line_of(place, out, dataset=tmp_path / "no.csv"), "no dataset", "no.csv", "correct the path")
    (tmp_path / "empty").mkdir()
    refused(line_of(place, out, dataset=tmp_path / "empty"), "no data in", "empty", "train.csv")
    rows = [(text, text, text, label) for text, label in sentences(20)]
    refused(line_of(place, out, dataset=data(tmp_path, "a", "b", "c", "label", rows=rows)),
            "3 columns that may be the text", "its columns are a", "--text-columns")  # fmt: skip
    refused(line_of(place, out, dataset=data(tmp_path, "a", "b", "c", "d", rows=rows)),
            "no column that looks like a label", "d (int64)", "--label-column")  # fmt: skip
    refused(line_of(place, out, dataset=tmp_path / "set", label_column="e"), "no column 'e'", "--label-column")
    refused(line_of(place, out, dataset=tmp_path / "set", label_column="d", text_columns="a,x"), "no column 'x'")
    refused(line_of(place, out, dataset=data(tmp_path, "text", "label", rows=[])), "empty", "set")
    refused(line_of(place, out, dataset=data(tmp_path, "text", "label", rows=[("one row", 0)])), "has 1 row", "least 3")
    (tmp_path / "set" / "train.csv").write_text("")
    refused(line_of(place, out, dataset=tmp_path / "set"), "train.csv is empty")
    (tmp_path / "set" / "train.csv").unlink()
    refused(line_of(place, out, dataset=data(tmp_path, "text", "label", rows=sentences(9), split="test")),
            "has no training split", "test")  # fmt: skip
    refused(line_of(place, out, data_root=tmp_path / "nowhere"), "data root", "nowhere", "--data-root")


def test_labels_of_the_test_split_outside_the_models_range_and_an_empty_test_split(place, refused, tmp_path):
    folder = data(tmp_path, "text", "label", rows=sentences(40))
    write_rows(folder / "validation.csv", ("text", "label"), [*sentences(5), ("very odd", 7)])
    assert main(line_of(place, tmp_path / "runs", dataset=folder)) == 0
    run = run_of(tmp_path / "runs")
    refused(["test", run], "validation", "row 5 has the label 7", "0 to 1")
    assert json.loads((run / "report.json").read_text())["test"] is None
    write_rows(folder / "validation.csv", ("text", "label"), [])
    refused(["test", run], "validation is empty", "at least one")


@pytest.mark.parametrize("command", ["test", "show"])
def test_a_run_that_is_not_there_or_not_finished(refused, tmp_path, command):
    refused([command, tmp_path / "no"], "no")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "report.json").write_text('{"format": 1')
    refused([command, tmp_path / "bad"], "damaged", "report.json")
    (tmp_path / "bad" / "report.json").write_text("[]")
    refused([command, tmp_path / "bad"], "report.json")
    refused([command], "RUN", f"sparsesoup {command} --help")


def test_a_loss_that_is_no_number_says_at_which_step(place, refused, tmp_path):
    line = line_of(place, tmp_path / "runs", "isp", steps=30)
    line += [
        "--method.stages",
        "2",
        "--method.weak-masks",
        "1",
        "--train.max-grad-norm",
        "0",
        "--train.learning-rate",
        "1e30",
    ]
    said = refused(line, "what was finished is kept", "--train.learning", "1e+30")
    assert re.search(r"the loss is (nan|inf) at step \d+ of the \w", said)


def test_a_loss_that_is_no_number_keeps_the_finished_pieces(place, tmp_path, capsys):
    rows = [(text, score + 0.5) for text, score in sentences(64)]
    folder = data(tmp_path, "text", "score", rows=[*rows[:-1], (rows[-1][0], 3.4e38)])
    line = line_of(place, tmp_path / "runs", "imp-rewind", dataset=folder, steps=30, save_every=0, seed=1)
    assert main(line) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    step = int(re.search(r"the loss is inf at step (\d+)", said).group(1))
    assert step > 2, "the wrong row came first: use another seed"
    run = run_of(tmp_path / "runs")
    assert (run / "stages" / "checkpoint.json").exists()
    assert (run / "run.yaml").exists()
    assert not (run / "model").exists()
    assert not (run / "report.json").exists()


def test_a_run_from_before_there_was_a_setting_is_the_run_with_its_default(place, refused, tmp_path):
    out = tmp_path / "runs"
    assert main(line_of(place, out)) == 0
    run = run_of(out)
    table = read_yaml((run / "run.yaml").read_text())
    del table["method"]["structure"], table["train"]["distill"]["hidden"], table["doc_stride"]
    (run / "run.yaml").write_text(dump_yaml(table))
    assert main(line_of(place, out)) == 0
    table["train"]["distill"] = {"alpha": 0.1}
    (run / "run.yaml").write_text(dump_yaml(table))
    refused(line_of(place, out), f"{run} holds a different run (train differ)")


def test_an_output_directory_that_holds_something_else(place, refused, tmp_path):
    out = tmp_path / "runs"
    assert main(line_of(place, out)) == 0
    run = run_of(out)
    refused(line_of(place, run), f"--out: {run} is itself a run directory")
    table = read_yaml((run / "run.yaml").read_text())
    table["train"]["max_grad_norm"] = 2.0
    table["max_length"] = 77
    (run / "run.yaml").write_text(dump_yaml(table))
    refused(line_of(place, out), f"{run} holds a different run", "max_length, train differ", "another --out")
    (run / "run.yaml").write_text("][")
    refused(line_of(place, out), "run.yaml is damaged", "another --out")
    (run / "run.yaml").unlink()
    refused(line_of(place, out), "holds something that is no run", "another --out")
    (tmp_path / "file").write_text("not a folder")
    refused(line_of(place, tmp_path / "file"), "file", "--out")


@pytest.mark.parametrize("method", ["isp", "magnitude", "gradual", "isp-code", "isp-paper", "ticket"])
def test_steps_too_few_for_the_schedule_name_the_least_number_that_does(place, refused, tmp_path, ticket, method):
    out = tmp_path / "runs"
    said, own = "", {"method.ticket": ticket} if method == "ticket" else {}
    for steps in range(1, 4):
        line = line_of(place, out, method, steps=steps, **own)
        if main(line) == 2:
            said = refused(line, f"{steps} steps are too few", "raise --steps or --epochs")
            break
        shutil.rmtree(out)
    if method in ("isp", "gradual"):
        assert said
    if said:
        needed = int(re.search(r"at least (\d+)", said).group(1))
        refused(line_of(place, out, method, steps=needed - 1, **own), f"needs at least {needed}")
        if method != "isp-paper":  # thousands of steps
            assert main(line_of(place, out, method, steps=needed, **own)) == 0


def spoilt(ticket, tmp_path, how):
    """A copy of the ticket's run, damaged."""
    run = tmp_path / "spoilt"
    shutil.copytree(ticket, run)
    masks, facts = (run / "model" / "pruning" / name for name in ("masks.safetensors", "ticket.json"))
    if how == "truncated masks":
        masks.write_bytes(masks.read_bytes()[:-20])
    elif how == "no bytes":
        masks.write_bytes(b"")
    elif how == "flipped bit":
        data = bytearray(masks.read_bytes())
        data[-1] ^= 1
        masks.write_bytes(bytes(data))
    elif how == "edited facts":
        table = json.loads(facts.read_text())
        older(facts, kept=table["kept"] - 1)
    elif how == "facts that are no JSON":
        facts.write_text(facts.read_text()[:-40])
    elif how == "no facts":
        facts.unlink()
    elif how == "another format":
        save_file(load_file(masks), masks, metadata={"sparsesoup": json.dumps({"format": "9"})})
    elif how == "no masks":
        masks.unlink()
    return run


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("truncated masks", ["damaged ticket", "masks.safetensors", "copy it again"]),
        ("no bytes", ["damaged ticket", "masks.safetensors"]),
        ("flipped bit", ["damaged ticket", "ticket.json says 1229 of 4096"]),
        ("edited facts", ["damaged ticket", "keeps 1229 of 4096", "ticket.json says 1228"]),
        ("facts that are no JSON", ["damaged ticket", "ticket.json"]),
        ("no facts", ["damaged ticket", "ticket.json"]),
        ("another format", ["masks.safetensors has format 9", "reads 1"]),
        ("no masks", ["no ticket at", "masks.safetensors"]),
    ],
)
def test_damaged_tickets(place, ticket, refused, tmp_path, how, parts):
    run = spoilt(ticket, tmp_path, how)
    refused(["apply", run, "--model", place / "bert", "--out", tmp_path / "runs"], *parts)
    refused([*line_of(place, tmp_path / "runs", "ticket", sparsity=None), "--method.ticket", run], *parts)
    refused([*line_of(place, tmp_path / "runs", "ticket"), "--method.ticket", run], *parts)


def test_foreign_tickets(place, ticket, refused, tmp_path):
    def both(model, *parts):
        refused(["apply", ticket, "--model", model, "--out", tmp_path / "runs"], "foreign ticket", *parts)
        line = line_of(place, tmp_path / "runs", "ticket", model=model)
        refused([*line, "--method.ticket", ticket], "foreign ticket", *parts)

    both(checkpoint(tmp_path / "seed", seed=1), "weights differ")
    both(checkpoint(tmp_path / "roberta", "distilbert"), "which the model does not have", "use its base model")
    base_model("bert", intermediate_size=48).save_pretrained(tmp_path / "wide")
    tokenizer(True).save_pretrained(tmp_path / "wide")
    both(tmp_path / "wide", "has shape (32, 16)", "(48, 16)")
    base_model("bert", num_hidden_layers=3).save_pretrained(tmp_path / "deep")
    tokenizer(True).save_pretrained(tmp_path / "deep")
    refused([*line_of(place, tmp_path / "runs", "ticket", model=tmp_path / "deep"), "--method.ticket", ticket],
            "foreign ticket")  # fmt: skip
    refused(line_of(place, tmp_path / "runs", "ticket"), "--method.ticket")
    refused([*line_of(place, tmp_path / "runs", "ticket"), "--method.ticket", tmp_path / "no"], "no ticket at")


def test_apply_does_not_write_over_anything(place, ticket, refused, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    line = ["apply", ticket, "--model", place / "bert", "--out"]
    refused([*line, tmp_path / "there"], f"--out {tmp_path / 'there'} is there already", clean=tmp_path / "there")
    refused(line[:-1], "--out")
    refused([*line[:2], "--out", tmp_path / "runs"], "--model")
    refused([*line[:3], tmp_path / "no", "--out", tmp_path / "runs"], "no model at")


@pytest.fixture(scope="module")
def plain(place, tmp_path_factory):
    """A run that had room for everything."""
    out = tmp_path_factory.mktemp("plain")
    assert main(line_of(place, out, "isp", steps=40)) == 0
    return run_of(out)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
from sparsesoup.cli.main import main
"""


@pytest.mark.integration
@pytest.mark.parametrize("size", [2_000, 30_000])  # too little for the log or the first state, and for the model
def test_a_full_disk_says_so_leaves_nothing_half_written_and_the_run_goes_on_afterwards(place, tmp_path, plain, size):
    """A limit on the size of files stands for the full disk: it fails in the same places, and needs no root."""
    line = [*line_of(place, tmp_path / "runs", "isp", steps=40), "--save-every", "0"]
    full = sparsesoup(*line, wrap=LIMITED.format(size=size))
    assert full.returncode == 2, full.stderr
    assert full.stderr.splitlines()[-1].startswith("sparsesoup: the disk is full (")
    assert "free space and repeat the command" in full.stderr
    assert "Traceback" not in full.stderr
    left = [path.name for path in (tmp_path / "runs").rglob("*")] if (tmp_path / "runs").exists() else []
    assert not [name for name in left if name.endswith(".part") or name in ("model", "report.json", "report.html")]
    assert main(line) == 0
    assert same(masks_of(run_of(tmp_path / "runs")), masks_of(plain))


class Payload:
    def __reduce__(self):
        return (os.mkdir, (os.environ["SPARSESOUP_PAYLOAD"],))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin"])
def test_a_pickled_checkpoint_is_refused_and_never_opened(place, refused, tmp_path, monkeypatch, ticket, name):
    monkeypatch.setenv("SPARSESOUP_PAYLOAD", str(tmp_path / "payload-ran"))
    shutil.copytree(place / "bert", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    (tmp_path / "pickled" / name).write_bytes(pickle.dumps(Payload()))
    refused(line_of(place, tmp_path / "runs", model=tmp_path / "pickled"), "cannot load model", "model.safetensors")
    refused(["apply", ticket, "--model", tmp_path / "pickled", "--out", tmp_path / "runs"], "cannot load model")
    assert not (tmp_path / "payload-ran").exists()
    pickle.loads((tmp_path / "pickled" / name).read_bytes())
    assert (tmp_path / "payload-ran").exists()  # it would have run


CODE = """
import os
from transformers import BertConfig, BertForSequenceClassification
os.makedirs(os.environ["SPARSESOUP_PAYLOAD"], exist_ok=True)
class OwnConfig(BertConfig):
    model_type = "own-bert"
class OwnModel(BertForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.mark.integration
@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_checkpoint_runs_only_if_asked_to(place, refused, tmp_path, monkeypatch, known):
    monkeypatch.setenv("SPARSESOUP_PAYLOAD", str(tmp_path / "payload-ran"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / f"own{known}"
    shutil.copytree(place / "bert", folder)
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "bert" if known else "own-bert", "auto_map": {
        "AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel",
        "AutoModelForSequenceClassification": "own.OwnModel"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    line = line_of(place, tmp_path / "runs", model=folder)
    if known:  # transformers' own class of that type is taken
        assert main(line) == 0
    else:
        refused(line, "cannot load model", "own")
    assert not (tmp_path / "payload-ran").exists()
    if not known:
        modules = (
            "import os, transformers.dynamic_module_utils as m\nm.HF_MODULES_CACHE = os.environ['HF_MODULES_CACHE']"
        )
        asked = sparsesoup(*line, "--trust-remote-code", "true", cwd=tmp_path, wrap=f"{modules}\n{MAIN}")
        assert (tmp_path / "payload-ran").exists(), asked.stderr


def test_weights_of_another_shape_or_name_are_no_checkpoint_of_this_encoder(place, refused, tmp_path):
    """transformers would draw the encoder at random and say so in a log that nobody sees."""
    for name, edit in (("narrow", {"intermediate_size": 24}), ("other", {"num_hidden_layers": 3})):
        shutil.copytree(place / "bert", tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | edit))
        refused(line_of(place, tmp_path / "runs", model=tmp_path / name), "model", str(tmp_path / name), "encoder")
    assert weights_of(place / "bert")["encoder.layer.0.intermediate.dense.weight"].shape == (32, 16)


def test_folders_that_cannot_be_made_are_named_before_anything_is_trained(place, refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    line = line_of(place, tmp_path / "runs", "imp")
    for cache in (file, file / "below", "/proc/nothing"):
        refused([*line, "--cache-dir", cache], "cannot make the folder", str(cache))
    refused(line_of(place, "/proc/nothing"), "cannot make the folder /proc/nothing")
    assert file.read_text() == "mine"


def test_labels_that_are_lists_are_refused(place, refused, tmp_path):
    data = write_rows(tmp_path / "data" / "train.jsonl", ["text", "label"], [["good film", [0, 1]]] * 9)
    refused(line_of(place, tmp_path / "runs", dataset=data.parent), "the label column label holds a list a row")


def test_groups_of_settings_are_told_by_their_fields(place, refused, tmp_path):
    line = line_of(place, tmp_path / "runs", "movement")
    refused(
        [*line, "--train.distill", "teacher=dense"],
        "expected a table of teacher,",
        "did you mean --train.distill.teacher",
    )
    refused(
        [*line, "--method.pattern", "4x4"],
        "a table of rows, cols, got '4x4'; did you mean --method.pattern.rows?",
    )
    refused([*line, "--config"], "--config: expected one argument")
    refused(["prune", "movement", "--config", "--out", tmp_path / "runs"], "--config: expected one argument")
    refused(["methods", "isp", "imp"], "unrecognized arguments: imp")


@pytest.mark.parametrize("name", ["config", "save_every"])
def test_flags_that_are_no_settings_are_refused_in_a_recipe_and_from_python(name, refused, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"{name}: 5\n")
    refused(
        ["prune", "imp", "--config", tmp_path / "recipe.yaml", "--out", tmp_path / "runs"],
        f"--{name.replace('_', '-')}: this is no setting of a run",
    )
    if name == "config":  # `save_every` is an argument in Python
        with pytest.raises(UserError, match=f"{name}: this is no setting of a run"):
            prune("magnitude", out=tmp_path / "runs", **{name: 5})
