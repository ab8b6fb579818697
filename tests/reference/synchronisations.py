"""Count how often the host waits for numbers of a device, on any device."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
READS = (Tensor.tolist, Tensor.cpu, Tensor.numpy)  # these reach no dispatcher if the tensor is on the CPU


class _Reads(TorchFunctionMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in READS:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Synchronisations(TorchDispatchMode):
    """Count item, nonzero, boolean index, tolist and copies to the host within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._reads = _Reads(self.names)

    @property
    def count(self) -> int:
        return len(self.names)

    def __enter__(self) -> "Synchronisations":
        self._reads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        self._reads.__exit__(*problem)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        boolean = any(i is not None and i.dtype == torch.bool for i in indices)
        if boolean or name in WAITS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
