"""Writes the embedded dataset, src/sparsesoup/hub/data/docstrings/: which library is a docstring's sentence from?

    python benchmarks/make_docstrings.py FOLDER

The sources of the installed libraries are parsed, never imported. Names that would reveal the answer are masked, so
only subject and style can tell. Other versions of the libraries give other rows; the committed ones are of VERSIONS.
"""

import ast
import hashlib
import importlib.util
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as parquet
from datasets import ClassLabel, Dataset, Features, Value

VERSIONS = {
    "matplotlib": "3.11.2",
    "networkx": "3.6.1",
    "numpy": "2.4.6",
    "pandas": "3.1.1",
    "scipy": "1.17.1",
    "sklearn": "1.9.1",
    "sympy": "1.14.0",
    "torch": "2.13.0",
}
TRAIN_ROWS, TEST_ROWS = 600, 125  # per class
POOL = 900  # sentences per library to draw rows from, without duplicates
WORDS = range(6, 33)
MASK = "thing"
NOT_ITS_OWN = re.compile(r"(^|/)(tests?|testing|_?vendor(ed)?|externals?|extern|_pytest)(/|$)|(^|/)(conftest|test_)")
TELLTALE = re.compile(
    r"scikit[- ]learn|\b(?:pytorch|torch|numpy|scipy|sklearn|pandas|matplotlib|pyplot|pylab|sympy|networkx)\w*"
    r"|\b(?:aten|np|pd|mpl|plt|nx)\b",
    re.I,
)
IDENTIFIER = re.compile(r"``?[^`]*``?|\*?\b\w*(?:[a-z0-9_][A-Z_]|\w\.[A-Za-z_]|_\w)[\w.]*(?:\(\))?|\w+\(\)")


def _build_rows() -> list[list[str | int]]:
    """Return [split, text, label] of every row: each class's first sentences, by their key's hash, are its test."""
    pools = {library: _sentence_pool(library) for library in VERSIONS}
    homes = Counter(key for pool in pools.values() for key in pool)
    rows: list[tuple[str, str, str, int]] = []
    for label, (library, pool) in enumerate(pools.items()):
        own = sorted((_sort_key(key), text) for key, text in pool.items() if homes[key] == 1)
        if len(own) < TEST_ROWS + TRAIN_ROWS:
            raise SystemExit(f"the installed {library} has {len(own)} usable docstrings, too few")
        for i, (order, text) in enumerate(own[: TEST_ROWS + TRAIN_ROWS]):
            rows.append((order, "test" if i < TEST_ROWS else "train", text, label))
    return [[split, text, label] for _, split, text, label in sorted(rows)]


def _sentence_pool(library: str) -> dict[str, str]:
    """Return key -> sentence, from as many of the library's files as needed.

    Files are read in order of their path's hash: a sample of the whole library without parsing all of it.
    """
    root = Path(importlib.util.find_spec(library).submodule_search_locations[0])
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    pool: dict[str, str] = {}
    for name in sorted((name for name in names if not NOT_ITS_OWN.search(name)), key=_sort_key):
        for sentence in _first_sentences(root / name):
            text = mask_names(sentence, name)
            if text:
                pool.setdefault(key_of(text), text)
        if len(pool) >= POOL:
            break
    return pool


def _first_sentences(path: Path) -> Iterator[str]:
    """Yield the first sentence of every docstring in a file; nothing for a file that cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other libraries' sources
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            yield re.split(r"(?<=[a-z)][.!?])\s|(?<=:)\s|::", paragraph)[0]


def mask_names(sentence: str, module: str) -> str:
    """Replace telling names in a sentence by a neutral word; return "" if it is too short, too long or mostly code.

    Masks library names, identifiers, and the words of the module's own path.
    """
    own = "|".join(word for word in re.findall(r"[a-z]{4,}", module.removesuffix(".py").lower()) if word != MASK)
    text = re.sub(r":[\w:]+:(?=`)", "", sentence)
    text = TELLTALE.sub(MASK, IDENTIFIER.sub(MASK, text))
    text = re.sub(rf"\b(?:{own})(?:e?s)?\b", MASK, text, flags=re.I) if own else text
    text = re.sub(rf"\b{MASK}\w*(?:[\s.,/-]*\b{MASK}\w*)+", MASK, text)
    words = text.split()
    clean = text.isascii() and not re.search(r"[\\|=<>{}\[\]@#$%^*~_`]", text)
    telling = sum(MASK not in word for word in words)
    return text if clean and len(words) in WORDS and telling >= WORDS.start - 1 else ""


def key_of(text: str) -> str:
    """Return a key shared by sentences that differ only in case, digits, punctuation, masked names or word order."""
    return " ".join(sorted(set(re.findall(r"[a-z]+", text.lower())) - {MASK, "a", "an", "the", "d"}))


def _sort_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main(folder: Path) -> None:
    """Write train.parquet and test.parquet."""
    rows = _build_rows()
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(VERSIONS))})
    for split in ("train", "test"):
        texts, labels = zip(*[row[1:] for row in rows if row[0] == split], strict=True)
        table = Dataset.from_dict({"text": texts, "label": labels}, features=features).data.table
        parquet.write_table(
            table, folder / f"{split}.parquet", compression="zstd", compression_level=22, use_dictionary=["label"]
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
