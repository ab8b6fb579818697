"""Run `make fast` on the lowest and the highest versions that pyproject.toml allows; needs uv.

    python tests/check_versions.py [lowest] [pinned] [highest] --out benchmarks/results/tests/versions.json

lowest:  Python 3.11 and the lowest version of every direct dependency.
pinned:  Python 3.12 and the versions of constraints.txt.
highest: Python 3.13 and the newest version of everything.
Each gets an environment of its own in a temporary folder (about 6 GB where torch comes with CUDA).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CASES = {
    "lowest": ("3.11", ["--resolution", "lowest-direct"]),
    "pinned": ("3.12", ["--constraint", str(ROOT / "constraints.txt")]),
    "highest": ("3.13", []),
}
SHOWN = ("torch", "transformers", "accelerate", "datasets", "huggingface-hub", "ruamel-yaml", "numpy", "pandas")


def check(case: str, tests: list[str]) -> dict[str, object]:
    """The versions that were installed, and the last line of the tests."""
    version, resolution = CASES[case]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        python = f"{folder}/venv/bin/python"
        subprocess.run(["uv", "venv", "--quiet", "--python", version, f"{folder}/venv"], check=True, env=clean)
        packages = ["--editable", f"{ROOT}[demo,dev]"]
        install = ["uv", "pip", "install", "--quiet", "--python", python, *resolution, *packages]
        subprocess.run(install, check=True, env=clean)
        frozen = subprocess.run(["uv", "pip", "freeze", "--python", python], capture_output=True, text=True, check=True)
        versions = dict(re.findall(r"^(\S+)==(\S+)$", frozen.stdout, re.M))
        line = [python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not integration and not slow", *tests]
        done = subprocess.run(line, cwd=ROOT, env=clean, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout[-6000:], flush=True)
    shown = {name: versions[name] for name in SHOWN if name in versions}
    return {"python": version} | shown | {"tests": done.stdout.strip().splitlines()[-1], "passed": not done.returncode}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tests", default="--numprocesses 2", help="arguments of pytest")
    options = parser.parse_args()
    found = {case: check(case, options.tests.split()) for case in options.cases}
    if options.out:
        command = " ".join(["python tests/check_versions.py", *sys.argv[1:]])
        options.out.write_text(json.dumps({"command": command} | found, indent=1) + "\n", encoding="utf-8")
    return int(not all(case["passed"] for case in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
