"""The public names as a user's script has them: `make check` proves that a type checker knows them."""

from pathlib import Path
from typing import assert_type

import sparsesoup


def use_public_names() -> None:
    run = sparsesoup.prune(sparsesoup.InstantSoup(stages=3), model="minilm", sparsity=0.5)
    assert_type(run.path, Path)
    sparsesoup.prune("isp", sparsity="much")  # type: ignore[call-overload]
