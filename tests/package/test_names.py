"""Names: of two words or more for the most part, no public one twice, and few rooms to look in."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import sparsesoup

ROOT = Path(sparsesoup.__file__).parent
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}
Named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def words_of(name: str) -> list[str]:
    """Return the words of a name in either case, such as two for `count_kept`, `CostTracker` and `_apply_`."""
    return [word for word in re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).split("_") if word]


def all_names() -> Iterator[str]:
    """Yield the name of every function, method and class that Python does not name itself."""
    for tree in TREES.values():
        yield from (n.name for n in ast.walk(tree) if isinstance(n, Named) and not n.name.startswith("__"))


def test_words_are_counted() -> None:
    assert [len(words_of(name)) for name in ("count_kept", "CostTracker", "_set_masks_", "train", "Platon")] == [
        2, 2, 2, 1, 1,
    ]  # fmt: skip


def test_few_names_are_of_one_word() -> None:
    names = [*all_names()]
    assert sum(len(words_of(name)) == 1 for name in names) / len(names) < 0.2


def text_constants(tree: ast.AST) -> Iterator[str]:
    """Yield the texts of a module, each of an f-string as one, without docstrings."""
    inner = {id(v) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for v in node.values}
    inner |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.value


def test_a_remedy_says_set_use_or_run_and_neither_say_nor_take() -> None:
    awkward = re.compile(r"(?:[;,:] (?:then |or )?|\bor )(?:say|take) (?!it out)")
    found = [(path.name, text) for path, tree in TREES.items() for text in text_constants(tree) if awkward.search(text)]
    assert [each for each in found if each[0] != "files.py"] == []  # "take its line out"


def test_no_two_public_classes_or_functions_share_a_name() -> None:
    """Overloads of a function, which stand in one file, share its name."""
    public = {
        (path, node.name)
        for path, tree in TREES.items()
        for node in tree.body
        if isinstance(node, Named) and node.name[0] != "_"
    }
    found = Counter(name for _, name in public)
    assert [name for name, count in found.items() if count > 1] == []


def test_there_are_at_most_twelve_modules_and_packages() -> None:
    rooms = {path.relative_to(ROOT).parts[0] for path in TREES} - {"__init__.py"}
    assert len(rooms) <= 12, sorted(rooms)


def test_no_file_is_above_300_lines_and_no_function_above_60() -> None:
    long = [str(path.relative_to(ROOT)) for path in TREES if len(path.read_text(encoding="utf-8").splitlines()) > 300]
    long += [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert not long
