"""Attention maps of a model, computed beside its own attention, which may be fused and return none."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsesoup.core.targets import Targets, block_of

Maps = Callable[[Tensor | None], list[Tensor]]


@dataclass(frozen=True)
class AttentionLayer:
    """The first attention of a block: names of its query and key modules, and the width of a head."""

    query: str
    key: str
    head: int


def attention_layers(targets: Targets) -> dict[str, AttentionLayer]:
    """Return the attention of each block that has separate query and key matrices of a known head width, by block.

    >>> from sparsesoup.core.targets import Target
    >>> attention_layers({f"layer.0.{role}.weight": Target(role, (8, 8), head=4) for role in ("query", "key")})
    {'layer.0': AttentionLayer(query='layer.0.query', key='layer.0.key', head=4)}
    """
    found: dict[str, dict[str, tuple[str, int]]] = {}
    for name, target in targets.items():
        if target.role in ("query", "key") and target.head and block_of(name):
            found.setdefault(block_of(name), {}).setdefault(target.role, (name.rpartition(".")[0], target.head))
    return {
        block: AttentionLayer(sides["query"][0], sides["key"][0], sides["query"][1])
        for block, sides in found.items()
        if len(sides) == 2 and sides["query"][1] == sides["key"][1]
    }


@contextmanager
def attention_maps_of(owners: Mapping[str, nn.Module], layers: Mapping[str, AttentionLayer]) -> Iterator[Maps]:
    """Yield a function that returns the attention maps of these layers, after the model has run inside the block.

    A map is softmax(Q K^T / sqrt(head width)) of the outputs of the query and key modules, [rows, heads, tokens,
    tokens], without dropout: the model's own in BERT, ViT and their relatives. Rotary and relative positions, and
    causal masks, are not in it. The function takes the mask of real tokens, [rows, tokens], or None.

    Args:
        owners: the model of each block.
        layers: its attention, see `attention_layers`.
    """
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.__setitem__(name, output)

    handles = [
        owners[block].get_submodule(name).register_forward_hook(remember(name))
        for block, layer in layers.items()
        for name in (layer.query, layer.key)
    ]
    try:
        yield lambda mask: [_attention_map(seen[a.query], seen[a.key], a.head, mask) for a in layers.values()]
    finally:
        for handle in handles:
            handle.remove()


def attention_distance(given: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared error of attention maps over rows, heads and pairs of real tokens."""
    squares = (given - wanted).square()
    if mask is None or mask.shape != squares.shape[::3]:
        return squares.mean()
    real = mask.to(squares.dtype)
    pairs = real[:, None, :, None] * real[:, None, None, :]
    return ((squares * pairs).sum((1, 2, 3)) / (squares.shape[1] * real.sum(-1).square())).mean()


def _attention_map(query: Tensor, key: Tensor, head: int, mask: Tensor | None) -> Tensor:
    """Return the map of [rows, tokens, width] queries and keys; fewer heads of keys are shared by those of queries."""
    queries, keys = (t.unflatten(-1, (-1, head)).transpose(-2, -3) for t in (query, key))
    if queries.shape[-3] != keys.shape[-3]:
        keys = keys.repeat_interleave(queries.shape[-3] // keys.shape[-3], -3)
    scores = queries @ keys.mT / head**0.5
    scores = scores.float() if scores.dtype.itemsize < 4 else scores
    if mask is not None and mask.shape == scores.shape[::3]:
        scores = scores.masked_fill(mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)
