"""Trackers, validation during training and observers, from the command line, a recipe and Python."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sparsesoup as library
from conftest import same
from processes import kill_after
from sparsesoup.cli.main import main
from sparsesoup.core.errors import UserError
from sparsesoup.runs import trackers
from sparsesoup.runs.config import config_from_dict, read_run_config
from sparsesoup.runs.trackers import TrackerObserver
from tiny_hub import log_of, masks_of, run_of, weights_of

pytestmark = pytest.mark.integration


def words_of(place: Path, out: Path, *more: str, method: str = "gradual", steps: int = 20) -> list[str]:
    return ["prune", method, "--model", str(place / "bert"), "--dataset", str(place / "reviews"), "--sparsity", "0.7",
            "--steps", str(steps), "--train.batch-size", "8", "--train.learning-rate", "0.003", "--out", str(out),
            *more]  # fmt: skip


def events_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the curves that tensorboard reads back: tag -> (step, value)."""
    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


@pytest.fixture(scope="module")
def tracked(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of isp that is validated every four steps and reported to tensorboard."""
    out = tmp_path_factory.mktemp("tracked")
    own = ["--method.stages", "2", "--method.weak-masks", "2", "--method.look-ahead", "0.05"]
    more = ["--train.eval-steps", "4", "--report-to", "tensorboard"]
    assert main(words_of(place, out, *own, *more, method="isp")) == 0
    return run_of(out)


def test_tensorboard_has_every_step_every_validation_and_the_result(tracked: Path) -> None:
    found, log = events_of(tracked / "tensorboard"), log_of(tracked)
    report = json.loads((tracked / "report.json").read_text())
    steps, expected = [line for line in log if "loss" in line], dict[str, list[tuple[int, float]]]()
    assert {line["label"] for line in steps} == {"main", "weak"}
    for number, line in enumerate(steps, start=1):
        group = "train" if line["label"] == "main" else "weak"
        for name, key in (("loss", "loss"), ("learning_rate", "rate"), ("sparsity", "sparsity")):
            expected.setdefault(f"{group}/{name}", []).append((number, line[key]))
    for tag, values in expected.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in values], tag
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in values], abs=1e-6)
    curve = [(row["scores"]["accuracy"], row["sparsity"]) for row in report["evaluations"]]
    assert [value for _, value in found["eval/accuracy"]] == pytest.approx([score for score, _ in curve])
    assert [value for _, value in found["eval/sparsity"]] == pytest.approx([share for _, share in curve])
    assert found["final/accuracy"] == [(len(steps), pytest.approx(report["validation"]["accuracy"]))]
    assert found["final/sparsity"] == [(len(steps), pytest.approx(report["sparsity"]["reached"]))]


def test_settings_of_the_run_stand_beside_its_curves(tracked: Path) -> None:
    (settings,) = (tracked / "tensorboard").glob("*/hparams.yml")
    text = settings.read_text()
    assert "method.name: isp" in text
    assert "train.learning_rate: 0.003" in text


def test_trackers_are_no_part_of_the_run_and_change_no_bit(tracked: Path, place: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((tracked / "run.yaml").read_text())
    assert "report_to:" in recipe.read_text()
    assert read_run_config(recipe).tracking.report_to == ("tensorboard",)
    assert main(["prune", "--config", str(recipe), "--report-to", "none", "--out", str(tmp_path / "plain")]) == 0
    plain = run_of(tmp_path / "plain")
    assert plain.parent.name == tracked.parent.name  # the run's key
    assert not (plain / "tensorboard").exists()
    assert same(masks_of(plain), masks_of(tracked))
    assert same(weights_of(plain / "model"), weights_of(tracked / "model"))
    assert log_of(plain) == log_of(tracked)


def test_a_finished_run_is_read_whatever_its_trackers(tracked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tracked / "report.json").read_bytes()
    words = ["prune", "--config", str(tracked / "run.yaml"), "--report-to", "none", "--out", str(tracked.parents[2])]
    assert main(words) == 0
    assert main(["test", str(tracked)]) == 0
    assert json.loads((tracked / "report.json").read_text())["settings"] == json.loads(before)["settings"]


def test_a_resumed_run_goes_on_in_the_curves_where_it_was(place: Path, tmp_path: Path) -> None:
    words = words_of(place, tmp_path, "--report-to", "tensorboard", "--train.eval-steps", "10", "--save-every", "0.2",
                     steps=120)  # fmt: skip
    assert kill_after(words, tmp_path, after=70) != 0
    assert main(words) == 0
    found, run = events_of(run_of(tmp_path) / "tensorboard"), run_of(tmp_path)
    assert sorted({step for step, _ in found["train/loss"]}) == [*range(1, 121)]
    losses = [line["loss"] for line in log_of(run) if "loss" in line]
    last = dict(found["train/loss"])  # the second life writes the steps after the last save anew, with the same loss
    assert [last[step] for step in range(1, 121)] == pytest.approx(losses, abs=1e-6)
    evaluations = json.loads((run / "report.json").read_text())["evaluations"]
    assert [row["step"] for row in evaluations] == [*range(10, 121, 10)]
    assert [{"label": "evaluation", **row} for row in evaluations] == [x for x in log_of(run) if "scores" in x]


def test_a_missing_library_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    words = ["prune", "gradual", "--model", "nowhere", "--dataset", "nowhere", "--out", str(tmp_path / "runs")]
    assert main([*words, "--report-to", "tensorboard,wandb,mlflow"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "sparsesoup: --report-to: wandb, mlflow are not installed; pip install wandb mlflow, or leave it out\n"
    )
    assert not (tmp_path / "runs").exists()


def test_an_unknown_tracker_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"report_to: unknown tracker 'excel'; allowed: tensorboard, wandb, trackio"):
        config_from_dict("gradual", {"report_to": "tensorboard,excel"})
    assert config_from_dict("gradual", {"report_to": "tensorboard, wandb"}).tracking.report_to == (
        "tensorboard", "wandb",
    )  # fmt: skip
    assert config_from_dict("gradual", {"report_to": None}).tracking.report_to == ()


class Broken:
    """A tracker whose service is gone."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        raise ConnectionError("gone")


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path: Path) -> None:
    observer = TrackerObserver(["tensorboard"], tmp_path)
    observer.trackers["wandb"] = Broken()
    record = {"step": 1, "label": "main", "loss": 0.5, "rate": 0.1, "sparsity": 0.0}
    with pytest.warns(UserWarning, match="wandb gets no more reports .ConnectionError: gone."):
        observer.step(record)
    observer.step(record)
    observer.close()
    assert events_of(tmp_path / "tensorboard")["train/loss"] == [(1, 0.5), (2, 0.5)]


def test_a_tracker_that_cannot_start_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where a folder has to be")
    with pytest.raises(UserError, match="report_to: tensorboard cannot start"):
        TrackerObserver(["tensorboard"], tmp_path)


def test_the_page_and_the_log_have_the_curve(tracked: Path) -> None:
    report, page = json.loads((tracked / "report.json").read_text()), (tracked / "report.html").read_text()
    steps = [row["step"] for row in report["evaluations"]]
    assert steps == [4, 8, 12, 16]  # of the main steps: the weak ones are charged
    assert "Validation during training" in page
    assert "4 validations of the main training" in page
    assert "lines of log.jsonl could not be read" not in page
    assert [x for x in log_of(tracked) if "scores" in x] == [
        {"label": "evaluation", **r} for r in report["evaluations"]
    ]
    assert report["cost"]["evaluation"]["examples"] == 4 * report["validation_rows"]


def test_a_dry_run_shows_the_validations_and_where_it_may_stop(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--train.eval-steps", "6", "--train.early-stopping-patience", "2", "--dry-run"]
    assert main(words_of(place, tmp_path, *more)) == 0
    out = capsys.readouterr().out
    assert re.search(r"^train +20 +main training +validated 4 times, may stop early from step 14 on", out, re.M)
    more[-1:] = ["--method.cut", "0.5", "--dry-run"]
    assert main(words_of(place, tmp_path, *more, method="lottery-pools")) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparsesoup: --train.early-stopping-patience: this method does not end with one training")


def test_a_run_that_stops_early_says_so(place: Path, tmp_path: Path) -> None:
    train = {"batch_size": 8, "learning_rate": 0.003, "eval_steps": 2, "early_stopping_patience": 1}
    run = library.prune(
        "magnitude", model=str(place / "bert"), dataset=str(place / "reviews"), sparsity=0.7, steps=40, train=train,
        out=tmp_path, progress=False,
    )  # fmt: skip
    note = run.report["notes"]["early_stopping"]
    assert note["stopped"] == run.report["cost"]["main"]["steps"] < 40
    assert run.report["validation"]["accuracy"] == note["best"]
    sentence = f"Stopped early at step {note['stopped']} after 1 validations that were no better"
    assert sentence in (run.path / "report.html").read_text()


class Losses(library.Observer):
    """An observer as the guide has it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.scores: list[float] = []

    def step(self, record: Mapping[str, Any]) -> None:
        if record:
            self.losses.append(record["loss"])

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self.scores.append(record["scores"]["accuracy"])


def test_an_observer_from_python_sees_what_the_log_has(place: Path, tmp_path: Path) -> None:
    seen = Losses()
    run = library.prune(
        "magnitude", model=str(place / "bert"), dataset=str(place / "reviews"), sparsity=0.7, steps=6,
        train={"batch_size": 8, "eval_steps": 3}, out=tmp_path, progress=False, observer=seen,
    )  # fmt: skip
    assert seen.losses == [line["loss"] for line in log_of(run.path) if "loss" in line]
    assert seen.scores == [row["scores"]["accuracy"] for row in run.report["evaluations"]]
