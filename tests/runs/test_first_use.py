"""What new users of the command line run into: names from other tools, another order, small or foreign files."""

import re

import pytest

from sparsesoup import compare, prune
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from tiny_hub import sentences, write_rows


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """Runs a command that must be refused, in an empty folder; the line that it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        assert main([str(word) for word in words]) == 2
        out, (*_, said) = (text.splitlines() for text in capsys.readouterr())
        assert (out, said[:12]) == ([], "sparsesoup: ")
        return said.removeprefix("sparsesoup: ")

    return run


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lr", "--train.learning-rate"),
        ("--train.lr", "--train.learning-rate"),
        ("--learning-rate", "--train.learning-rate"),
        ("--batch-size", "--train.batch-size"),
        ("--train.bs", "--train.batch-size"),
        ("--train.per-device-train-batch-size", "--train.batch-size"),
        ("--train.epochs", "--epochs"),
        ("--num-train-epochs", "--epochs"),
        ("--train.max-steps", "--steps"),
        ("--train.seed", "--seed"),
        ("--train.warmup-steps", "--train.warmup-ratio"),
        ("--train.bf16", "--train.precision"),
        ("--max-seq-length", "--max-length"),
        ("--output-dir", "--out"),
        ("--temperature", "--train.distill.temperature"),
    ],
)
def test_a_flag_of_another_group_or_tool_names_the_one_meant(refused, flag, meant):
    assert refused("prune", "magnitude", flag, "8") == f"{flag}: unknown setting; did you mean {meant}?"


def test_a_learning_rate_schedule_says_that_there_is_one(refused):
    said = refused("prune", "magnitude", "--train.lr-scheduler-type", "cosine")
    assert "the learning rate warms up and decays linearly" in said


def test_a_name_from_elsewhere_is_answered_in_python_and_in_recipes_too(refused, tmp_path):
    with pytest.raises(UserError, match=r"^train\.epochs: unknown setting; did you mean epochs\?$"):
        prune("magnitude", train={"epochs": 3})
    (tmp_path / "run.yaml").write_text("method: magnitude\ntrain:\n  lr: 1e-3\n")
    said = refused("prune", "--config", "run.yaml")
    assert said == "run.yaml, line 3: train.lr: unknown setting; did you mean train.learning_rate?"
    (tmp_path / "study.yaml").write_text("methods: [magnitude]\nlr: 1e-3\n")
    said = refused("compare", "--config", "study.yaml")
    assert said.startswith("study.yaml, line 2: lr: unknown setting (allowed: models, datasets, sparsities, seeds, ")
    assert said.endswith("); did you mean train.learning_rate?")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"method": ["isp"]}, r"^method: unknown setting \(allowed: models, .*methods, .*\); did you mean methods or "),
        (
            {"methods": ["isp"], "sparsity": 0.5},
            r"^sparsity: unknown setting \(allowed: .*\); did you mean sparsities\?$",
        ),
        (
            {"methods": {"isp": {"stages": 3}}},
            r"^methods\.isp\.stages: unknown setting \(allowed: name, method, ",
        ),
        (
            {"methods": {"isp": {"train": {"lr": 1}}}},
            r"train\.lr: unknown setting; did you mean train\.learning_rate\?$",
        ),
    ],
)
def test_a_wrong_key_of_a_study_in_python_is_named_with_those_allowed(recipe, said):
    with pytest.raises(UserError, match=said):
        compare(recipe)


def test_the_help_of_compare_says_what_each_flag_is_and_that_it_changes_a_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "in place of what the recipe of --config has:" in told
    assert "one or more datasets" in told


def test_early_stopping_names_the_setting_that_it_needs_as_the_user_writes_it(refused, tmp_path):
    said = refused("prune", "magnitude", "--train.early-stopping-patience", "3")
    assert said.startswith("--train.early-stopping-patience: early stopping needs")
    assert said.endswith("set --train.eval-steps too")
    with pytest.raises(UserError, match=r"^train\.early_stopping_patience: .* set train\.eval_steps too$"):
        prune("magnitude", train={"early_stopping_patience": 3})
    (tmp_path / "run.yaml").write_text("method: magnitude\ntrain: {early_stopping_patience: 3}\n")
    said = refused("prune", "--config", "run.yaml")
    assert re.fullmatch(r"run\.yaml, line 2: train\.early_stopping_patience: .* set train\.eval_steps too", said)


def test_a_method_behind_the_flags_shows_the_order(refused):
    said = refused("prune", "--dataset", "my reviews.csv", "gradual", "--steps", "4")
    line = "sparsesoup prune gradual --dataset 'my reviews.csv' --steps 4"
    assert said == f"the method gradual comes before the flags: `{line}`"
    assert "got gradual and isp" in refused("prune", "gradual", "isp")


@pytest.mark.parametrize("command", [["benchmark"], ["export", "--to", "packed", "--out", "small"]])
def test_a_path_of_nothing_says_that_runs_and_exports_are_allowed(refused, command):
    said = refused(command[0], "nothere", *command[1:])
    assert said.startswith("no run and no export at nothere: give a run directory (seed-<n>), a model folder")
    assert said.endswith("or what `sparsesoup export` wrote")


@pytest.mark.parametrize(("rows", "said"), [(1, "has 1 row, where at least 3"), (2, "has 2 rows, where at least 3")])
def test_a_file_of_too_few_rows_says_how_many_are_needed_and_for_what(place, refused, tmp_path, rows, said):
    write_rows(tmp_path / "few.csv", ("text", "label"), sentences(rows))
    line = refused("prune", "magnitude", "--model", place / "bert", "--dataset", "few.csv", "--steps", "2")
    assert f"few train {said} are needed, one each for training, validation and test" in line


def test_a_file_of_too_few_rows_beside_a_test_file_needs_two(place, refused, tmp_path):
    write_rows(tmp_path / "few" / "train.csv", ("text", "label"), sentences(1))
    write_rows(tmp_path / "few" / "test.csv", ("text", "label"), sentences(4))
    line = refused("prune", "magnitude", "--model", place / "bert", "--dataset", "few", "--steps", "2")
    assert "few train has 1 row, where at least 2 are needed, one each for training and validation" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cache-size", "3"], "--cache-size: there is no folder of shared trainings to limit; set --cache-dir too"),
        (["--workers", "2", "--dry-run"], "--workers: only methods with weak masks have a use for it, not magnitude"),
        (["--dataset-config", "x"], "--dataset-config: docstrings has one configuration"),
    ],
)
def test_a_flag_without_effect_is_refused(place, refused, words, said):
    assert refused("prune", "magnitude", "--model", place / "bert", "--steps", "2", *words).startswith(said)


def test_a_size_of_a_cache_without_a_folder_is_refused_in_python_too(place):
    with pytest.raises(UserError, match=r"^cache_size: .* set cache_dir too$"):
        prune("magnitude", model=str(place / "bert"), steps=2, cache_size=3.0)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_setting_without_effect_on_the_plan_is_said_in_a_line(place, tmp_path, capsys, dry):
    line = ["--model", place / "bert", "--dataset", place / "reviews", "--train.batch-size", "8", "--out", tmp_path]
    line = [*map(str, line), "--steps", "8", *dry]
    unused = ["--snapshots", "disk", "--train.eval-steps", "9"]
    assert main(["prune", "magnitude", *line, *unused]) == 0
    told = "".join(capsys.readouterr())
    assert "note: --snapshots disk has no effect: magnitude takes no snapshots\n" in told
    assert "note: --train.eval-steps 9 has no effect: the main training ends before step 9; lower it" in told
    rewinds = ["--method.cut", "0.5", "--method.rewind", "0.25", "--snapshots", "disk", "--train.eval-steps", "7"]
    assert main(["prune", "imp-rewind", *line, *rewinds]) == 0
    assert "has no effect" not in "".join(capsys.readouterr())


def test_a_flag_without_effect_on_any_row_of_a_study(place, refused, tmp_path, capsys):
    (tmp_path / "study.yaml").write_text("methods: [magnitude]\nseeds: 0\nsteps: 2\n")
    line = ["compare", "--config", "study.yaml", "--model", str(place / "bert"), "--dataset", str(place / "reviews")]
    assert "no row of the study has weak masks" in refused(*line, "--workers-per-run", "2")
    assert main([*line, "--snapshots", "disk", "--dry-run"]) == 0
    assert "note: --snapshots disk has no effect: no row of the study takes snapshots" in capsys.readouterr().err


SEMICOLONS = "semi.csv: the first line has one column (text;label), whose names seem to be separated by ';'; fields of"
TABLES = {  # name -> content, part of what is said
    "semi.csv": (
        b"text;label\ngood;1\nbad;0\n",
        f"{SEMICOLONS} a .csv file are separated by commas; write the table so",
    ),
    "tabs.csv": (b"text\tlabel\ngood\t1\nbad\t0\n", "separated by commas; name it .tsv"),
    "commas.tsv": (b"text,label\ngood,1\nbad,0\n", "separated by commas; fields of a .tsv file are separated by tabs"),
    "latin.csv": ("text,label\ncafé,1\n".encode("latin-1"), "no text in UTF-8, which is needed"),
    "utf16.csv": ("text,label\ngood,1\n".encode("utf-16"), "save it in UTF-8"),
    "blank.csv": (b"\n\n\n", "nothing but blank lines"),
    "headless.csv": (b"good film,1\nbad film,0\n", "(the first line of a file is read as the names of its columns)"),
    "signs.csv": (b"text,label\n" + b"good,1\nbad,-1\n" * 4, "-1 means no label; if it is a class, number the classes"),
    "decimal.csv": (b"text,score\n" + b'good,"0,9"\nbad,"0,1"\n' * 4, "has numbers with a comma, such as '0,9'"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_another_form_says_what_is_read_and_how_to_write_it(place, refused, tmp_path, name):
    (tmp_path / name).write_bytes(TABLES[name][0])
    said = refused("prune", "magnitude", "--model", place / "bert", "--dataset", name, "--steps", "2")
    assert TABLES[name][1] in said
    assert "\n" not in said
