"""Tensors of a device that is not here: their numbers are on the CPU, and an operation of both kinds is refused."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

AWAY = torch.device("meta")  # what the tensors say that they are on
COPIES = ("_to_copy", "copy_")  # go from device to device
LISTS = ("stack", "cat")  # take no number of the CPU either, as other operations do
BY_INDEX = ("index", "index_put", "index_put_")  # take indices of the CPU
READS = ("_local_scalar_dense", "equal", "item", "is_nonzero")


class AwayTensor(Tensor):
    """A tensor of the other device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: Any, inner: Tensor) -> "AwayTensor":
        made: AwayTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device=AWAY,
            storage_offset=inner.storage_offset(),
        )
        made.inner = inner.detach()
        return made

    @property  # type: ignore[override]
    def data(self) -> "AwayTensor":
        return AwayTensor(self.inner)

    @data.setter
    def data(self, other: "AwayTensor") -> None:
        self.inner = other.inner

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("a tensor of another device has no array")

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"away {self.inner!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carry_out(func, args, kwargs or {})


class _Made(TorchFunctionMode):
    """torch.tensor and torch.as_tensor, which reach no dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == AWAY:
            return AwayTensor(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


class OtherDevice(TorchDispatchMode):
    """Make tensors that are asked for on the other device within the block."""

    def __init__(self) -> None:
        super().__init__()
        self._made = _Made()

    def __enter__(self) -> "OtherDevice":
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        self._made.__exit__(*problem)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carry_out(func, args, kwargs or {})


def _carry_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    away, asked = [t for t in tensors if isinstance(t, AwayTensor)], kwargs.get("device")
    name = func.overloadpacket.__name__
    if not away and (asked is None or torch.device(asked) != AWAY):
        return func(*args, **kwargs)
    _refuse_mixed(name, args, tensors)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    plain = lambda t: t.inner if isinstance(t, AwayTensor) else t  # noqa: E731
    found = func(*tree_map(plain, args), **tree_map(plain, kwargs))
    here = asked is not None and torch.device(asked) != AWAY
    if name == "copy_" or func._schema.is_mutable:
        here = not isinstance(args[0], AwayTensor) if isinstance(args[0], Tensor) else False
    if here or name in READS:
        return args[0] if name == "copy_" else found
    wrapped = tree_map(lambda t: AwayTensor(t) if type(t) is Tensor else t, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if away else wrapped


def _refuse_mixed(name: str, args: Any, tensors: list[Tensor]) -> None:
    """Raise a RuntimeError if an operation takes tensors of both devices, as on a GPU."""
    if name in COPIES or (name in BY_INDEX and isinstance(args[0], AwayTensor)):
        return
    strangers = [t for t in tensors if not isinstance(t, AwayTensor) and (t.dim() or name in LISTS)]
    if strangers and any(isinstance(t, AwayTensor) for t in tensors):
        raise RuntimeError(f"{name} takes tensors of two devices, of shapes {[tuple(t.shape) for t in tensors]}")


class AwayAccelerator:
    """What a problem needs of accelerate, for a model on the other device."""

    device, mixed_precision, num_processes = AWAY, "no", 1

    def prepare_model(self, model: nn.Module, evaluation_mode: bool = False) -> nn.Module:
        """Move a model; its parameters stay the same objects."""
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None and not isinstance(parameter, AwayTensor):
                    moved = nn.Parameter(AwayTensor(parameter.detach().clone()), parameter.requires_grad)
                    torch.utils.swap_tensors(parameter, moved)
            for name, buffer in module._buffers.items():
                if buffer is not None and not isinstance(buffer, AwayTensor):
                    module._buffers[name] = AwayTensor(buffer.detach().clone())
        return model

    def clip_grad_norm_(self, parameters: Any, most: float) -> Tensor:
        """Clip gradients."""
        return nn.utils.clip_grad_norm_(parameters, most, foreach=False)


@contextmanager
def other_device(patch: Any) -> Iterator[None]:
    """Run problems on the other device within the block."""
    patch.setattr("sparsesoup.training.problem.make_accelerator", lambda training: AwayAccelerator())
    plain = torch.autocast  # which does not know the other device
    patch.setattr(torch, "autocast", lambda kind, **more: nullcontext() if kind == AWAY.type else plain(kind, **more))
    with OtherDevice():
        yield
