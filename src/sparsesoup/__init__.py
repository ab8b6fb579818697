"""sparsesoup: lottery-ticket-quality sparse subnetworks of pre-trained transformers.

>>> from sparsesoup import prune
>>> run = prune("isp", model="minilm", dataset="docstrings", sparsity=0.9, steps=200)  # doctest: +SKIP
>>> run.report["validation"], run.path / "model"  # doctest: +SKIP
"""

from typing import Any

__all__ = [
    "SparsityCallback",
    "export",
    "from_open_clip",
    "hold_zeros",
    "load_compact",
    "load_packed",
    "load_semi_structured",
    "measure",
    "prune",
    "push",
    "score_on_test",
]


def __getattr__(name: str) -> Any:
    # transformers takes a second to import, which `import sparsesoup.core.masks` should not pay.
    if name in ("export", "measure", "prune", "push", "score_on_test"):
        import sparsesoup.api

        return getattr(sparsesoup.api, name)
    if name in ("load_compact", "load_packed", "load_semi_structured"):
        import sparsesoup.exports

        return getattr(sparsesoup.exports, name)
    if name == "from_open_clip":
        from sparsesoup.hub.models.open_clip import from_open_clip

        return from_open_clip
    if name == "SparsityCallback":
        from sparsesoup.hub.models.callback import SparsityCallback

        return SparsityCallback
    if name == "hold_zeros":
        from sparsesoup.training.zero_hooks import hold_zeros

        return hold_zeros
    raise AttributeError(f"module 'sparsesoup' has no attribute {name!r}")
