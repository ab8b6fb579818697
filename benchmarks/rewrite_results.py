"""Rewrite the committed results of the first two weeks to the form of `study.json`, with the commit of each run.

    python benchmarks/rewrite_results.py

Reads the results of commit `LAST` from git, so that it gives the same whenever it is run. Until then experiments had a
dialect and a script of their own. A run is of the first commit in which its numbers stand, and has the command that
made it there; other results get their commit alone.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LAST = "a661645"
SETTINGS = {"early-bird": {"every": "every_epochs"}}  # row -> old setting of its method -> new
RECIPE = {"model": "models", "dataset": "datasets", "sparsity": "sparsities", "rows": "methods"}  # old key -> new


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def versions(path: str) -> Iterator[tuple[str, Any]]:
    """(commit, content) of every version of a file, the oldest first."""
    for commit in git("log", "--reverse", "--format=%h", LAST, "--", path).split():
        yield commit, json.loads(git("show", f"{commit}:{path}"))


def leaves(value: Any) -> list[str]:
    """All numbers and words in a value but commands, whose flags were renamed later; sorted."""
    if isinstance(value, dict):
        value = [part for key, part in value.items() if key != "command"]
    return sorted(leaf for part in value for leaf in leaves(part)) if isinstance(value, list) else [repr(value)]


def mark(run: dict[str, Any]) -> str:
    """What tells a run from others: its scores and its cost, by their values alone."""
    flops = sum(cost["flops"] for cost in run["cost"].values())
    return repr([run["seed"], leaves(run["validation"]), leaves(run["test"]), flops])


def as_recipe(study: dict[str, Any]) -> dict[str, Any]:
    """The experiment in the keys of a recipe."""
    rows = {
        row: {RECIPE.get(key, key): value for key, value in own.items()} if own else None
        for row, own in study["rows"].items()
    }
    for row, new in SETTINGS.items():
        if settings := (rows.get(row) or {}).get("method"):
            rows[row] = {**(rows[row] or {}), "method": {new.get(key, key): settings[key] for key in settings}}
    return {RECIPE.get(key, key): rows if key == "rows" else value for key, value in study.items()}


def with_commit(path: str, text: str) -> str:
    """A result that is no study, with its commit as the last entry."""
    commit = next(commit for commit, then in versions(path) if leaves(then) == leaves(json.loads(text)))
    return re.sub(r"^{(\s+)(.*?)\s*}\s*$", rf'{{\1\2,\1"commit": "{commit}"\n}}\n', text, flags=re.DOTALL)


def as_study(path: str, result: dict[str, Any]) -> dict[str, Any]:
    """A result of the old script in the form of `study.json`."""
    origin: dict[str, tuple[str, str]] = {}
    for source in dict.fromkeys(
        [path.replace("-first", ""), path]
    ):  # the first CLIP's were moved to a file of their own
        for commit, run in ((c, run) for c, then in versions(source) for run in then["cells"]):
            if not run.get("missing"):
                origin.setdefault(mark(run), (commit, run["command"]))
    name, runs = Path(path).stem, []
    for run in (run for run in result["cells"] if not run.get("missing")):
        (commit, command), dense = origin[mark(run)], run["sparsity"]["kept"] == run["sparsity"]["total"]
        place = {"model": result["study"]["model"], "dataset": result["study"]["dataset"]}
        place["target"] = None if dense else run["sparsity"]["target"]
        runs.append({"row": run["row"], **place, **run, "command": command, "commit": commit})
    script, recipe = "curve" if name.startswith("curve") else "study", name.removesuffix("-first")
    command = f"python benchmarks/{script}.py benchmarks/experiments/{recipe}.yaml"
    return {"name": name, "command": command, "recipe": as_recipe(result["study"]), "failed": [], "runs": runs}


def main() -> None:
    for path in git("ls-tree", "-r", "--name-only", LAST, "benchmarks/results/").splitlines():
        text = git("show", f"{LAST}:{path}")
        result = json.loads(text)
        new = json.dumps(as_study(path, result), indent=1) + "\n" if "study" in result else with_commit(path, text)
        (ROOT / path).write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
