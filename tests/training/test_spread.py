"""Weak masks spread over processes: the bits and the bill of one process, whatever dies."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from conftest import same
from processes import children, command_of, start_command, wait_until
from sparsesoup.cli.main import main
from sparsesoup.runs.parallel import ProcessMap
from sparsesoup.training.checkpoint import Checkpointer
from tiny_hub import costs_of, log_of, masks_of, run_of, weights_of

pytestmark = pytest.mark.integration

HASH = "[0-9a-f]" * 32
METHODS = {  # those that draw weak masks, each with two or more stages of them
    "isp": ["--method.stages", "2", "--method.weak-masks", "3", "--method.look-ahead", "0.1"],
    "isp-paper": ["--method.stage", "0.2", "--method.cut", "0.5", "--method.weak-steps", "2"],
    "isp-code": ["--method.stage", "0.5", "--method.cut", "0.4", "--method.weak-masks", "2", "--method.weak", "0.2"],
}


def line(place, out, method="isp", *more):
    return ["prune", method, "--model", str(place / "bert"), "--dataset", str(place / "reviews"), "--sparsity", "0.7",
            "--steps", "40", "--train.batch-size", "8", "--train.learning-rate", "0.003", "--save-every", "0",
            *METHODS[method], "--out", str(out), *more]  # fmt: skip


def workers(process):
    """The processes that draw weak masks for one."""
    return [
        worker for child in children(process.pid) if "forkserver" in command_of(child) for worker in children(child)
    ]


def assert_equal(one: Path, other: Path) -> None:
    """Two runs are the same but for the seconds they took."""
    assert same(masks_of(one), masks_of(other))
    assert same(weights_of(one / "model"), weights_of(other / "model"))
    own, others = (json.loads((run / "report.json").read_text()) for run in (one, other))
    assert costs_of(own) == costs_of(others)
    assert own["notes"] == others["notes"]
    assert log_of(one) == log_of(other)


@pytest.mark.parametrize("method", METHODS)
def test_several_processes_draw_the_masks_of_one(method, place, tmp_path):
    assert main(line(place, tmp_path / "one", method)) == 0
    assert main(line(place, tmp_path / "two", method, "--workers", "2")) == 0
    one, two = run_of(tmp_path / "one"), run_of(tmp_path / "two")
    assert_equal(one, two)
    assert json.loads((two / "report.json").read_text())["cost"]["weak"]["steps"] > 0
    assert {p.name for p in (two / "stages").iterdir()} == {p.name for p in (one / "stages").iterdir()}


def test_workers_with_a_teacher_learn_from_it_too(place, tmp_path):
    with_teacher = ["--train.distill.teacher", "dense"]
    assert main(line(place, tmp_path / "one", "isp", *with_teacher)) == 0
    assert main(line(place, tmp_path / "two", "isp", *with_teacher, "--workers", "2")) == 0
    one, two = (next((tmp_path / name).glob("*/isp-*/seed-0")) for name in ("one", "two"))
    assert_equal(one, two)


def test_a_dead_worker_is_replaced_and_a_dead_run_goes_on(place, tmp_path):
    """A worker dies, then the run itself, in the midst of its weak masks; it takes what is there and draws the rest."""
    long = ["--method.look-ahead", "0.12"]
    assert main(line(place, tmp_path / "one", "isp", *long)) == 0
    process, errors = start_command(line(place, tmp_path / "two", "isp", *long, "--workers", "2"), tmp_path)
    there = f"two/*/*/seed-0/stages/{HASH}.safetensors"
    wait_until(process, lambda: len(workers(process)) == 2)
    seen = workers(process)
    os.kill(seen[0], signal.SIGKILL)
    wait_until(process, lambda: list(tmp_path.glob(there)))
    assert process.is_alive()
    seen += workers(process)
    process.kill()
    process.join(60)
    last = time.monotonic() + 20
    while any(map(command_of, seen)) and time.monotonic() < last:  # they die with their run
        time.sleep(0.1)
    assert not any(map(command_of, seen))
    assert main(line(place, tmp_path / "two", "isp", *long, "--workers", "2")) == 0, errors.read_text()
    assert_equal(run_of(tmp_path / "one"), run_of(tmp_path / "two"))


def test_a_mask_that_is_there_is_not_drawn_again(place, tmp_path, monkeypatch):
    """A restart in the midst of the weak masks takes those on the disk, whichever the checkpoint had counted."""
    assert main(line(place, tmp_path / "one")) == 0
    plain = Checkpointer.run_stage

    def stop(checkpointer, name, *work, **more):
        if name == "stage-2-weak-2":
            raise KeyboardInterrupt
        plain(checkpointer, name, *work, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "run_stage", stop)
        patch.setattr(Checkpointer, "_save_is_due", lambda checkpointer: True)  # or it may go back by a stage
        assert main(line(place, tmp_path / "two", "isp", "--workers", "2")) == 130
    run = run_of(tmp_path / "two")
    there = {file.name: file.stat().st_mtime_ns for file in run.glob(f"stages/{HASH}.safetensors")}
    assert len(there) == 3
    with monkeypatch.context() as patch:
        patch.setattr(ProcessMap, "_run_missing_tasks", lambda *_: pytest.fail("a mask is drawn again"))
        assert main(line(place, tmp_path / "two", "isp", "--workers", "2")) == 0
    assert_equal(run_of(tmp_path / "one"), run)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["magnitude", "--workers", "2"], "--workers: only methods with weak masks have a use for it, not magnitude"),
        (["isp-no-soup", "--workers", "2"], "not isp-no-soup; leave it out"),
        (["isp", "--workers", "0"], "--workers: at least 1 is needed, got 0"),
        (["isp", "--workers", "2", "--train.learning-rate", "1e30"], "the loss is"),
    ],
)
def test_workers_that_cannot_be_and_what_fails_in_one_say_so_in_a_line(arguments, said, place, tmp_path, capsys):
    base = ["--model", place / "bert", "--dataset", place / "reviews", "--steps", "200", "--out", tmp_path]
    assert main(["prune", arguments[0], *map(str, base), *arguments[1:]]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
