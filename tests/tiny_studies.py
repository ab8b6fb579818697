"""A small recipe on the disk, its study, and the command in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from processes import ForkedCommand
from tiny_hub import MAIN, offline

ISP = {"method": {"stages": 2, "weak_masks": 2, "look_ahead": 0.05}}
RECIPE = {
    "models": "bert", "datasets": "reviews", "sparsities": [0.5, 0.8], "seeds": [0, 1], "steps": 20,
    "train": {"batch_size": 8, "learning_rate": 0.003},
    "methods": {"dense": None, "magnitude": None, "imp": {"method": {"cut": 0.5}}, "isp": ISP},
}  # fmt: skip


COMPARE = ["compare", "--config", "small.yaml", "--threads", "1"]


def write_recipe(recipe, name="small"):
    """Write a recipe and return the name of its file; None takes a key away."""
    with open(f"{name}.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}, file, sort_keys=False)
    return f"{name}.yaml"


def study(name="small", out="runs"):
    """Return the content of a finished study's study.json."""
    return json.loads(Path(f"{out}/studies/{name}/study.json").read_text())


def begun(*more):
    """The command line in a new interpreter; what it says is added to said.txt."""
    environment = offline() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if "ray" in more:
        del environment["PYTHONWARNINGS"]  # Ray's own processes warn
    line = [sys.executable, "-m", "sparsesoup.cli.main", *COMPARE, *more]
    with open("said.txt", "a", encoding="utf-8") as said:
        return subprocess.Popen(line, env=environment, stdout=said, stderr=subprocess.STDOUT)


def forked(*more):
    """The command line in a process that has its imports already; what it says is added to said.txt."""
    Path("said.txt").touch()
    return ForkedCommand([*COMPARE, *more], MAIN, offline(), "said.txt")
