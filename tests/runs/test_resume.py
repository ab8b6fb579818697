"""Killed at any moment and started again, a run ends with the masks of an undisturbed one."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest
import torch

from conftest import same
from sparsesoup.cli.main import main
from sparsesoup.runs import run as module
from sparsesoup.runs.progress import ProgressLogger
from tiny_hub import checkpoint, listing, log_of, masks_of, run_of, sparsesoup, weights_of

METHODS = {
    "isp": ["--steps", "40", "--method.stages", "3", "--method.weak-masks", "2", "--method.look-ahead", "0.05"],
    "imp-rewind": ["--steps", "12", "--method.cut", "0.5", "--method.rewind", "0.25"],
}
LINES = {"isp": 40, "imp-rewind": 3 + 9 * 4}
FORKS = multiprocessing.get_context("forkserver")  # a real process each, without four seconds of imports
FORKS.set_forkserver_preload(["sparsesoup.runs.run"])


def slowly(line, errors):
    """The command line in a process of its own, slowed down so that a kill hits the moment that was meant."""
    plain = ProgressLogger.step

    def step(self, record):
        plain(self, record)
        if record:
            time.sleep(0.03)

    ProgressLogger.step = step
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
    torch.set_num_threads(1)
    with open(errors, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
        os._exit(main(line))


def begun(line, folder):
    """The process that runs this command, and where its errors go."""
    folder.mkdir(parents=True, exist_ok=True)
    errors = folder / "errors.txt"
    process = FORKS.Process(target=slowly, args=(line, str(errors)))
    process.start()
    return process, errors


def until(process, happened):
    """Wait until something has happened, or the process has ended."""
    last = time.monotonic() + 100
    while process.is_alive() and not happened() and time.monotonic() < last:
        time.sleep(0.002)


def arguments(place, method, out):
    return ["prune", method, "--model", str(place / "bert"), "--dataset", str(place / "reviews"), "--sparsity", "0.8",
            "--train.batch-size", "8", "--train.learning-rate", "0.003", "--save-every", "0", *METHODS[method],
            "--out", str(out)]  # fmt: skip


@pytest.fixture(scope="module", params=METHODS)
def undisturbed(request, place, tmp_path_factory):
    """(method, its run directory) of a run that nobody killed."""
    out = tmp_path_factory.mktemp(request.param)
    assert main(arguments(place, request.param, out)) == 0
    return request.param, run_of(out)


def killed(line, out, after):
    """Start the command, kill it without warning once its log has `after` lines; how it ended."""
    process, errors = begun(line, out.parent)
    until(process, lambda: sum(log.read_bytes().count(b"\n") for log in out.glob("*/*/seed-*/log.jsonl")) >= after)
    process.kill()
    process.join(100)
    assert "sparsesoup:" not in errors.read_text()
    return process.exitcode


def test_a_run_that_is_killed_again_and_again_ends_like_an_undisturbed_one(undisturbed, place, tmp_path):
    method, reference = undisturbed
    out = tmp_path / "runs"
    line = arguments(place, method, out)
    moments = [1, LINES[method] // 4, LINES[method] // 2, LINES[method] - 2]
    assert [killed(line, out, after) for after in moments] == [-9] * len(moments)
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
    assert costs(own) == costs(other)
    assert own["notes"] == other["notes"]
    assert own["validation"] == other["validation"]
    steps = [[(x["label"], x["step"], x["loss"], x["sparsity"]) for x in log_of(path)] for path in (run, reference)]
    assert steps[0] == steps[1]
    assert len(steps[0]) == LINES[method]
    left = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert left == {str(p.relative_to(reference)) for p in reference.rglob("*") if p.is_file()}
    assert not [name for name in left if name.endswith((".part", ".lock"))]
    assert sum(p.stat().st_size for p in (run / "stages").iterdir()) < 20_000


def costs(report):
    return {
        label: {k: v for k, v in cost.items() if k not in ("seconds", "shared")}
        for label, cost in report["cost"].items()
    }


def test_a_finished_run_is_only_read(undisturbed, place, capsys):
    method, run = undisturbed
    before, began = listing(run), time.monotonic()
    assert main(arguments(place, method, run.parents[2])) == 0
    assert time.monotonic() - began < 5
    assert listing(run) == before
    assert f"{method}: 819 of 4096 weights kept" in capsys.readouterr().out


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
    first, errors = begun(line, tmp_path)
    until(first, lambda: list(tmp_path.glob("runs/*/*/seed-*/log.jsonl")))
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
    process, errors = begun([*arguments(place, "isp", tmp_path / "runs"), "--steps", "600"], tmp_path)
    until(process, lambda: list(tmp_path.glob("runs/*/*/seed-*/stages/journal.json")))
    os.kill(process.pid, signal.SIGINT)
    process.join(100)
    assert process.exitcode == 130
    said = errors.read_text()
    assert said.splitlines()[-1] == "sparsesoup: interrupted; repeat the command to resume from the last save"
    assert "Traceback" not in said
    assert (run_of(tmp_path / "runs") / "stages" / "journal.json").exists()


def test_an_interrupted_command_that_saves_nothing_on_its_way_promises_no_more(tmp_path):
    pipe = tmp_path / "run" / "report.json"  # a report that is waited for, so that the signal comes in its midst
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    process, errors = begun(["show", str(pipe.parent)], tmp_path / "errors")
    until(process, lambda: is_read(pipe))
    os.kill(process.pid, signal.SIGINT)
    process.join(100)
    assert process.exitcode == 130
    assert errors.read_text() == "sparsesoup: interrupted; repeat the command to start over\n"


def is_read(pipe):
    """Whether another process has opened a pipe to read from it; it stays open for that one."""
    with contextlib.suppress(OSError):
        os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        return True
    return False


@pytest.mark.parametrize("file", ["journal.json", "state"])
def test_a_damaged_save_is_named_with_the_remedy(place, tmp_path, file, capsys):
    line = arguments(place, "isp", tmp_path / "runs")
    assert killed(line, tmp_path / "runs", 8) == -9
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
    assert killed(line, tmp_path / "runs", 8) == -9
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
