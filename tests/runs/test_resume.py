"""Killed at any moment and started again, a run ends with the masks of an undisturbed one."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time

import pytest

from conftest import same
from processes import kill_after, start_command, wait_until
from sparsesoup.cli.main import main
from sparsesoup.runs import run_folder as module
from tiny_hub import (
    LINES,
    SAVED_METHODS,
    arguments,
    checkpoint,
    costs_of,
    listing,
    log_of,
    masks_of,
    run_of,
    sparsesoup,
    weights_of,
)

pytestmark = pytest.mark.integration
NOTHING_SAVED = "sparsesoup: interrupted, and nothing new is saved; repeat the command to run it again\n"


@pytest.fixture(scope="module", params=SAVED_METHODS)
def undisturbed(request, place, tmp_path_factory):
    """(method, its run directory) of a run that nobody killed."""
    out = tmp_path_factory.mktemp(request.param)
    assert main(arguments(place, request.param, out)) == 0
    return request.param, run_of(out)


def test_a_run_that_is_killed_again_and_again_ends_like_an_undisturbed_one(undisturbed, place, tmp_path):
    method, reference = undisturbed
    out = tmp_path / "runs"
    line = arguments(place, method, out)
    moments = [1, LINES[method] // 4, LINES[method] // 2, LINES[method] - 2]
    assert [kill_after(line, out, after) for after in moments] == [-9] * len(moments)
    run = run_of(out)
    assert not (run / "report.json").exists()
    (run / "stages" / ".state-a.safetensors.1.part").write_bytes(b"left by a kill in the midst of a save")
    (run / ".model.1.part").mkdir()
    last = sparsesoup(*line)
    assert last.returncode == 0, last.stderr
    assert "resuming after" in last.stderr
    assert same(masks_of(run), masks_of(reference))
    assert same(weights_of(run / "model"), weights_of(reference / "model"))
    own, other = (json.loads((path / "report.json").read_text()) for path in (run, reference))
    assert costs_of(own) == costs_of(other)
    assert own["notes"] == other["notes"]
    assert own["validation"] == other["validation"]
    steps = [[(x["label"], x["step"], x["loss"], x["sparsity"]) for x in log_of(path)] for path in (run, reference)]
    assert steps[0] == steps[1]
    assert len(steps[0]) == LINES[method]
    left = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert left == {str(p.relative_to(reference)) for p in reference.rglob("*") if p.is_file()}
    assert not [name for name in left if name.endswith((".part", ".lock"))]
    assert sum(p.stat().st_size for p in (run / "stages").iterdir()) < 20_000


def test_a_finished_run_is_only_read(undisturbed, place, capsys):
    method, run = undisturbed
    before, began = listing(run), time.monotonic()
    assert main(arguments(place, method, run.parents[2])) == 0
    assert time.monotonic() - began < 5
    assert listing(run) == before
    assert f"{method}: 819 of 4,096 weights kept" in capsys.readouterr().out


def test_a_run_killed_just_before_its_end_is_tidied_up(undisturbed, place, capsys):
    method, run = undisturbed
    html = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert main(arguments(place, method, run.parents[2])) == 0
    assert (run / "report.html").read_text() == html
    (run / "stages" / "state-a.safetensors").write_bytes(bytes(1000))
    (run / "stages" / ".state-b.safetensors.1.part").write_bytes(bytes(1000))
    before = listing(run / "model")
    assert main(arguments(place, method, run.parents[2])) == 0
    assert (run / "report.html").read_text() == html
    assert not [p.name for p in (run / "stages").iterdir() if p.suffix != ".json"]
    assert listing(run / "model") == before


def test_the_second_process_on_one_run_directory_is_turned_away(place, tmp_path, capsys):
    line = arguments(place, "isp", tmp_path / "runs")
    first, errors = start_command(line, tmp_path)
    wait_until(first, lambda: list(tmp_path.glob("runs/*/*/seed-*/log.jsonl")))
    run = run_of(tmp_path / "runs")
    assert main(line) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"another process works on {run}; wait for it or give another --out" in said
    first.join(100)
    assert first.exitcode == 0, errors.read_text()  # and the first one was not disturbed
    assert (run / "report.html").exists()


def test_a_process_turned_away_at_the_very_start_leaves_the_others_directory_alone(place, tmp_path, capsys):
    """Both found no directory; the one that came second must not take back what the first has made."""

    def begun_by_another(path, settings):
        path.mkdir(parents=True)
        (path / "run.yaml").write_text("of the first\n")
        held.append(os.open(path / ".lock", os.O_CREAT | os.O_RDWR))
        fcntl.flock(held[0], fcntl.LOCK_EX)

    held = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "check_same", begun_by_another)
        assert main(arguments(place, "isp", tmp_path)) == 2
    os.close(held[0])
    assert "another process works on" in capsys.readouterr().err
    assert (run_of(tmp_path) / "run.yaml").read_text() == "of the first\n"


def test_an_interrupted_run_says_so_and_goes_on(place, tmp_path):
    # Long enough that a busy machine cannot end it before the signal comes.
    process, errors = start_command([*arguments(place, "isp", tmp_path / "runs"), "--steps", "600"], tmp_path)
    wait_until(process, lambda: list(tmp_path.glob("runs/*/*/seed-*/stages/checkpoint.json")))
    os.kill(process.pid, signal.SIGINT)
    process.join(100)
    assert process.exitcode == 130
    said = errors.read_text()
    assert said.splitlines()[-1] == "sparsesoup: interrupted; repeat the command to resume from the last save"
    assert "Traceback" not in said
    assert (run_of(tmp_path / "runs") / "stages" / "checkpoint.json").exists()


def test_an_interrupted_command_that_saves_nothing_on_its_way_promises_no_more(tmp_path):
    pipe = tmp_path / "run" / "report.json"  # a report that is waited for, so that the signal comes in its midst
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    process, errors = start_command(["show", str(pipe.parent)], tmp_path / "errors")
    wait_until(process, lambda: is_read(pipe))
    os.kill(process.pid, signal.SIGINT)
    process.join(100)
    assert process.exitcode == 130
    assert errors.read_text() == NOTHING_SAVED


@pytest.mark.parametrize("of", ["runs.run_folder.Checkpointer", "runs.run.check_installed"])
def test_a_run_interrupted_before_its_first_save_promises_no_resume(place, tmp_path, capsys, monkeypatch, of):
    def interrupt(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"sparsesoup.{of}", interrupt)
    assert main(arguments(place, "isp", tmp_path / "runs")) == 130
    assert capsys.readouterr().err.splitlines(keepends=True)[-1] == NOTHING_SAVED
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("saved", "said"), [(False, "nothing new is saved"), (True, "resume from the last save")])
def test_an_interrupted_study_says_whether_a_run_is_saved(place, tmp_path, capsys, monkeypatch, saved, said):
    def interrupt(runner, job, console):
        if saved:
            job.record_path.parent.mkdir(parents=True)
            job.record_path.write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsesoup.study.execute.jobs.JobRunner.__call__", interrupt)
    (tmp_path / "small.yaml").write_text("methods: [magnitude]\nseeds: 0\nsteps: 2\n")
    where = ["--model", str(place / "bert"), "--dataset", str(place / "reviews"), "--out", str(tmp_path / "runs")]
    assert main(["compare", "--config", str(tmp_path / "small.yaml"), *where]) == 130
    assert said in capsys.readouterr().err.splitlines()[-1]


def is_read(pipe):
    """Whether another process has opened a pipe to read from it; it stays open for that one."""
    with contextlib.suppress(OSError):
        os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        return True
    return False


@pytest.mark.parametrize("file", ["checkpoint.json", "state"])
def test_a_damaged_save_is_named_with_the_remedy(place, tmp_path, file, capsys):
    line = arguments(place, "isp", tmp_path / "runs")
    assert kill_after(line, tmp_path / "runs", 8) == -9
    run = run_of(tmp_path / "runs")
    path = run / "stages" / file if file != "state" else next((run / "stages").glob("state-?.safetensors"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main(line) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"damaged {'checkpoint' if file != 'state' else 'state'} {path}" in said
    assert f"remove {run / 'stages'} to start over" in said
    for saved in (run / "stages").iterdir():
        saved.unlink()
    assert main(line) == 0
    assert len(log_of(run)) == LINES["isp"]


def test_a_stopped_run_does_not_go_on_from_other_weights(place, tmp_path, capsys):
    shutil.copytree(place, tmp_path / "place")
    line = arguments(tmp_path / "place", "isp", tmp_path / "runs")
    assert kill_after(line, tmp_path / "runs", 8) == -9
    checkpoint(tmp_path / "place" / "bert", seed=5)
    capsys.readouterr()
    assert main(line) == 2
    assert f"{run_of(tmp_path / 'runs')} was begun with another model; give another --out" in capsys.readouterr().err


def test_a_run_that_was_killed_before_its_first_file_was_whole_is_begun(undisturbed, place, tmp_path):
    method, reference = undisturbed
    folder = tmp_path / reference.relative_to(reference.parents[2])
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    (folder / ".run.yaml.7.part").write_text("half")
    assert main(arguments(place, method, tmp_path)) == 0
    assert same(masks_of(folder), masks_of(reference))
    assert not list(folder.glob(".*"))
