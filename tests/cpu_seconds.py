"""CPU seconds of each test file, its child processes included.

    python tests/cpu_seconds.py OUT.json [arguments of pytest]

They hardly depend on what else the machine does, unlike seconds of wall clock. As a plugin of pytest (`-p cpu_seconds`)
it adds up the tests; as a program it runs pytest with the plugin and writes the sums. What is no test's (imports, the
collection, pytest itself) is the difference to the whole. A process that outlives its test counts for none.
"""

import json
import os
import resource
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SUMS: dict[str, float] = defaultdict(float)
SLOWEST: dict[str, float] = defaultdict(float)


def used() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in each)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    """Note on the report what was used since the last one (of a test's first phase: since its setup began)."""
    report = yield
    now = used()
    report.cpu_seconds = now - item.config.stash[LAST]  # type: ignore[attr-defined]
    item.config.stash[LAST] = now
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[LAST] = used()


LAST = pytest.StashKey[float]()


def pytest_runtest_logreport(report: Any) -> None:
    """Runs in the process that collects all reports, be the tests run there or in workers of xdist."""
    SUMS[report.nodeid.partition("::")[0]] += report.cpu_seconds
    SLOWEST[report.nodeid] += report.cpu_seconds


def pytest_sessionfinish(session: pytest.Session) -> None:
    if out := os.environ.get("SPARSESOUP_TEST_CPU"):
        if hasattr(session.config, "workerinput"):
            return
        most = sorted(SLOWEST.items(), key=lambda pair: -pair[1])[:60]
        result = {"files": SUMS, "slowest": dict(most), "tests": len(SLOWEST)}
        Path(out).write_text(json.dumps(result), encoding="utf-8")


def main() -> int:
    out, arguments = Path(sys.argv[1]), sys.argv[2:]
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "SPARSESOUP_TEST_CPU": str(out)}
    code = subprocess.run([sys.executable, "-m", "pytest", "-p", "cpu_seconds", *arguments], env=environment).returncode
    found = json.loads(out.read_text(encoding="utf-8"))
    tests = sum(found["files"].values())
    result = {
        "command": " ".join(["python tests/cpu_seconds.py", *sys.argv[1:]]),
        "python": sys.version.split()[0],
        "tests": found["tests"],
        "total": round(used(), 1),
        "outside tests": round(used() - tests, 1),
        "files": {k: round(v, 1) for k, v in sorted(found["files"].items(), key=lambda pair: -pair[1])},
        "slowest": {k: round(v, 1) for k, v in found["slowest"].items()},
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
