"""Killed at any moment and started again, a run ends with the masks of an undisturbed one."""

import fcntl
import json
import subprocess
import time

import pytest
from conftest import same

from sparsesoup.cli import main
from tiny_hub import (
    checkpoint, command, listing, log_of, masks_of, offline, reviews, run_of, sparsesoup, weights_of,
)  # fmt: skip

METHODS = {
    "isp": ["--steps", "40", "--method.stages", "3", "--method.weak-masks", "2", "--method.look-ahead", "0.05"],
    "imp-rewind": ["--steps", "12", "--method.cut", "0.5", "--method.rewind", "0.25"],
}
LINES = {"isp": 40, "imp-rewind": 3 + 9 * 4}
# The real command line, slowed down between steps so that a kill hits the moment that was meant.
SLOW = """
import time
from sparsesoup.watch import Watch
plain = Watch.step
def step(self, record):
    plain(self, record)
    if record:
        self._file.flush()
        time.sleep(0.03)
Watch.step = step
from sparsesoup.cli import main
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    checkpoint(folder / "bert")
    reviews(folder / "reviews")
    return folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def arguments(place, method, out):
    return ["prune", method, "--model", str(place / "bert"), "--dataset", str(place / "reviews"), "--sparsity", "0.8",
            "--train.batch-size", "8", "--train.learning-rate", "0.003", "--save-every", "0", *METHODS[method],
            "--out", str(out)]  # fmt: skip


@pytest.fixture(scope="module", params=METHODS)
def undisturbed(request, place, tmp_path_factory):
    """(method, its run directory) of a run that nobody killed."""
    out = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert main(arguments(place, request.param, out)) == 0
    return request.param, run_of(out)


def killed(line, out, after):
    """Start the command, kill it without warning once its log has `after` lines; whether it was still at work."""
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=offline(), text=True)
    until = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < until:
        logs = list(out.glob("*/*/seed-*/log.jsonl"))
        if logs and logs[0].read_bytes().count(b"\n") >= after:
            process.kill()
            break
        time.sleep(0.002)
    _, errors = process.communicate(timeout=100)
    assert process.returncode in (0, -9), errors
    return process.returncode == -9


def test_a_run_that_is_killed_again_and_again_ends_like_an_undisturbed_one(undisturbed, place, tmp_path):
    method, reference = undisturbed
    line = command(*arguments(place, method, tmp_path), wrap=SLOW)
    moments = [1, LINES[method] // 4, LINES[method] // 2, LINES[method] - 2]
    assert [killed(line, tmp_path, after) for after in moments] == [True] * len(moments)
    run = run_of(tmp_path)
    assert not (run / "report.json").exists()
    (run / "stages" / ".state-a.safetensors.1.part").write_bytes(b"left by a kill in the midst of a save")
    (run / ".model.1.part").mkdir()
    last = sparsesoup(*arguments(place, method, tmp_path))
    assert last.returncode == 0, last.stderr
    assert "going on after" in last.stderr
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
    return {label: {k: v for k, v in cost.items() if k != "seconds"} for label, cost in report["cost"].items()}


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
    (run / "stages" / "state-a.safetensors").write_bytes(bytes(1000))
    (run / "stages" / ".state-b.safetensors.1.part").write_bytes(bytes(1000))
    before = listing(run / "model")
    assert main(arguments(place, method, run.parents[2])) == 0
    assert (run / "report.html").read_text() == html
    assert not [p.name for p in (run / "stages").iterdir() if p.suffix != ".json"]
    assert listing(run / "model") == before


def test_the_second_process_on_one_run_directory_is_turned_away(place, tmp_path, capsys):
    line = command(*arguments(place, "isp", tmp_path), wrap=SLOW)
    first = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=offline(), text=True)
    try:
        until = time.monotonic() + 100
        while not list(tmp_path.glob("*/*/seed-*/log.jsonl")) and time.monotonic() < until:
            time.sleep(0.01)
        assert main(arguments(place, "isp", tmp_path)) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert f"another process works on {run_of(tmp_path)}; wait for it or give another --out" in said
        _, errors = first.communicate(timeout=100)
        assert first.returncode == 0, errors  # and the first one was not disturbed
    finally:
        first.kill()
    assert (run_of(tmp_path) / "report.html").exists()


def test_a_process_turned_away_at_the_very_start_leaves_the_others_directory_alone(place, tmp_path, capsys):
    """Both found no directory; the one that came second must not take back what the first has made."""
    from sparsesoup import run as module

    def begun_by_another(path, settings):
        path.mkdir(parents=True)
        (path / "run.yaml").write_text("of the first\n")
        held.append(open(path / ".lock", "w", encoding="utf-8"))
        fcntl.flock(held[0], fcntl.LOCK_EX)

    held = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_check_same", begun_by_another)
        assert main(arguments(place, "isp", tmp_path)) == 2
    held[0].close()
    assert "another process works on" in capsys.readouterr().err
    assert (run_of(tmp_path) / "run.yaml").read_text() == "of the first\n"


def test_an_interrupted_run_says_so_and_goes_on(place, tmp_path):
    line = command(*arguments(place, "isp", tmp_path), wrap=SLOW)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=offline(), text=True)
    until = time.monotonic() + 100
    while not list(tmp_path.glob("*/*/seed-*/stages/journal.json")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(2)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "sparsesoup: interrupted; the same command goes on from the last save"
    assert "Traceback" not in errors
    assert (run_of(tmp_path) / "stages" / "journal.json").exists()


@pytest.mark.parametrize("file", ["journal.json", "state"])
def test_a_damaged_save_is_named_with_the_remedy(place, tmp_path, file, capsys):
    line = command(*arguments(place, "isp", tmp_path), wrap=SLOW)
    assert killed(line, tmp_path, 8)
    run = run_of(tmp_path)
    path = run / "stages" / file if file != "state" else next((run / "stages").glob("state-?.safetensors"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main(arguments(place, "isp", tmp_path)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"damaged {'journal' if file != 'state' else 'state'} {path}" in said
    assert f"remove {run / 'stages'} to start afresh" in said
    for saved in (run / "stages").iterdir():
        saved.unlink()
    assert main(arguments(place, "isp", tmp_path)) == 0
    assert len(log_of(run)) == LINES["isp"]


def test_a_stopped_run_does_not_go_on_from_other_weights(place, tmp_path, capsys):
    import shutil

    shutil.copytree(place, tmp_path / "place")
    line = arguments(tmp_path / "place", "isp", tmp_path / "runs")
    assert killed(command(*line, wrap=SLOW), tmp_path / "runs", 8)
    checkpoint(tmp_path / "place" / "bert", seed=5)
    capsys.readouterr()
    assert main(line) == 2
    assert f"{run_of(tmp_path / 'runs')} was begun with another model; give another --out" in capsys.readouterr().err
