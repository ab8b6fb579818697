"""Distillation the whole way: where a teacher comes from, what it costs and to whom, and what is refused."""

import json
import os

import pytest
import yaml

import sparsesoup as library
from conftest import same
from processes import start_command, wait_until
from sparsesoup.cli.main import main
from sparsesoup.cli.prune import parse_arguments
from sparsesoup.runs.config import dump_config
from tiny_hub import (
    classifier,
    listing,
    log_of,
    masks_of,
    weights_of,
)  # fmt: skip

pytestmark = pytest.mark.integration

DENSE = ["--train.distill.teacher", "dense"]
OWN = {
    "magnitude": [],
    "isp": ["--method.stages", "2", "--method.weak-masks", "2", "--method.look-ahead", "0.05"],
    "movement": ["--method.every-steps", "2"],
    "imp": ["--method.cut", "0.5"],
}


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def with_teacher(place, tmp_path_factory):
    """A folder with a dense run."""
    out = tmp_path_factory.mktemp("taught")
    assert main(line(place, out, "dense")) == 0
    return out


def line(place, out, method, *more, data="reviews", steps=20):
    return ["prune", method, "--model", str(place / "bert"), "--dataset", str(place / data), "--steps", str(steps),
            "--train.batch-size", "8", "--train.learning-rate", "0.003", *OWN.get(method, []), *map(str, more),
            "--out", str(out)]  # fmt: skip


def drawn(place, out, method, *more, **settings):
    """The one run of that method in a folder, and its report."""
    assert main(line(place, out, method, *more, **settings)) == 0
    (path,) = out.glob(f"*/{method}-*/seed-*")
    return path, json.loads((path / "report.json").read_text())


def dense_of(out):
    (path,) = out.glob("*/dense-*/seed-*")
    return path, json.loads((path / "report.json").read_text())


def count(cost):
    return {key: value for key, value in cost.items() if key != "seconds"}


def test_one_dense_run_teaches_every_method_and_is_charged_to_each(place, tmp_path, capsys):
    out = tmp_path / "runs"
    reports, before = {}, None
    for method in OWN:
        harder = ["--train.distill.alpha", "1"] if method == "imp" else []  # no matter to the teacher
        reports[method] = drawn(place, out, method, *DENSE, *harder)
        path, dense = dense_of(out)
        before = before or listing(path)
        assert listing(path) == before
    assert dense["cost"].keys() == {"main", "validation"}
    for _, report in reports.values():
        assert count(report["cost"]["teacher"]) == count(dense["cost"]["main"])
        assert report["cost"]["teacher"]["steps"] == 20
        assert report["sparsity"]["reached"] == pytest.approx(0.9, abs=1e-3)
    plain, other = drawn(place, tmp_path / "plain", "isp")
    run, report = reports["isp"]
    assert plain.parent.name != run.parent.name
    assert not same(weights_of(plain / "model"), weights_of(run / "model"))
    for label in ("main", "weak"):  # the teacher's forward pass is a third of a step of a student of its size
        assert report["cost"][label]["steps"] == other["cost"][label]["steps"]
        assert 1.25 < report["cost"][label]["flops"] / other["cost"][label]["flops"] < 1.4


def test_a_teacher_that_is_there_costs_nothing_and_is_the_same_by_any_name(place, with_teacher, tmp_path, monkeypatch):
    dense, _ = dense_of(with_teacher)
    by_dense = drawn(place, with_teacher, "magnitude", *DENSE)[0]
    runs = {}
    monkeypatch.chdir(place)
    for number, teacher in enumerate((dense, dense / "model", os.path.relpath(dense, place))):
        path, report = drawn(place, tmp_path / str(number), "magnitude", "--train.distill.teacher", teacher)
        assert "teacher" not in report["cost"]
        assert same(weights_of(path / "model"), weights_of(by_dense / "model"))
        runs[path.parent.name] = path
    assert len(runs) == 3  # the teacher's name is a setting like any other


@pytest.mark.parametrize("after", [5, 30])
def test_a_run_killed_while_its_teacher_learns_or_after_is_charged_once(place, tmp_path, after):
    reference, report = drawn(place, tmp_path / "whole", "magnitude", *DENSE)
    out = tmp_path / "killed" / "runs"
    command = [*line(place, out, "magnitude", *DENSE), "--save-every", "0"]
    process, errors = start_command(command, out.parent)
    wait_until(process, lambda: sum(p.read_bytes().count(b"\n") for p in out.glob("*/*/seed-*/log.jsonl")) >= after)
    process.kill()
    process.join(100)
    assert process.exitcode == -9, errors.read_text()
    assert len([*out.glob("*/dense-*/seed-0/report.json")]) == (after > 20)
    assert main(command) == 0
    (path,) = out.glob("*/magnitude-*/seed-*")
    own = json.loads((path / "report.json").read_text())
    assert {k: count(v) for k, v in own["cost"].items()} == {k: count(v) for k, v in report["cost"].items()}
    assert own["validation"] == report["validation"]
    assert same(weights_of(path / "model"), weights_of(reference / "model"))
    assert len(log_of(path)) == 20


def test_questions_are_distilled_too(place, tmp_path):
    out = tmp_path / "runs"
    _, report = drawn(place, out, "movement", *DENSE, "--train.distill.hidden", "1", data="questions")
    _, dense = dense_of(out)
    assert count(report["cost"]["teacher"]) == count(dense["cost"]["main"])
    assert report["validation"].keys() == {"f1", "exact_match"}


def test_a_recipe_names_the_teacher_and_run_yaml_repeats_it(place, tmp_path):
    (tmp_path / "recipe.yaml").write_text("method: magnitude\ntrain: {distill: {teacher: dense, alpha: 1}}\n")
    settings = parse_arguments(["--config", "recipe.yaml", "--train.distill.temperature", "4"])[0]
    distill = settings.train.distill
    assert (distill.teacher, distill.alpha, distill.temperature, distill.hidden) == ("dense", 1.0, 4.0, 0.0)
    assert settings.repeat_command() == (
        "sparsesoup prune magnitude --train.distill.teacher dense --train.distill.alpha 1.0 "
        "--train.distill.temperature 4.0"
    )
    assert parse_arguments(settings.repeat_command().split()[2:])[0] == settings
    (tmp_path / "run.yaml").write_text(dump_config(settings))
    assert parse_arguments(["--config", "run.yaml"])[0].to_dict() == settings.to_dict()
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["train"]["distill"]["teacher"] == "dense"
    assert parse_arguments(["--config", "run.yaml", "--train.distill.alpha", "0.9"])[0].train.distill.alpha == 0.9
    by_python = library.prune(
        "magnitude", model=str(place / "bert"), dataset=str(place / "reviews"), steps=4, out=tmp_path / "runs",
        train={"batch_size": 8, "distill": {"teacher": "dense"}}, progress=False,
    )  # fmt: skip
    assert main(["prune", "--config", str(by_python.path / "run.yaml"), "--out", str(tmp_path / "again")]) == 0
    (again,) = (tmp_path / "again").glob(f"*/{by_python.path.parent.name}/seed-0")
    assert same(masks_of(again), masks_of(by_python.path))


def test_a_distilled_run_is_scored_and_shown_without_its_teacher(place, tmp_path, capsys):
    out = tmp_path / "runs"
    run, _ = drawn(place, out, "magnitude", *DENSE)
    path, _ = dense_of(out)
    path.parent.rename(tmp_path / "gone")
    capsys.readouterr()
    assert main(["test", str(run)]) == 0
    assert capsys.readouterr().out.startswith("test: accuracy 0.")
    assert main(["show", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "teacher" in shown
    assert [*out.glob("*/dense-*")] == []
    # A dense run, a student's T steps and the teacher's forward pass in each.
    assert "training cost 2.3" in shown.replace("\n", " ")
    page = (run / "report.html").read_text()
    assert "50.0 % of the loss" in page
    assert 'class="teacher"' in page


@pytest.fixture
def refused(place, tmp_path, capsys):
    """Runs a command that must be refused before its first step; what it says."""

    def check(method, *more, out=None, **settings):
        capsys.readouterr()
        out = tmp_path / "refused" if out is None else out
        before = listing(out) if out.exists() else None
        assert main(line(place, out, method, *more, **settings)) == 2
        first = ("note: ", "data: ", "model: ", "run: ")
        (said,) = [s for s in capsys.readouterr().err.splitlines() if not s.startswith(first)]
        assert said.startswith("sparsesoup: ")
        assert (listing(out) if out.exists() else None) == before
        return said

    return check


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--train.distill.teacher", "./nowhere"], ["train.distill.teacher: no model at ./nowhere"]),
        (["--train.distill.teacher", "dence"], ["train.distill.teacher: cannot load model 'dence'"]),
        ([*DENSE, "--train.distill.alpha", "1.5"], ["--train.distill.alpha: a share is in [0, 1], got 1.5"]),
        ([*DENSE, "--train.distill.hardnes", "1"], ["--train.distill.hardnes: unknown setting (train.distill has "]),
        ([*DENSE, "--train.distill.temperature", "0"], ["--train.distill.temperature: must be above 0"]),
        (["--train.distill.alpha", "1"], ["--train.distill.teacher: ", "no teacher; set it to dense"]),
    ],
)
def test_bad_settings_end_in_one_line(refused, flags, parts):
    said = refused("magnitude", *flags)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("changes", "flags", "part"),
    [
        ({"labels": ("a", "b", "c")}, [], "is not fine-tuned for this task (classifier"),
        ({"vocabulary": {"film": "movie"}}, [], "reads other tokens than"),
        ({"family": "distilbert"}, [], "takes no token_type_ids"),
        ({"max_position_embeddings": 8}, [], "has 8 positions, the longest row"),
        ({"num_hidden_layers": 3}, ["--train.distill.hidden", "1"], "it has 3 blocks of width 16"),
        ({"hidden_size": 32}, ["--train.distill.hidden", "1"], "it has 2 blocks of width 32"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_the_first_step(refused, tmp_path, changes, flags, part):
    teacher = classifier(tmp_path / "teacher", **changes)
    said = refused("magnitude", "--train.distill.teacher", teacher, *flags)
    assert part in said
    assert said.startswith("sparsesoup: --train.distill.teacher: ")


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"hidden_size": 32}, {"labels": ("LABEL_0", "LABEL_1")}])
def test_a_teacher_of_another_size_may_teach_its_answers(place, tmp_path, changes):
    teacher = classifier(tmp_path / "teacher", **changes)
    _, report = drawn(place, tmp_path / "runs", "magnitude", "--train.distill.teacher", teacher, steps=4)
    assert report["cost"].keys() == {"main", "validation"}


def test_a_base_model_is_no_teacher(place, refused):
    assert "is not fine-tuned for this task" in refused("magnitude", "--train.distill.teacher", place / "bert")


def test_a_schedule_that_cannot_work_is_refused_before_the_teacher_is_trained(refused):
    assert "20 steps are too few" in refused("isp-paper", *DENSE)
    assert "3 steps are too few" in refused("movement", *DENSE, steps=3)


def test_a_teacher_whose_own_run_fails_is_named(place, tmp_path, refused):
    said = refused("magnitude", *DENSE, "--train.learning-rate", "1e30", "--train.max-grad-norm", "0")
    assert "the teacher's own run: the loss is nan at step" in said


def test_a_dense_run_may_be_its_own_teachers_student(place, tmp_path):
    out = tmp_path / "runs"
    assert main(line(place, out, "dense", *DENSE)) == 0
    reports = [json.loads(p.read_text()) for p in out.glob("*/dense-*/seed-0/report.json")]
    assert sorted(report["cost"].get("teacher", {"steps": 0})["steps"] for report in reports) == [0, 20]


def test_a_progressive_student_costs_and_ends_the_same_by_either_way_to_its_teacher(place, tmp_path):
    """Without a teacher it fine-tunes one first; the dense run is that training, charged under the same label."""
    name = "sparse-progressive-distillation"
    own, given = (drawn(place, tmp_path / out, name, *more)[1] for out, more in (("own", []), ("given", DENSE)))
    assert own["validation"] == given["validation"]
    for label in ("teacher", "main"):
        assert count(own["cost"][label]) == count(given["cost"][label])
    weights = [weights_of(next((tmp_path / out).glob(f"*/{name}-*/seed-*")) / "model") for out in ("own", "given")]
    assert same(*weights)
