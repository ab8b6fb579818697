"""A study: refused before anything runs, the same by any executor, whatever dies; the test split opened last."""

import json
import os
import random
import shlex
import signal
import time
from pathlib import Path

import pandas
import pytest
import torch

from processes import children, command_of
from sparsesoup.cli.compare import recipe_changes, study_parser
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.core.files import file_lock
from sparsesoup.core.threads import MOST_THREADS
from sparsesoup.core.ticket import save_masks
from sparsesoup.report.terminal import read_report
from sparsesoup.runs import run, run_folder
from sparsesoup.study.execute import jobs as work
from sparsesoup.study.recipe.plan import read_plan
from sparsesoup.study.results.from_runs import records_of
from sparsesoup.training.config import DistillConfig
from tiny_hub import (
    checkpoint,
    classifier,
    listing,
    older,
    reviews,
    run_of,
    weights_equal,
    without_seconds,
)
from tiny_images import photos
from tiny_studies import RECIPE, begun, forked, study, write_recipe

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("inside")]

TAUGHT = {"name": "magnitude", "train": {"distill": {"teacher": "./nothing"}}}
RUNS = 2 + 3 * 2 * 2


def write(name="small", **changes):
    return write_recipe(RECIPE | changes, name)


def test_every_cell_is_drawn_and_tested_once_and_the_table_has_them_all(undisturbed):
    found = json.loads((undisturbed / "studies" / "small" / "study.json").read_text())
    assert len(found["runs"]) == RUNS
    assert all(cell["test"] for cell in found["runs"])
    assert len({(c["row"], c["target"], c["seed"]) for c in found["runs"]}) == RUNS
    folder = undisturbed / "studies" / "small"
    csv, parquet = pandas.read_csv(folder / "study.csv"), pandas.read_parquet(folder / "study.parquet")
    assert len(csv) == len(parquet) == RUNS
    assert csv["test accuracy"].tolist() == parquet["test accuracy"].tolist()
    for cell in found["runs"]:
        total = cell["sparsity"]["total"]
        assert cell["sparsity"]["kept"] == (total if cell["target"] is None else round((1 - cell["target"]) * total))
        report = json.loads((undisturbed / cell["run"] / "report.json").read_text())
        assert report["test"] == cell["test"]
    page = (folder / "study.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    assert not (folder / "cache").exists()
    assert sum(sum(c["shared"] for c in cell["cost"].values()) for cell in found["runs"]) > 0


def test_a_run_of_the_study_is_that_of_the_command_it_names(undisturbed, tmp_path):
    found = json.loads((undisturbed / "studies" / "small" / "study.json").read_text())
    cell = next(c for c in found["runs"] if c["row"] == "isp" and c["target"] == 0.8 and c["seed"] == 1)
    assert main([*cell["command"].split()[1:], "--out", "alone"]) == 0
    assert (tmp_path / "alone" / cell["run"]).is_dir()
    assert weights_equal(tmp_path / "alone" / cell["run"], undisturbed / cell["run"])


def test_two_processes_give_the_same_bits_as_one(undisturbed, tmp_path):
    elsewhere = ["--snapshots", "disk", "--cache-size", "0"]  # change nothing either
    assert main(["compare", "--config", write(seeds=[1]), "--workers", "2", "--threads", "1", *elsewhere]) == 0
    mine, theirs = without_seconds(study()), without_seconds(study(out=undisturbed))
    assert mine["runs"] == [found for found in theirs["runs"] if found["seed"] == 1]
    assert mine["failed"] == []
    for found in mine["runs"]:
        assert weights_equal(tmp_path / "runs" / found["run"], undisturbed / found["run"])


WORKING = ("sparsesoup", "forkserver", "ray::TrialActor.run_job")  # in the command line of a process that does jobs


def at_work(process, ray):
    """Whether it trains or tests by now: a kill while it still starts shows little."""
    said = Path("said.txt").read_text()
    begun = "training" in said or "testing" in said
    return begun and (not ray or any("ray::TrialActor.run_job" in command_of(pid) for pid in children(process.pid)))


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        (["--workers", "1"], 4),
        (["--workers", "2"], 4),
        pytest.param(["--workers", "1"], 20, marks=pytest.mark.slow),
        pytest.param(["--workers", "2"], 20, marks=pytest.mark.slow),
        pytest.param(["--executor", "ray", "--workers", "2"], 6, marks=pytest.mark.slow),  # test_cluster.py kills each
    ],
)
def test_whatever_is_killed_the_table_is_that_of_an_undisturbed_study(undisturbed, flags, most):
    """So many kills at random moments: of the first process, and every other time of a worker where there are some."""
    if "ray" in flags:
        pytest.importorskip("ray")
    write()
    alone = flags == ["--workers", "1"]
    start, longest = (forked, 0.7) if alone else (begun, 2.0)  # a new interpreter begins with seconds of imports
    draw, kills = random.Random(most), 0
    process = start(*flags)
    while process.poll() is None and kills < most:
        while process.poll() is None and not at_work(process, "ray" in flags):
            time.sleep(0.05)
        time.sleep(draw.uniform(0.0, longest))
        below = [pid for pid in children(process.pid) if any(word in command_of(pid) for word in WORKING)]
        victim = draw.choice(below) if below and kills % 2 else process.pid
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
        kills += 1
        if victim == process.pid:
            process.wait(60)
            process = start(*flags)
    for _ in range(3):  # a run whose process was killed three times has failed, as it should
        if process.wait(300) == 0 and not study()["failed"]:
            break
        process = start(*flags, "--retry-failed")
    assert kills > 3
    found = study()
    assert found["failed"] == []
    assert without_seconds(found) == without_seconds(study(out=undisturbed))


def test_a_cell_that_fails_says_why_and_stops_no_other(capsys):
    wild = {"name": "magnitude", "train": {"learning_rate": 1e30, "max_grad_norm": 0.0}}
    write(methods={"magnitude": None, "wild": wild}, sparsities=0.5)
    assert main(["compare", "--config", "small.yaml", "--workers", "2"]) == 1
    err = capsys.readouterr().err
    assert err.count("failed: wild on reviews") == 2
    assert "the loss is nan at step" in err
    found = study()
    assert [cell["row"] for cell in found["runs"]] == ["magnitude", "magnitude"]
    assert len(found["failed"]) == 2
    assert "2 runs failed" in Path("runs/studies/small/study.html").read_text()
    assert "| wild | failed | failed |" in Path("runs/studies/small/study.md").read_text()
    assert main(["compare", "--config", "small.yaml"]) == 1
    err = capsys.readouterr().err
    assert "wild" not in err  # not tried again unless asked to
    assert "2 of 4 runs failed; the page says why, and --retry-failed" in err
    assert main(["compare", "--config", "small.yaml", "--retry-failed"]) == 1
    assert capsys.readouterr().err.count("failed: wild") == 2
    write(methods={"magnitude": None, "isp-no-soup": None}, sparsities=0.5)  # a recipe that was wrong is corrected
    assert main(["compare", "--config", "small.yaml"]) == 0
    err = capsys.readouterr().err
    assert err.count(": training ") == 2
    assert "failed" not in err


def test_the_test_split_of_a_cell_is_opened_once_its_run_is_written_and_its_masks_are_final(monkeypatch):
    opened = []

    def look(path, console, **more):
        report = read_report(path)
        assert report["test"] is None
        assert not list((path / "stages").glob("*.safetensors"))
        before = (path / "model" / "pruning" / "masks.safetensors").read_bytes()
        found = score(path, console, **more)
        assert (path / "model" / "pruning" / "masks.safetensors").read_bytes() == before
        opened.append(str(path))
        return found

    score = work.score_finished_run
    monkeypatch.setattr(work, "score_finished_run", look)
    write(methods=["random", "magnitude"], sparsities=0.5)
    assert main(["compare", "--config", "small.yaml"]) == 0
    assert len({*opened}) == len(opened) == 4


def test_a_cell_whose_test_rows_cannot_be_scored_keeps_what_it_was_trained_to(monkeypatch, capsys):
    def refuse(path, console, **more):
        raise UserError("these rows have no labels")

    write(methods=["random"], sparsities=0.5, seeds=0)
    with monkeypatch.context() as patch:
        patch.setattr(work, "score_finished_run", refuse)
        assert main(["compare", "--config", "small.yaml"]) == 1
    assert "these rows have no labels" in capsys.readouterr().err
    (cell,) = study()["runs"]
    assert cell["test"] is None
    assert cell["validation"]["accuracy"] >= 0
    trained = Path("runs", cell["run"], "model", "model.safetensors").stat().st_mtime_ns
    assert main(["compare", "--config", "small.yaml", "--retry-failed"]) == 0
    (cell,) = study()["runs"]
    assert cell["test"]["accuracy"] >= 0
    assert Path("runs", cell["run"], "model", "model.safetensors").stat().st_mtime_ns == trained


def test_a_cell_has_its_page_drawn_once_and_a_teacher_has_one_too(monkeypatch, tmp_path):
    drawn = []

    def draw(path):
        drawn.append(path)
        return page(path)

    page = run.write_report
    for module in (run, run_folder):  # a teacher's is written with its run, a trial's with its test scores
        monkeypatch.setattr(module, "write_report", draw)
    with_teacher = {"row": {"name": "magnitude", "train": {"distill": {"teacher": "dense"}}}}
    write(methods=with_teacher, sparsities=0.5, seeds=[0, 1])
    assert main(["compare", "--config", "small.yaml"]) == 0
    runs = [path.parent for path in tmp_path.rglob("report.json")]
    assert len(runs) == 4  # two cells, and the dense teacher of each
    assert sorted(drawn) == sorted(Path(os.path.relpath(path, tmp_path)) for path in runs)
    assert all((path / "report.html").stat().st_size > 10_000 for path in runs)


def test_a_study_may_grow_but_not_become_another(capsys):
    write(methods=["magnitude"], sparsities=0.5, seeds=0)
    assert main(["compare", "--config", "small.yaml"]) == 0
    before = Path("runs/studies/small/study.csv").read_text()
    write(methods=["magnitude"], sparsities=[0.5, 0.7], seeds=[0, 1])
    assert main(["compare", "--config", "small.yaml"]) == 0
    assert capsys.readouterr().err.count(": training ") == 1 + 3
    write(methods=["random"], sparsities=0.5, seeds=0)
    assert main(["compare", "--config", "small.yaml"]) == 2
    assert "holds another study (4 of its runs are not in this recipe); give another --name" in capsys.readouterr().err
    assert Path("runs/studies/small/study.csv").read_text() != before
    assert main(["compare", "--config", "small.yaml", "--name", "other"]) == 0


@pytest.mark.parametrize("of_old", [False, True], ids=["now", "records of old"])
def test_a_study_does_not_go_on_with_other_data(of_old, tmp_path, capsys):
    for root, rows in (("first", 60), ("second", 64)):
        reviews(tmp_path / root / "mine", rows)
    write(datasets="mine", methods=["magnitude"], sparsities=0.5, seeds=0)
    assert main(["compare", "--config", "small.yaml", "--data-root", "first"]) == 0
    (record,) = Path("runs/studies/small/runs").glob("*.json")
    if of_old:
        older(record, "dataset_fingerprint")
    before = listing(Path("runs"))
    for seeds in ("0", "1"), ("0",):
        capsys.readouterr()
        assert main(["compare", "--config", "small.yaml", "--data-root", "second", "--seeds", *seeds]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "dataset mine is not the one that runs/mine/magnitude-" in line
        assert listing(Path("runs")) == before
    assert main(["compare", "--config", "small.yaml", "--data-root", "first", "--seeds", "0", "1"]) == 0
    assert capsys.readouterr().err.count(": training ") == 1


def test_a_cell_does_not_take_the_run_of_other_data(tmp_path, capsys):
    for root, rows in (("first", 60), ("second", 64)):
        reviews(tmp_path / root / "mine", rows)
    write(datasets="mine", methods=["magnitude"], sparsities=0.5, seeds=0)
    assert main(["compare", "--config", "small.yaml", "--data-root", "first"]) == 0
    capsys.readouterr()
    assert main(["compare", "--config", "small.yaml", "--data-root", "second", "--name", "other"]) == 2
    assert "dataset mine is not the one that runs/mine/magnitude-" in capsys.readouterr().err


def test_two_processes_on_one_study_are_told_apart(capsys, tmp_path):
    write(methods=["magnitude"], seeds=0, sparsities=0.5)
    with file_lock(tmp_path / "runs" / "studies" / "small" / ".lock", wait=False):
        assert main(["compare", "--config", "small.yaml"]) == 2
    assert "another process works on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "line", "said"),
    [
        (
            {"methods": {"dense": None, "magnitud": None}},
            "magnitud:",
            "unknown method 'magnitud'; did you mean magnitude",
        ),
        (
            {"methods": {"gradual": {"method": {"stopp": 0.5}}}},
            "stopp:",
            "method.stopp: unknown setting (method has start, ",
        ),
        ({"methods": {"gradual": {"metod": {}}}}, "metod:", "metod: unknown setting (allowed: name, method, "),
        ({"methods": {"imp": {"method": {"cut": 2}}}}, "cut:", "method.cut: must be in (0, 1), got 2"),
        ({"sparsities": [0.5, 90]}, "sparsities:", "sparsity: the share of weights removed is in [0, 1), got 90"),
        ({"sparsities": []}, "sparsities:", "sparsities needs one or several different values"),
        ({"seeds": [1, 1]}, "seeds:", "seeds needs one or several different values"),
        ({"seeds": ["one"]}, "seeds:", "a seed is a whole number"),
        ({"seeds": [10**20]}, "seeds:", "a seed is a whole number of at most 64 bits, got 1000"),  # no column holds it
        ({"methods": {"magnitude": {"seeds": []}}}, "seeds: []", "seeds needs one or several different values"),
        ({"datasets": {"reviews": {"sparsities": []}}}, "sparsities: []", "sparsities needs one or several"),
        ({"datasets": {}}, "datasets:", "datasets needs one or several different values, got []"),
        (
            {"models": [None]},
            "models:",
            "models needs one or several different values, got [None]; name some, or leave",
        ),
        ({"methods": {"random": {"seeds": None}}}, "seeds:", "seeds needs one or several different values, got None"),
        ({"methods": [None, "random"]}, "methods:", "methods needs one or several different values, got [None, 'ran"),
        ({"datasets": ["reviews", "nowhere/at-all"]}, "datasets:", "nowhere/at-all"),
        (
            {"datasets": {"reviews": {"sparsity": 0.5}}},
            "sparsity:",
            "sparsity: unknown setting (allowed: train, steps, ",
        ),
        ({"models": "./nothing"}, "models:", "no model at ./nothing"),
        ({"models": "nobody/at-all"}, "models:", "nobody/at-all"),
        (
            {"train": {"batch_size": 0}},
            "batch_size:",
            "train.batch_size: must be at least 1, got 0",
        ),
        ({"train": {"batch_sizes": 4}}, "batch_sizes:", "train.batch_sizes: unknown setting"),
        ({"train": "bf16"}, "train:", "train has its own settings"),
        (
            {"methods": {"dense": {"train": {"max_grad_norn": 1}}}},
            "max_grad_norn:",
            "train.max_grad_norn: unknown setting",
        ),
        (
            {"train": {"distill": {"teacher": "dense", "temprature": 4.0}}},
            "temprature:",
            "train.distill.temprature: unknown setting (train.distill has teacher, ",
        ),
        (
            {"methods": {"block-movement": {"method": {"pattern": {"rws": 2}}}}},
            "rws:",
            "method.pattern.rws: unknown setting (method.pattern has rows, cols); did you mean method.pattern.rows",
        ),
        ({"train": {"lerning-rate": 4}}, "lerning-rate:", "train.lerning_rate: unknown setting"),
        ({"train": {"batch-size": "many"}}, "batch-size:", "train.batch_size: expected a whole number, got 'many'"),
        ({"methods": {"long": {"name": "dense", "times": "two"}}}, "times:", "row long lasts 'two' times steps 20"),
        ({"methods": ["random", "random"]}, "methods:", "methods needs one or several different values"),
        (
            {"sparsities": [0.0, -0.0]},
            "magnitude:",
            "magnitude on reviews, sparsity 0, seed 0 (bert) is there twice",
        ),
        (
            {"methods": {"magnitude": None, "a": {"from": "magnitude"}, "a reviews": {"name": "random"}}},
            "a reviews:",
            "a reviews on reviews, sparsity 0.5, seed 0 (bert) is there twice; leave one out, or call",
        ),
        ({"steps": 1.5}, "steps:", "steps: expected a whole number or null, got 1.5"),
        ({"seedz": [0]}, "seedz:", "seedz: unknown setting (allowed: models, "),
        ({"methods": None}, "models:", "a study needs methods"),
        ({"methods": ["dense", "isp-paper"]}, "methods:", "isp-paper on reviews, sparsity 0.5, seed"),
        (
            {"methods": {"random": None, "eb": {"name": "early-bird", "method": {"every_epochs": 9}}}},
            "eb:",
            "eb on reviews, sparsity 0.5, seed",
        ),
        ({"train": {"distill": {"teacher": "./nothing"}}}, "teacher:", "no model at ./nothing"),
        ({"methods": {"dense": None, "taught": TAUGHT}}, "teacher:", "no model at ./nothing"),
        ({"methods": {"random": None, "ticket": {"method": {"ticket": "./nothing"}}}}, "ticket: .", "no ticket at"),
        ({"methods": {"random": None, "again": {"name": "ticket"}}}, "again:", "method ticket needs method.tic"),
        ({"max_length": 2}, "max_length:", "max_length: must be 5 to 128 for the tokenizer of bert, got 2"),
        ({"max_length": 5000}, "max_length:", "max_length: 5000 is above the 132 positions of model bert"),
        (
            {"datasets": {"reviews": {"max_length": 130}}},
            "max_length:",
            "max_length: must be 5 to 128 for the tokenizer of bert",
        ),
        (
            {"datasets": "questions", "max_length": 5},
            "max_length:",
            "max_length: must be at least 6 here, since a row has 3 tokens beside que",
        ),
        (
            {"datasets": {"questions": {"doc_stride": 200}}},
            "doc_stride:",
            "doc_stride: must be 1 to 62 with a max_length of 128, got 200",
        ),
        ({"train": {"distill": {"teacher": "bert"}}}, "teacher:", "'bert' is not fine-tuned for this task"),
        ({"label_column": "verdict"}, "label_column:", "verdict"),
        ({"datasets": {"reviews": {"text_columns": ["text", "titel"]}}}, "text_columns:", "titel"),
        ({"prompts": "a {}"}, "prompts:", "prompts and class_names are read by a CLIP"),
        ({"datasets": {"reviews": {"dataset_config": "small"}}}, "dataset_config:", "has no subfolder 'small'"),
        ({"datasets": "questions", "methods": ["dense", "isp-paper"]}, "methods:", "isp-paper on questions, sparsity"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_with_its_line_before_anything_does(changes, line, said, capsys):
    write(**changes)
    assert main(["compare", "--config", "small.yaml"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert said in error
    named = int(error.split("line ")[1].split(":")[0])
    assert Path("small.yaml").read_text().splitlines()[named - 1].strip().startswith(line)
    assert not os.path.exists("runs")


@pytest.mark.parametrize("key", ["models", "datasets", "seeds"])
def test_a_key_of_a_recipe_with_nothing_behind_it_is_refused_by_its_name(key, capsys):
    with open(write(**{key: None}), "a", encoding="utf-8") as file:
        file.write(f"{key}:\n")
    assert main(["compare", "--config", "small.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    number = len(Path("small.yaml").read_text().splitlines())
    assert f"line {number}: {key} needs one or several different values, got None; name some, or leave {key}" in line


def test_a_row_without_a_word_behind_name_is_of_the_method_that_it_is_called_by():
    write(methods={"magnitude": {"name": None}})
    assert {cell.settings.name for cell in read_plan(Path("small.yaml")).trials} == {"magnitude"}


def test_a_t_in_epochs_of_windows_is_left_to_the_cell_and_one_in_steps_is_not():
    asked = {"datasets": "questions", "methods": ["isp-paper"]}
    write(steps=None, epochs=1, **asked)  # nobody knows how many steps that is before contexts are cut
    assert read_plan(Path("small.yaml"), fit=True).trials
    with pytest.raises(UserError, match="20 steps are too few"):
        read_plan(Path(write(**asked)), fit=True)


def test_flags_go_by_the_names_that_prune_has_for_them_and_say_how_data_is_read(tmp_path):
    flags = ["--model", "distilbert", "--dataset", "reviews", "--sparsity", "0.3", "--seed", "4"]
    data = ["--text-columns", "text", "--label-column", "label"]
    options = study_parser().parse_args(["--config", write("my study"), *flags, *data])
    plan = read_plan(Path(options.config), recipe_changes(options))
    assert {cell.column_of for cell in plan.trials} == {("distilbert", "reviews", 0.3), ("distilbert", "reviews", None)}
    assert {cell.seed for cell in plan.trials} == {4}
    assert {(cell.settings.model_data.text_columns, cell.settings.model_data.label_column) for cell in plan.trials} == {
        (("text",), "label")
    }
    again = study_parser().parse_args(shlex.split(plan.command)[2:])
    assert read_plan(Path(again.config), recipe_changes(again)).trials == plan.trials


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--models", "./nothing"], "sparsesoup: --models: no model at ./nothing"),
        (["--sparsities", "9"], "sparsesoup: --sparsities: the share of weights removed is in [0, 1), got 9"),
    ],
)
def test_what_a_flag_has_wrong_is_not_blamed_on_a_line_of_the_recipe(flags, said, capsys):
    assert main(["compare", "--config", write(), *flags, "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


def test_a_model_of_texts_on_a_dataset_of_images_is_refused_before_anything_is_drawn(tmp_path, capsys):
    photos(tmp_path / "photos", 12)
    write(datasets=["reviews", "photos"])
    assert main(["compare", "--config", "small.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model bert has no head for dataset photos" in line
    assert not os.path.exists("runs")


@pytest.mark.parametrize("name", ["../elsewhere", "small/runs", "/elsewhere", ".", ".."])
def test_a_name_that_leads_into_another_folder_is_refused(name, capsys):
    write(methods=["magnitude"])
    assert main(["compare", "--config", "small.yaml", "--name", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a study is called by the name of one folder" in line
    assert not os.path.exists("runs")


def test_two_datasets_whose_runs_would_share_a_folder_are_refused_before_anything_is_drawn(place, capsys):
    Path("copy").mkdir()
    (Path("copy") / "reviews").symlink_to(place / "reviews")
    write(datasets=["reviews", "copy/reviews"])
    assert main(["compare", "--config", "small.yaml"]) == 2
    assert "datasets reviews and copy/reviews are both called reviews" in capsys.readouterr().err
    assert not os.path.exists("runs")


def test_a_row_lasts_its_times_also_where_nobody_says_how_long():
    write(steps=None, methods={"dense": None, "dense-2T": {"name": "dense", "times": 2}})
    cells = read_plan(Path("small.yaml"), {"seeds": [0]}).trials
    assert [cell.settings.budget.epochs for cell in cells] == [None, 6.0]  # None means 3


def test_a_given_ticket_that_is_sparser_than_asked_is_refused_before_anything_runs(tmp_path):
    save_masks(tmp_path / "drawn", {"w": torch.arange(8).view(2, 4) < 2}, {})
    write(methods={"random": None, "again": {"name": "ticket", "method": {"ticket": "drawn"}}}, sparsities=[0.8, 0.5])
    with pytest.raises(UserError, match=r"small.yaml, line \d+: sparsity 0.5 is below the ticket's 0.75"):
        read_plan(Path("small.yaml"))


def test_a_teacher_whose_blocks_are_others_is_refused_before_anything_runs_if_they_are_compared(tmp_path):
    classifier(tmp_path / "wide", num_hidden_layers=3)
    with_teacher = {"teacher": "wide", "hidden": 1.0}
    write(methods={"dense": None, "taught": {"name": "gradual", "train": {"distill": with_teacher}}})
    with pytest.raises(UserError, match=r"small.yaml, line \d+: it has 3 blocks of width 16"):
        read_plan(Path("small.yaml"))
    del with_teacher["hidden"]
    write(methods={"dense": None, "taught": {"name": "gradual", "train": {"distill": with_teacher}}})
    assert read_plan(Path("small.yaml")).trials


@pytest.mark.parametrize(
    ("name", "method", "model"),
    [
        ("magnitude", {"pattern": {"rows": 64, "cols": 64}}, "bert"),  # whose matrices are too small
        ("block-movement", {"pattern": {"rows": 64, "cols": 64}, "score_rate": 1.0}, "bert"),
        ("gradual", {"structure": "heads"}, "broad"),  # whose heads hold too little
    ],
)
def test_parts_are_looked_for_in_the_model_itself_before_anything_runs(tmp_path, name, method, model, capsys):
    for folder, units in ("wide", 64), ("broad", 512):
        classifier(tmp_path / folder, hidden_size=64, intermediate_size=units, num_attention_heads=4)
    rows = {"dense": None, "parts": {"name": name, "method": method}}
    write(models=["wide"], methods=rows, sparsities=0.6)
    assert len(read_plan(Path("small.yaml"), fit=True).trials) == 4
    assert main(["compare", "--config", "small.yaml", "--dry-run"]) == 0
    assert "refused" not in capsys.readouterr().out
    write(models=[model], methods=rows, sparsities=0.6)
    with pytest.raises(UserError, match=r"^small.yaml, line \d+: parts on reviews, .*(does not tile|hold)"):
        read_plan(Path("small.yaml"), fit=True)
    assert main(["compare", "--config", "small.yaml", "--dry-run"]) == 0
    assert "2 would be refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "said"),
    [("distilbert", "foreign ticket: it prunes "), ("other", "foreign ticket: .* was made from bert, whose prunable")],
)
def test_a_given_ticket_of_another_model_is_refused_before_anything_runs(tmp_path, model, said):
    checkpoint(tmp_path / "other", seed=7)
    assert main(["prune", "random", "--model", "bert", "--dataset", "reviews", "--steps", "4", "--out", "drawn"]) == 0
    row = {"name": "ticket", "method": {"ticket": str(run_of(tmp_path / "drawn"))}}
    write(methods={"again": row}, models=["bert", model], sparsities=0.9)
    with pytest.raises(UserError, match=rf"small.yaml, line \d+: {said}"):
        read_plan(Path("small.yaml"))
    assert read_plan(Path("small.yaml"), {"models": ["bert"]}).trials


def test_rows_and_datasets_may_be_called_by_numbers(place):
    Path("2024").symlink_to(place / "reviews")
    moved = {"from": {"row": "magnitude", "dataset": 2024}}
    write(datasets={2024: {"steps": 5}}, methods={"magnitude": None, 7: {"name": "random"}, 8: moved})
    for changes in ({}, {"datasets": ["2024"]}):
        cells = read_plan(Path("small.yaml"), changes | {"sparsities": [0.5]}).trials
        assert {(cell.row, cell.column_of[1], cell.settings.budget.steps) for cell in cells} == {
            ("magnitude", "2024", 5), ("7", "2024", 5), ("8", "2024", 5)
        }  # fmt: skip
    write(methods={"dense": None, 8: {"name": "magnitude"}}, budget={"row": 8})
    assert {cell.row for cell in read_plan(Path("small.yaml")).trials} == {"dense", "8"}


def test_rows_and_datasets_are_called_as_is_written_also_by_words_that_yaml_knows(place, capsys):
    Path("off").symlink_to(place / "reviews")
    head = "models: bert\nsparsities: 0.5\nseeds: &seeds [0]\nsteps: 5\n"
    rows = "methods:\n  no: {name: magnitude}\n  null: {name: random}\n  0x7: {name: random, seeds: *seeds}\n"
    Path("words.yaml").write_text(
        f"{head}datasets:\n  off: {{steps: 7}}\n{rows}  yes: {{from: no}}\nbudget: {{row: no}}\n"
    )
    with pytest.raises(UserError, match=r"^words.yaml, line 11: row yes has from, but at equal total cost"):
        read_plan(Path("words.yaml"))
    Path("words.yaml").write_text(f"{head}datasets: off\n{rows}  yes off: {{from: {{row: no, dataset: off}}}}\n")
    cells = read_plan(Path("words.yaml")).trials
    assert [(cell.row, cell.column_of[1], cell.seed) for cell in cells] == [
        ("no", "off", 0), ("null", "off", 0), ("0x7", "off", 0), ("yes off", "off", 0)
    ]  # fmt: skip
    Path("words.yaml").write_text(f"{head}datasets: off\nmethods: [random, no]\n")
    with pytest.raises(UserError, match="unknown method 'no'"):
        read_plan(Path("words.yaml"))
    Path("words.yaml").write_text(f"{head}datasets: off\nmethods:\n  null: {{name: gradual, method: {{stopp: 1}}}}\n")
    with pytest.raises(UserError, match=r"^words.yaml, line 7: method.stopp: unknown setting"):
        read_plan(Path("words.yaml"))


def test_tables_of_a_recipe_may_be_merged_with_others_that_are_merged_themselves():
    deep = "train: &deep {<<: &base {batch_size: 4, max_grad_norm: 2.0}, batch_size: 8}"
    row = f"magnitude: {{{deep}}}\n  random: {{train: {{<<: *deep, batch_size: 2}}}}"
    Path("merged.yaml").write_text(
        f"models: bert\ndatasets: reviews\nsteps: 5\nmethods:\n  {row}\ntrain: {{<<: *deep}}\n"
    )
    cells = read_plan(Path("merged.yaml"), {"seeds": [0]}).trials
    assert [(cell.row, cell.settings.train.batch_size, cell.settings.train.max_grad_norm) for cell in cells] == [
        ("magnitude", 8, 2.0), ("random", 2, 2.0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("prompts: !!int x", "'x' is no int, line 1"),
        ("models: &all [bert, *all]", "what begins in line 1 holds itself by an alias (*); leave that out"),
        ("models: " + 2000 * "[" + 2000 * "]", "lists and tables are nested too deep"),
    ],
)
def test_yaml_that_says_nothing_is_refused_in_one_line(recipe, said, capsys):
    Path("odd.yaml").write_text(f"{recipe}\nmethods: [random]\n")
    assert main(["compare", "--config", "odd.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sparsesoup: cannot read recipe odd.yaml: ")
    assert said in line


def test_a_damaged_record_is_told_in_one_line_with_its_remedy(capsys):
    write(methods=["random"], sparsities=0.5, seeds=0)
    assert main(["compare", "--config", "small.yaml"]) == 0
    (record,) = Path("runs/studies/small/runs").glob("*.json")
    kept = json.loads(record.read_text())
    for path in (record, record.with_suffix(".failed.json")):
        for text in ("[1]", "3", "{", "{}", '{"row": "random"}'):
            path.write_text(text)
            capsys.readouterr()
            assert main(["compare", "--config", "small.yaml"]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"sparsesoup: damaged record: {path} ")
            assert line.endswith("; remove it, and the study does that run again")
        path.unlink()
        assert main(["compare", "--config", "small.yaml"]) == 0
        assert json.loads(record.read_text()).keys() == kept.keys()


def test_more_threads_than_torch_bears_are_refused_here_and_on_a_node(capsys):
    assert main(["compare", "--config", write(), "--threads", "100000", "--dry-run"]) == 2
    assert f"--threads is at most {MOST_THREADS} here, four a core, got 100000" in capsys.readouterr().err
    job = work.TrialJob(
        read_plan(Path("small.yaml")).trials[0], Path("runs"), Path("study"), work.TrialOptions(threads=100_000)
    )
    work.JobRunner()(job)
    assert "threads is at most" in json.loads(job.failure_path.read_text())["error"]


def test_a_sparsity_is_a_number_however_yaml_reads_it():
    write(sparsities="5e-1", methods=["random"])  # a word to YAML, which wants 5.0e-1
    assert [cell.sparsity for cell in read_plan(Path("small.yaml")).trials] == [0.5, 0.5]


def test_the_line_of_an_error_is_that_of_its_key():
    text = "models: bert\ndatasets: reviews\nmethods:\n  dense:\n  gradual:\n    method:\n      stop: 7\n"
    with open("lines.yaml", "w", encoding="utf-8") as file:
        file.write(text)
    with pytest.raises(UserError, match=r"^lines.yaml, line 7: method.stop: must be a share of T, at most 1, got 7"):
        read_plan(Path("lines.yaml"))


def test_datasets_and_rows_have_settings_of_their_own():
    write(
        datasets={"reviews": {"steps": 10, "sparsities": [0.3], "train": {"learning_rate": 0.001}}},
        methods={"short": {"name": "magnitude", "times": 0.5, "train": {"batch_size": 4}}, "random": {"seeds": [7]}},
    )
    cells = read_plan(Path("small.yaml"), {"seeds": [3]}).trials
    first, second = cells
    assert (first.row, first.settings.name, first.settings.budget.steps) == ("short", "magnitude", 5)
    assert (first.settings.train.batch_size, first.settings.train.learning_rate) == (4, 0.001)
    assert first.settings.model_data.seed == 3
    assert (second.settings.model_data.seed, second.settings.budget.steps, second.sparsity) == (7, 10, 0.3)


def test_a_row_or_a_dataset_says_how_long_in_its_own_way(capsys):
    rows = {"magnitude": None, "short": {"name": "random", "steps": 5}, "long": {"name": "random", "epochs": 2.5},
            "twice": {"name": "random", "steps": 6, "times": 2}}  # fmt: skip

    def lengths(**changes):
        write(methods=rows, sparsities=0.5, seeds=0, **changes)
        amounts = {cell.row: cell.settings.budget for cell in read_plan(Path("small.yaml")).trials}
        return {row: (amount.steps, amount.epochs) for row, amount in amounts.items()}

    own = {"short": (5, None), "long": (None, 2.5), "twice": (12, None)}
    assert lengths() == own | {"magnitude": (20, None)}
    assert lengths(steps=None, epochs=4) == own | {"magnitude": (None, 4)}
    assert lengths(datasets={"reviews": {"epochs": 1.5}}) == own | {"magnitude": (None, 1.5)}
    rows["short"]["epochs"] = None  # which says nothing
    assert lengths(steps=None, epochs=4)["short"] == (5, None)
    rows["short"]["epochs"] = 3
    write(methods=rows)
    assert main(["compare", "--config", "small.yaml"]) == 2
    assert "steps (5) and epochs (3) are mutually exclusive; give one of them" in capsys.readouterr().err


def test_a_dataset_names_columns_of_texts_where_the_recipe_names_one_of_images():
    write(image_column="pixels", datasets={"reviews": {"text_columns": "text"}}, methods=["random"])
    assert {cell.settings.model_data.text_columns for cell in read_plan(Path("small.yaml")).trials} == {("text",)}


def test_settings_of_a_teacher_stay_where_a_row_has_others_and_go_where_it_has_none(tmp_path):
    classifier(tmp_path / "taught")
    none = {"null": None, "empty": {}, "nobody": {"teacher": ""}, "null teacher": {"teacher": None}}
    own = {"warm": {"temperature": 4.0}, "other": {"teacher": "taught"}, "plain": {}} | none
    rows = {name: {"name": "magnitude", "train": {"distill": distill}} for name, distill in own.items()}
    rows["plain"] = {"name": "magnitude", "train": {"learning_rate": 0.001}}
    distill = {"teacher": "dense", "alpha": 0.7}
    write(train={"batch_size": 8, "distill": distill}, methods=rows, sparsities=0.5, seeds=0)
    found = {cell.row: cell.settings.train for cell in read_plan(Path("small.yaml")).trials}
    assert found["plain"].distill == DistillConfig(teacher="dense", alpha=0.7)
    assert found["warm"].distill == DistillConfig(teacher="dense", alpha=0.7, temperature=4.0)
    assert found["other"].distill == DistillConfig(teacher="taught", alpha=0.7)
    assert all(found[name].distill == DistillConfig() and found[name].batch_size == 8 for name in none)
    write(datasets={"reviews": {"train": {"distill": {"hidden": 1.0}}}}, train={"distill": distill}, methods=["random"])
    cells = read_plan(Path("small.yaml")).trials
    assert {cell.settings.train.distill for cell in cells} == {DistillConfig(teacher="dense", alpha=0.7, hidden=1.0)}


def test_a_table_of_runs_that_exist(undisturbed, capsys):
    runs = sorted(str(path.parent) for path in undisturbed.glob("reviews/*/seed-*/report.json"))
    assert main(["compare", *runs]) == 0
    said = capsys.readouterr().out
    assert len(runs) == RUNS
    assert len(study("runs")["runs"]) == RUNS
    rows = [line.split(" | ") for line in said.splitlines()[2:6]]
    assert said.startswith("| method | reviews at 50 % | reviews at 80 % | mean |")
    assert [row[0] for row in rows] == ["| dense", "| imp", "| isp", "| magnitude"]  # a row for all sparsities
    assert "missing" not in said
    assert "Test scores in points: accuracy. Mean" in said
    assert main(["compare", runs[0], *runs[1:3], f"{runs[1]}/../seed-0"]) == 2
    assert "are the same run, " in capsys.readouterr().err
    assert main(["compare", *runs, "--config", "small.yaml"]) == 2
    assert main(["compare", str(undisturbed)]) == 2
    assert "give the directory of a finished run" in capsys.readouterr().err
    assert main(["compare", *runs, "--steps", "3"]) == 2
    assert capsys.readouterr().err.strip() == "sparsesoup: --steps is for a recipe; with runs that exist, leave it out"


def test_runs_on_different_data_of_one_name_are_not_one_column(tmp_path, capsys):
    runs = []
    for seed, (root, rows) in enumerate((("first", 60), ("second", 64))):
        reviews(tmp_path / root / "mine", rows)
        line = ["--model", "bert", "--dataset", "mine", "--data-root", root, "--steps", "2", "--train.batch-size", "8"]
        assert main(["prune", "magnitude", *line, "--seed", str(seed), "--out", f"runs of {root}"]) == 0
        runs += map(str, Path(f"runs of {root}").glob("mine/*/seed-*"))
    capsys.readouterr()
    assert main(["compare", *runs]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{runs[0]} and {runs[1]} were trained on different data that are both called mine" in line
    assert not Path("runs").exists()
    older(Path(runs[1], "report.json"), "dataset_fingerprint")
    assert main(["compare", *runs]) == 0  # of an older version, which did not say


def test_a_ticket_stands_in_the_column_of_the_sparsity_that_it_was_drawn_at(tmp_path, undisturbed):
    def reported(name, method, asked, seed, **settings):
        run = next(undisturbed.glob("reviews/magnitude-*/seed-0"))
        facts = read_report(run)
        facts |= {"method": method, "seed": seed, "settings": facts["settings"] | settings}
        facts["sparsity"] |= {"target": asked}
        (tmp_path / name / f"seed-{seed}").mkdir(parents=True)
        (tmp_path / name / f"seed-{seed}" / "report.json").write_text(json.dumps(facts))
        return tmp_path / name / f"seed-{seed}"

    total = 4096
    runs = [reported("magnitude-a", "magnitude", 0.8, 0), reported("magnitude-b", "magnitude", 0.501, 0)]
    runs += [reported("ticket-a", "ticket", 1 - round(0.499 * total) / total, seed) for seed in (0, 1)]
    runs += [reported("magnitude-c", "magnitude", 0.8, 0, steps=7)]
    found = [(record["row"], record["target"], record["seed"]) for record in records_of(runs)]
    assert found == [("magnitude-a", 0.501, 0), ("ticket", 0.501, 0), ("ticket", 0.501, 1), ("magnitude-a", 0.8, 0),
                     ("magnitude-c", 0.8, 0)]  # fmt: skip


def test_tickets_of_the_runs_own_seeds_are_one_row(tmp_path, undisturbed):
    def reported(name, seed, ticket):
        facts = read_report(next(undisturbed.glob("reviews/magnitude-*/seed-0")))
        facts |= {"method": "ticket", "seed": seed, "settings": {"method": {"name": "ticket", "ticket": ticket}}}
        (tmp_path / name / f"seed-{seed}").mkdir(parents=True)
        (tmp_path / name / f"seed-{seed}" / "report.json").write_text(json.dumps(facts))
        return tmp_path / name / f"seed-{seed}"

    runs = [reported(f"ticket-{seed}", seed, f"runs/isp-1/seed-{seed}") for seed in (1, 2)]  # as `from: isp` draws them
    other = reported("ticket-3", 1, "runs/isp-1/seed-12")
    assert [record["row"] for record in records_of(runs)] == ["ticket", "ticket"]
    assert [record["row"] for record in records_of([*runs, other])] == ["ticket-1", "ticket-1", "ticket-3"]


def test_a_study_does_not_take_the_place_of_a_table_of_runs(undisturbed, capsys):
    run = next(undisturbed.glob("reviews/*/seed-*"))
    assert main(["compare", str(run), "--name", "small"]) == 0
    before = Path("runs/studies/small/study.json").read_text()
    assert main(["compare", "--config", write(methods=["random"], sparsities=0.5, seeds=0)]) == 2
    assert "runs/studies/small holds a table of given runs" in capsys.readouterr().err
    assert Path("runs/studies/small/study.json").read_text() == before
    assert main(["compare", str(run), "--name", "small"]) == 0  # which replaces what it made itself


def test_a_dry_run_tells_the_cells_and_draws_none(capsys):
    assert main(["compare", "--config", write(), "--dry-run"]) == 0
    assert f"{RUNS} runs" in capsys.readouterr().out
    assert not os.path.exists("runs")


@pytest.mark.parametrize(
    "more",
    [
        ["--workers", "0"],
        ["--threads", "0"],
        ["--steps", "3", "--epochs", "1"],
        ["--nope"],
        ["--snapshots", "cloud"],
        ["--cache-size", "-1"],
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_line(more, capsys):
    assert main(["compare", "--config", write(), *more]) == 2
    assert "\n" not in capsys.readouterr().err.strip()
