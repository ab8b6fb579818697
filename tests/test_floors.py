"""Imports only point down, and only as far as each floor may look."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import sparsesoup

ROOT = Path(sparsesoup.__file__).parent
FLOORS: list[set[str]] = [
    {
        "answered",
        "errors",
        "files",
        "rng",
        "masks",
        "patterns",
        "schedules",
        "meter",
        "data",
        "timing",
        "training",
        "shares",
    },
    {"journal", "manifest", "neighbours", "select", "shelf", "structures", "targets", "threshold", "ticket"},
    {"forks", "state", "problem"},
    {"train", "common", "hold", "objectives"},
    {"scores", "gates", "soups"},
    {"methods"},
    {"hub", "exports"},
    {
        "parser",
        "yaml_text",
        "as_flags",
        "exporting",
        "verifying",
        "measuring",
        "recipe",
        "summary",
        "python",
        "card",
        "collapse",
        "pushing",
        "tidying",
        "watch",
        "teacher",
        "run",
        "outside",
        "standing",
        "report",
        "show",
        "words",
        "charts",
        "escaping",
        "terminal",
        "study",
        "spread",
        "workers",
        "threads",
        "cli",
    },
    {"__init__", "__main__"},
]
PLAIN = {"torch", "accelerate", "safetensors", "numpy"} | sys.stdlib_module_names
MODULES = {path: path.relative_to(ROOT).with_suffix("").parts[0] for path in ROOT.rglob("*.py")}


def floor(module: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if module in names)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            whole = node.module == "sparsesoup"
            yield from (f"sparsesoup.{alias.name}" for alias in node.names) if whole else [str(node.module)]


def test_every_module_has_a_floor() -> None:
    assert set(MODULES.values()) <= set.union(*FLOORS)


def test_imports_only_point_down() -> None:
    up = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, module in MODULES.items()
        for name in imports(path)
        if name.startswith("sparsesoup.")
        and name.split(".")[1] in set.union(*FLOORS)
        and floor(name.split(".")[1]) > floor(module)
    ]
    assert not up


def test_the_core_imports_torch_and_little_else() -> None:
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path, module in MODULES.items()
        if floor(module) <= 5
        for name in imports(path)
        if name.split(".")[0] not in PLAIN | {"sparsesoup"}
    }
    assert not found


def test_the_hub_alone_imports_transformers_and_datasets() -> None:
    found = {
        module
        for path, module in MODULES.items()
        if {name.split(".")[0] for name in imports(path)} & {"transformers", "datasets"}
    }
    assert found == {"hub"}
