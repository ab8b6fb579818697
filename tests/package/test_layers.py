"""Imports point down: from each package only to those on the layers below it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import sparsesoup

ROOT = Path(sparsesoup.__file__).parent
LAYERS: list[set[str]] = [
    {"core"},
    {"training"},
    {"methods", "hub"},
    {"report"},
    {"runs"},
    {"exports", "loops"},
    {"study"},
    {"api"},
    {"cli"},
    {"__init__", "__main__"},
]
PLAIN = {"torch", "accelerate", "safetensors", "numpy", "filelock", "xxhash"} | sys.stdlib_module_names
PACKAGE = {path: path.relative_to(ROOT).with_suffix("").parts[0] for path in ROOT.rglob("*.py")}


def layer(package: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if package in names)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            whole = node.module == "sparsesoup"
            yield from (f"sparsesoup.{alias.name}" for alias in node.names) if whole else [str(node.module)]


def imports_of(*packages: str) -> Iterator[tuple[Path, str]]:
    """(file, a module that it imports) for all files of these packages."""
    yield from ((path, name) for path, package in PACKAGE.items() if package in packages for name in imports(path))


def test_every_package_has_a_layer() -> None:
    assert set(PACKAGE.values()) == set.union(*LAYERS)


def test_imports_only_point_down() -> None:
    up = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, name in imports_of(*PACKAGE.values())
        if name.startswith("sparsesoup.")
        and (other := name.split(".")[1]) in PACKAGE.values()
        and other != PACKAGE[path]
        and layer(other) >= layer(PACKAGE[path])
    ]
    assert not up


def test_the_core_imports_torch_and_little_else() -> None:
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path, name in imports_of("core", "training", "methods")
        if name.split(".")[0] not in PLAIN | {"sparsesoup"}
    }
    assert not found


def test_the_hub_and_the_trainers_callback_alone_import_transformers_and_datasets() -> None:
    found = {
        PACKAGE[path]
        for path, name in imports_of(*PACKAGE.values())
        if name.split(".")[0] in {"transformers", "datasets"}
    }
    assert found == {"hub", "loops"}


def test_no_import_of_a_module_needs_what_unix_alone_has() -> None:
    """Of the libraries, transformers needs fcntl on Linux, so their imports cannot be tried with it hidden."""
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in PACKAGE
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        for name in [getattr(node, "module", None), *(alias.name for alias in getattr(node, "names", ()))]
        if isinstance(node, (ast.Import, ast.ImportFrom)) and name in {"fcntl", "resource", "pwd", "grp", "termios"}
    ]
    assert not found
