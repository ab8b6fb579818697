"""The cache: trainings that several runs have in common, done once and charged to each."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from sparsesoup.core.files import atomic_write, from_json
from sparsesoup.training.cost import Cost


@dataclass(frozen=True)
class CachedTraining:
    """What a training leaves.

    Args:
        tensors, facts: the state at its end.
        cost: what it took where it was done, seconds included.
        records: what was logged of each step.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    cost: Cost
    records: list[dict[str, Any]]


class TrainingCache:
    """Finished trainings in a folder, each under a hash of the state it began with and of what was done to it.

    A hash of contents knows by itself what runs share: IMP's rounds up to the highest sparsity that two runs have in
    common, its first round and the dense run. Nothing has to be named, and nothing stale is ever taken.

    Args:
        folder: where to; None shares nothing.
        identity: all that decides a training beside the state and its settings: rows, machine, versions.
    """

    def __init__(self, folder: Path | None = None, identity: Mapping[str, Any] | None = None) -> None:
        self.folder, self.identity = folder, dict(identity or {})

    def content_key(self, tensors: Mapping[str, Tensor], *what: object) -> str:
        """Hash of a state's tensors, of what is done to it, and of the identity."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps(self.identity, sort_keys=True).encode() + repr(what).encode())
        for name, t in sorted(tensors.items()):
            digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
            digest.update(t.detach().cpu().contiguous().flatten().view(uint8).numpy().data)
        return digest.hexdigest()

    def get_training(self, key: str) -> CachedTraining | None:
        """The product under that key; None if there is none, or none that can be read."""
        try:
            with safe_open(self._path_of(key), framework="pt") as file:
                facts = from_json((file.metadata() or {})["product"])
                names = list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
            digest = facts.pop("digest", None)  # one of an older version has none
            if digest not in (None, self.content_key(tensors, key, facts)):
                return None
            return CachedTraining(tensors, facts["facts"], Cost(**facts["cost"]), facts["records"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None  # it is made again, and put in its place

    def put_training(self, key: str, product: CachedTraining) -> None:
        """Keep a product for other runs."""
        facts = {"facts": product.facts, "cost": asdict(product.cost), "records": product.records}
        facts = json.loads(json.dumps(facts))  # as they come back, for the digest
        tensors = {name: t.detach().cpu().contiguous() for name, t in product.tensors.items()}
        facts["digest"] = self.content_key(tensors, key, facts)
        with atomic_write(self._path_of(key)) as temporary:
            save_file(tensors, temporary, metadata={"product": json.dumps(facts)})

    def _path_of(self, key: str) -> Path:
        return Path(str(self.folder)) / f"{key}.safetensors"
