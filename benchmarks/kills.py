"""Twenty kills at random moments over a small study: the table is that of a study that nobody disturbed.

    python benchmarks/kills.py --executor processes --out benchmarks/results/study/kills-processes.json

A tiny BERT of random weights, two classes of sentences, three methods. Each kill is a SIGKILL of the first process or
of any that works for it, drawn anew; on Ray, started here with two nodes of one core, every fifth kill takes a whole
node, and another one comes. Where the first process was hit, the same command is said again.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.extend(map(str, (Path(__file__).parents[1] / "tests").glob("**/")))
from processes import children, command_of
from tiny_hub import checkpoint, reviews, without_seconds

ISP = {"method": {"stages": 2, "weak_masks": 2, "look_ahead": 0.05}}
RECIPE = {
    "models": "bert", "datasets": "reviews", "sparsities": [0.5, 0.8], "seeds": [0, 1],
    "train": {"batch_size": 8, "learning_rate": 0.003},
    "methods": {"dense": None, "imp": {"method": {"cut": 0.5}}, "isp": ISP},
}  # fmt: skip
FLAGS = {
    "in-process": [],
    "processes": ["--workers", "2", "--retries", "99"],
    "ray": ["--executor", "ray", "--retries", "99"],
}
DOING = {
    "in-process": "-m sparsesoup",
    "processes": "forkserver",
    "ray": "ray::TrialActor.run_job",
}  # in their command lines
AGAIN = "---- again\n"


def begun(folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    """The study as a process of its own, in a folder."""
    line = [sys.executable, "-m", "sparsesoup", "compare", "--config", "small.yaml", "--threads", "1", *flags]
    with open(folder / "said.txt", "a", encoding="utf-8") as said:
        said.write(AGAIN)
        said.flush()
        return subprocess.Popen(line, cwd=folder, stdout=said, stderr=subprocess.STDOUT)


class Nodes:
    """Two nodes of Ray on this machine, one of which can be lost."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.settings = {"num_cpus": 1, "object_store_memory": 80_000_000}
        self.cluster = Cluster(initialize_head=True, head_node_args=self.settings | {"include_dashboard": False})
        self.second = self.cluster.add_node(**self.settings)

    def lose(self) -> None:
        """Lose one at once; another comes."""
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = self.cluster.add_node(**self.settings)


@contextlib.contextmanager
def nodes(executor: str) -> Iterator[Nodes | None]:
    """The nodes that an executor needs."""
    if executor != "ray":
        yield None
        return
    made = Nodes()
    try:
        yield made
    finally:
        made.cluster.shutdown()


def disturb(folder: Path, executor: str, kills: int, draw: random.Random, longest: float) -> list[str]:
    """Have the study done while it is killed so often; what was hit."""
    hit: list[str] = []
    with nodes(executor) as cluster:
        flags = [*FLAGS[executor], *(["--address", cluster.cluster.address] if cluster else [])]
        process = begun(folder, *flags)
        while len(hit) < kills and process.poll() is None:
            wait_until_at_work(folder, executor, process)
            time.sleep(draw.uniform(0.0, longest))
            if process.poll() is not None:
                break  # the study has ended: to kill what is over would count for nothing
            if cluster and len(hit) % 5 == 4:
                cluster.lose()
                hit.append("node")
                continue
            victim = draw.choice(sorted({process.pid, *workers(os.getpid())}))
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                hit.append("first" if victim == process.pid else "worker")
            if victim == process.pid:
                process.wait(60)
                process = begun(folder, *flags)
        if process.wait() != 0 or study(folder)["failed"]:
            begun(folder, *flags, "--retry-failed").wait()
    return hit


def wait_until_at_work(folder: Path, executor: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until the process draws or tests cells: a kill while it still starts shows little."""
    while process.poll() is None:
        said = (folder / "said.txt").read_text(encoding="utf-8").rpartition(AGAIN)[2]
        lines = workers(os.getpid()).values()
        if ("training" in said or "testing" in said) and any(DOING[executor] in line for line in lines):
            return
        time.sleep(0.2)


def workers(pid: int) -> dict[int, str]:
    """The processes below one that do jobs, or make those that do."""
    found = {child: command_of(child) for child in children(pid)}
    return {child: line for child, line in found.items() if any(word in line for word in DOING.values())}


def study(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs" / "studies" / "small" / "study.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executor", choices=tuple(FLAGS), default="processes")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300, help="T of each cell; more, if the study ends too early")
    parser.add_argument("--longest", type=float, default=4.0, help="seconds between two kills at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, default=Path(__file__).parent / "scratch" / "kills")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    folders = [options.scratch / name / str(time.time_ns()) for name in ("undisturbed", options.executor)]
    for folder in folders:
        folder.mkdir(parents=True)
        checkpoint(folder / "bert")
        reviews(folder / "reviews")
        (folder / "small.yaml").write_text(yaml.safe_dump(RECIPE | {"steps": options.steps}), encoding="utf-8")
    if begun(folders[0]).wait() != 0:
        raise SystemExit((folders[0] / "said.txt").read_text(encoding="utf-8"))
    hit = disturb(folders[1], options.executor, options.kills, random.Random(options.seed), options.longest)
    one, other = (without_seconds(study(folder)) for folder in folders)
    found = {"executor": options.executor, "kills": hit, "runs": len(one["runs"]), "same table": one == other}
    found |= {"command": " ".join(["python", *sys.argv]), "machine": platform.machine()}
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if one != other or len(hit) < options.kills:
        raise SystemExit(
            f"{len(hit)} kills of {options.kills}; the tables are {'the same' if one == other else 'not the same'}"
        )


if __name__ == "__main__":
    main()
