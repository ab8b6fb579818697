"""A study on a real local Ray cluster of two nodes: the same bits, whatever dies; what cannot be says so in a line."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from processes import children, command_of
from sparsesoup.cli.main import main
from sparsesoup.study.execute import ray_executor as module
from sparsesoup.study.execute.ray_connect import ALONE, QUICK, STORE, connect_ray, portable_environment
from tiny_hub import weights_equal, without_seconds
from tiny_studies import ISP, RECIPE, begun, study, write_recipe

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("inside")]

os.environ |= QUICK  # Ray reads it as it is imported
ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402 - only where there is a ray

WORKER = {"num_cpus": 1, "object_store_memory": STORE}
NODE = WORKER | {"include_dashboard": False}
PART = RECIPE | {"sparsities": 0.5, "methods": {"magnitude": None, "isp": ISP}}


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    """Two nodes of one core, each with processes of its own, on this machine."""
    made = Cluster(initialize_head=True, head_node_args=NODE)
    made.add_node(**WORKER)
    yield made
    made.shutdown()


@pytest.fixture
def folder(inside, tmp_path, monkeypatch) -> Path:
    """A folder with a recipe."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write()
    return tmp_path


def write(**changes):
    write_recipe(PART | changes)


def compare_here(out="here"):
    """Run the study in this process."""
    assert main(["compare", "--config", "small.yaml", "--threads", "1", "--out", out]) == 0


def test_two_nodes_give_the_same_bits_as_one_process(two_nodes, folder):
    write(seeds=[0])
    compare_here()
    flags = ["--address", two_nodes.address, "--workers-per-run", "2"]
    assert begun("--executor", "ray", *flags).wait(300) == 0, Path("said.txt").read_text()
    mine, theirs = without_seconds(study()), without_seconds(study(out="here"))
    assert mine["failed"] == []
    assert len(mine["runs"]) == 2
    assert mine == theirs
    for found in mine["runs"]:
        assert weights_equal(folder / "runs" / found["run"], folder / "here" / found["run"])
    assert Path("said.txt").read_text().count(": training ") == 2
    assert not list(folder.glob("runs/.shared-*"))


def below(pid, command):
    """Processes below one whose command line begins so."""
    return [child for child in children(pid) if command_of(child).startswith(command)]


def until(process, happened, pause=0.05):
    """Wait until something has happened; it has to while the process works."""
    last = time.monotonic() + 300
    while not happened():
        assert process.poll() is None, Path("said.txt").read_text()
        assert time.monotonic() < last
        time.sleep(pause)


def at_work(node):
    """Processes of a node that run a trial."""
    return [
        pid for raylet in node.all_processes["raylet"] for pid in below(raylet.process.pid, "ray::TrialActor.run_job")
    ]


def listening(pid):
    """Addresses, in hex, at which a process waits for connections."""
    sockets = set()
    with contextlib.suppress(OSError):  # it has ended
        sockets = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_a_ray_that_is_started_here_is_reached_from_this_machine_alone_and_ends_with_its_driver(folder):
    """The driver is killed while it trains; begun again, it ends as if nothing had happened."""
    write(methods=["magnitude"], seeds=[0], steps=100)
    compare_here()
    flags, heard = ("--executor", "ray", "--workers", "1"), {}
    process = begun(*flags)

    def works():
        """Note who listens where; is a trial at work?"""
        family = [process.pid, *children(process.pid)]
        for pid in family:
            if addresses := listening(pid):
                heard.setdefault(os.path.basename(re.split(r"[ \0]", command_of(pid))[0]), set()).update(addresses)
        return any(command_of(pid).startswith("ray::TrialActor.run_job") for pid in family)

    until(process, works, pause=0.1)
    assert {"gcs_server", "raylet"} <= heard.keys()
    assert any(name.startswith("ray::") for name in heard)
    assert set().union(*heard.values()) <= LOOPBACK, heard
    process.kill()
    process.wait(60)
    assert begun(*flags).wait(300) == 0, Path("said.txt").read_text()
    assert without_seconds(study()) == without_seconds(study(out="here"))


def test_a_ray_that_others_would_reach_is_ended_again(folder, capsys, monkeypatch):
    """It was imported by these tests, before it could be told."""
    for name in ALONE:
        monkeypatch.setenv(name, "1")  # and so taken back: the next driver joins a cluster
    if ray.util.get_node_ip_address().startswith("127."):
        pytest.skip("no other machine reaches this one")
    assert "Ray would listen at" in refused(capsys, "--workers", "1")[0]
    assert not ray.is_initialized()


def test_nodes_get_settings_and_no_secrets(monkeypatch):
    secret = {
        "HF_TOKEN": "hf_a", "HUGGING_FACE_HUB_TOKEN": "hf_b", "HF_TOKEN_PATH": "/t", "TORCH_SECRET": "c",
        "SPARSESOUP_KEY": "d", "AWS_SECRET_ACCESS_KEY": "e", "HF_ENDPOINT": "https://me:f@mirror/hub",
    }  # fmt: skip
    plain = {"HF_HOME": "/models", "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "SPARSESOUP_DATA": "/data"}
    assert portable_environment(secret | plain) == plain
    settings = {}
    fake = SimpleNamespace(init=settings.update)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", "/models")
    connect_ray(fake, "auto", 1)
    assert settings["runtime_env"]["env_vars"]["HF_HOME"] == "/models"
    assert "hf_secret" not in str(settings)


def test_a_dead_worker_a_lost_node_and_a_dead_driver_change_nothing(folder):
    """Each at work when it dies: first the driver, then a worker of the second node, then that node."""
    write(steps=300, seeds=[0, 1, 2])
    compare_here()
    cluster, said = Cluster(initialize_head=True, head_node_args=NODE), Path("said.txt")
    try:
        flags = ["--executor", "ray", "--address", cluster.address, "--retries", "9"]
        second, process = cluster.add_node(**WORKER), begun(*flags)
        until(process, lambda: at_work(second))
        process.kill()
        process.wait(60)
        last = time.monotonic() + 60
        while at_work(second) and time.monotonic() < last:  # Ray ends the tasks of a driver that is gone
            time.sleep(0.1)
        assert not at_work(second)
        process = begun(*flags)
        until(process, lambda: at_work(second))
        os.kill(at_work(second)[0], signal.SIGKILL)
        until(process, lambda: "died (ActorDiedError)" in said.read_text())
        until(process, lambda: at_work(second))
        cluster.remove_node(second, allow_graceful=False)
        until(process, lambda: "died with its node" in said.read_text())
        cluster.add_node(**WORKER)
        assert process.wait(500) == 0, said.read_text()
    finally:
        cluster.shutdown()
    assert study()["failed"] == []
    assert len(study()["runs"]) == 2 * 3
    assert without_seconds(study()) == without_seconds(study(out="here"))
    assert "raylet" not in said.read_text()  # what Ray says of it is not for the terminal


def refused(capsys, *more):
    """The one line that a command is refused with, and the seconds that took."""
    began = time.monotonic()
    assert main(["compare", "--config", "small.yaml", "--executor", "ray", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not Path("runs").exists()
    return line, time.monotonic() - began


def frame(kind, payload, stream=1):
    return len(payload).to_bytes(3, "big") + bytes([kind, 4, 0, 0, 0, stream]) + payload


HTTP2 = frame(4, b"", 0) + frame(8, bytes(4), 0)


@pytest.mark.parametrize(
    "answer",
    [None, HTTP2 + frame(1, bytes([0x8D])), HTTP2 + frame(1, bytes([0x88]) + b"\0\x0bgrpc-status\x0212"), b"<html>"],
    ids=["silence", "a proxy's 404", "gRPC without Ray's services", "no HTTP/2"],
)
def test_a_server_of_another_kind_ends_in_one_line_within_seconds(folder, capsys, answer):
    with socket.socket() as server, contextlib.ExitStack() as lines:
        server.bind(("0.0.0.0", 0))  # Ray asks at another address of this machine
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    line = lines.enter_context(server.accept()[0])
                    if answer:
                        line.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        said, seconds = refused(capsys, "--address", address)
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert f"cannot join the Ray cluster at {address}: " in said
    assert said.endswith(
        "; start one with `ray start --head`, or leave --address and RAY_ADDRESS out and it is started here"
    )
    assert seconds < 60


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("a..b:6379", "no Ray cluster answers at a..b:6379 (a..b is no name of a host); start one"),
        (64 * "a" + ":6379", "is no name of a host); start one"),
        (
            "localhost:²",
            "--address is host:port of a Ray cluster's head, such as 10.0.0.1:6379, or auto; got localhost:²",
        ),
        ("localhost:70000", "or auto; got localhost:70000"),
        ("ray://127.0.0.1:10001", "--address is host:port"),
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1 (Connection refused); start one"),
        (f"localhost:{5000 * '9'}", "--address is host:port"),
    ],
)
def test_an_address_that_is_none_says_so_in_one_line(folder, capsys, address, said):
    line, seconds = refused(capsys, "--address", address)
    assert said in line
    assert seconds < 5


def test_an_address_is_asked_before_the_libraries_are_loaded_and_costs_are_made_equal(folder, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    script = (
        "import sys; from sparsesoup.cli.main import main; "
        "code = main('compare --config none.yaml --executor ray'.split()); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "no Ray cluster answers at 127.0.0.1:1 (Connection refused)" in done.stderr
    assert done.stdout.split() == ["2", "False"]


def test_without_ray_its_extra_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'sparsesoup[ray]'" in refused(capsys)[0]


def test_cells_that_fit_nowhere_and_folders_that_are_not_shared_are_refused(two_nodes, folder, capsys, monkeypatch):
    joined = ["--address", two_nodes.address]
    assert (
        "no node of Ray has the resources for a run: 1 cores and 0.5 GPUs"
        in refused(capsys, *joined, "--gpus-per-run", "0.5")[0]
    )

    @contextlib.contextmanager
    def elsewhere(out):
        yield out / "never-written"

    monkeypatch.setattr(module, "_probe_file", elsewhere)
    line, _ = refused(capsys, *joined)
    assert f"does not see {folder / 'runs'} and the working directory {folder} as this machine does" in line


def test_a_node_holds_as_many_cells_as_fit():
    def fits(cpus, gpus, **resources):
        return module.TrialResources(cpus=cpus, gpus=gpus).trials_per_node(resources)

    assert fits(1, 0, CPU=4) == fits(0.1, 0, CPU=0.4) == 4
    assert fits(1, 0.6, CPU=8, GPU=2) == 2  # a share is of one card
    assert fits(1, 0.25, CPU=8, GPU=2) == 8
    assert fits(1, 2, CPU=8, GPU=5) == 2
    assert fits(1, 1, CPU=8) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--executor", "ray", "--gpus-per-run", "1.5"], "a whole number of GPUs, got 1 and 1.5"),
        (["--executor", "ray", "--cpus-per-run", "0"], "a run has more than 0 cores"),
        (["--gpus-per-run", "1"], "--gpus-per-run is for runs on Ray; add --executor ray"),
        (["--address", "auto"], "--address is for runs on Ray"),
        (["--retries", "1"], "add --workers 2 or --executor ray"),
        (["--workers", "2", "--retries", "-1"], "--retries is at least 0, got -1"),
        (["--executor", "dask"], "invalid choice: 'dask'"),
    ],
)
def test_flags_that_do_not_fit_are_refused_in_one_line(folder, capsys, flags, said):
    assert main(["compare", "--config", "small.yaml", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
