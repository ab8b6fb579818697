"""Match the rows of a fine-tuned head to the data's labels by name."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsesoup.core.errors import UserError
from sparsesoup.hub.models.weights import output_layer_weights, randomly_drawn_head


def order_of(own: Sequence[str], labels: Sequence[str]) -> list[int]:
    """Return for each label its row in a head: the one of the same name, or else the next remaining one.

    Args:
        own: names of the head's rows.
        labels: the data's labels, as many.

    >>> order_of(["neutral", "Positive", "negative "], ["negative", "neutral", "positive"])
    [2, 0, 1]
    >>> order_of(["a", "b", "c"], ["x", "a", "y"])
    [1, 0, 2]
    """
    rows, wanted = _comparable_names(own), _comparable_names(labels)
    table = {key: i for i, key in enumerate(rows)}
    left = [i for i, key in enumerate(rows) if key not in wanted]
    return [table[key] if key in table else left.pop(0) for key in wanted]


def match_rows_(
    name: str, model: Any, own: Sequence[str], labels: Sequence[str], inputs: Callable[[], Mapping[str, Tensor]]
) -> str:
    """Reorder the rows of a model's head to match the data's labels.

    Args:
        name: name of the model in errors.
        model: a model with a trained head, in eval mode.
        own: the labels of its head, by row.
        labels: the labels of the data, equally many.
        inputs: returns one row, for which the outputs must be the same except for their order.
    Returns: a note on what was done, or on rows with other label names; '' if all names agree.
    Raises: UserError if the head has an unknown form.
    """
    order = order_of(own, labels)
    unlike = [i for i, key in zip(order, _comparable_names(labels), strict=True) if _comparable_names(own)[i] != key]
    if order != [*range(len(own))]:
        _reorder_rows_(name, model, order, inputs())
        how = "matched by name" if not unlike else "matched by name where a name is the same, the others in turn"
        return f"the head's rows are {', '.join(own)}; they were put in the order {', '.join(labels)}, {how}"
    if unlike:
        return f"the head's rows {', '.join(own)} are taken in this order for the labels {', '.join(labels)}"
    return ""


@torch.no_grad()
def _reorder_rows_(name: str, model: Any, order: Sequence[int], inputs: Mapping[str, Tensor]) -> None:
    before = model(**inputs).logits
    for _, t in output_layer_weights(model, randomly_drawn_head(model)):
        t.copy_(t[list(order)])
    if not torch.allclose(model(**inputs).logits, before[:, list(order)], rtol=1e-4, atol=1e-5):
        raise UserError(
            f"model {name!r} answers in another order than the data's labels, and its head is of a form that cannot be "
            f"reordered here; save it with labels in the order of the data"
        )


def _comparable_names(names: Sequence[str]) -> list[str]:
    """Return names without irrelevant differences: case, spaces, and LABEL_ before a mere number."""
    keys = [re.sub(r"^label[ _]?(?=\d+$)", "", " ".join(str(name).split()).casefold()) for name in names]
    return keys if len({*keys}) == len(keys) else [str(name) for name in names]
