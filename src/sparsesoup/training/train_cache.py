"""Training cache: trainings shared by several runs, done once and counted in each."""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, uint8
from xxhash import xxh3_128

from sparsesoup.core.files import remove_path
from sparsesoup.core.tensor_files import TensorFile, save_tensors
from sparsesoup.training.cost import Cost


@dataclass(frozen=True)
class CachedTraining:
    """The result of a training.

    Args:
        tensors, facts: the state at its end, or a part of it; tensors of a file are read one by one.
        cost: its cost when it was done, seconds included.
        records: log record of each step.
    """

    tensors: Mapping[str, Tensor]
    facts: dict[str, Any]
    cost: Cost
    records: list[dict[str, Any]]


class TrainingCache:
    """Finished trainings in a folder, keyed by a hash of the initial state and the training settings.

    Equal trainings are found automatically: IMP's rounds up to the highest sparsity that two runs share, its first
    round and the dense run. They need no names, and a stale training is never used.

    Args:
        folder: cache folder; None disables the cache.
        identity: everything else that determines a training: rows, machine, versions.
        budget: bytes that the folder may hold; the trainings used least recently are removed. None: any number.
    """

    def __init__(
        self, folder: Path | None = None, identity: Mapping[str, Any] | None = None, budget: int | None = None
    ) -> None:
        self.folder, self.identity, self.budget = folder, dict(identity or {}), budget

    def content_key(self, tensors: Mapping[str, Tensor], *what: object) -> str:
        """Return the hash of a state's tensors, of the training settings, and of the identity.

        XXH3 reads memory as fast as it comes, 25 times as fast as BLAKE2: 20 ms for the weights of BERT-base.
        """
        digest = xxh3_128(json.dumps(self.identity, sort_keys=True).encode() + repr(what).encode())
        for name in sorted(tensors):
            t = tensors[name]
            digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
            digest.update(t.detach().cpu().contiguous().flatten().view(uint8).numpy().data)
        return digest.hexdigest()

    def get_training(self, key: str) -> CachedTraining | None:
        """Return the training of that key; None if there is none, or it cannot be read."""
        try:
            tensors = TensorFile(self._path_of(key))
            facts = tensors.facts
            os.utime(self._path_of(key))  # used just now
            if facts.pop("digest") != self.content_key(tensors, key, facts):
                return None
            return CachedTraining(tensors, facts["facts"], Cost(**facts["cost"]), facts["records"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # it is trained again and replaced

    def put_training(self, key: str, product: CachedTraining) -> None:
        """Store a training for other runs."""
        facts = {"facts": product.facts, "cost": asdict(product.cost), "records": product.records}
        facts = json.loads(json.dumps(facts))  # as they will be read back, for the digest
        facts["digest"] = self.content_key(product.tensors, key, facts)
        save_tensors(self._path_of(key), product.tensors, facts)
        if self.budget is not None:
            self._remove_beyond_budget(self.budget, self._path_of(key))

    def _remove_beyond_budget(self, budget: int, newest: Path) -> None:
        files = []
        for path in newest.parent.glob("*.safetensors"):
            with contextlib.suppress(OSError):  # another run has removed it
                files.append((path == newest, path.stat().st_mtime_ns, path.stat().st_size, path))
        for _, _, size, path in sorted(files, reverse=True):
            budget -= size
            if budget < 0 and path != newest:
                remove_path(path)

    def _path_of(self, key: str) -> Path:
        return Path(str(self.folder)) / f"{key}.safetensors"
