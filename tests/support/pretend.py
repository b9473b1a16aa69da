"""A GPU that is not there: what mixes tensors of two devices fails on it, on any machine.

Tensors stay in the CPU's memory and are computed there. Those that were moved to ``cuda``, or come from such tensors,
say that they are on ``cuda:0``, and do not mix with others, as on a real one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CUDA, CPU, _META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
_GET_DEVICE, _GET_IS_CUDA, _GET_IS_CPU = (getattr(Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu"))
_MAY_MIX = {
    torch._has_compatible_shallow_copy_type,
    Tensor.copy_,
    Tensor.__setitem__,
    Tensor.data.__set__,
    Tensor.type_as,
    Tensor.to,
    torch.equal,
    Tensor.equal,
}
_INDEXED = {Tensor.__getitem__, Tensor.index_put_}


class PretendedGpu(TorchFunctionMode):
    """While it is active there is a device ``cuda:0``; tensors on it are told by their storage."""

    def __init__(self) -> None:
        super().__init__()
        self._there: dict[int, weakref.ref[Any]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == _GET_DEVICE:
            return CUDA if self.holds(args[0]) else func(*args)
        if func == _GET_IS_CUDA:
            return self.holds(args[0])
        if func == _GET_IS_CPU:
            return not self.holds(args[0]) and func(*args)
        if func is Tensor.get_device:
            return 0 if self.holds(args[0]) else -1
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, args, kwargs)
        if func is Tensor.numpy and self.holds(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.register_hook and self.holds(args[0]):
            return func(args[0], lambda gradient: self._hooked(args[1], gradient))
        asked = _device(kwargs.get("device"))
        if asked == _META:
            return func(*args, **kwargs)
        self._check(func, args, kwargs)
        if asked == CUDA:
            kwargs["device"] = CPU
            if kwargs.get("generator") is not None:
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        there = asked == CUDA or (asked is None and any(map(self.holds, _tensors((args, kwargs)))))
        result = func(*args, **kwargs)
        if there:
            self._put(result)
        return result

    def holds(self, value: Any) -> bool:
        """Whether a tensor is on the pretended GPU."""
        key = _key(value)
        return key is not None and key in self._there

    def _put(self, values: Any) -> None:
        for tensor in _tensors(values):
            if (key := _key(tensor)) is not None and key not in self._there:
                storage = tensor.untyped_storage()
                self._there[key] = weakref.ref(storage, lambda _, key=key: self._there.pop(key, None))

    def _hooked(self, hook: Callable[[Tensor], Any], gradient: Tensor) -> Any:
        """Call a hook of a tensor's gradient, which autograd has made and which it calls by itself."""
        with self:
            self._put(gradient)
            return hook(gradient)

    def _moved(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the tensor of ``to``, ``cpu`` or ``cuda``: a copy where it changes its device."""
        tensor, there = args[0], self.holds(args[0])
        asked = {Tensor.cpu: CPU, Tensor.cuda: CUDA}.get(func, _device(kwargs.get("device")))
        options = {name: value for name, value in kwargs.items() if name in ("dtype", "memory_format", "copy")}
        for value in [*args[1:], kwargs.get("other")] if func is Tensor.to else ():
            if isinstance(value, (str, torch.device)):
                asked = _device(value)
            elif isinstance(value, torch.dtype):
                options["dtype"] = value
            elif isinstance(value, Tensor):
                asked, options["dtype"] = CUDA if self.holds(value) else CPU, value.dtype
        if asked == _META:
            return tensor.to(_META, **options)
        result = Tensor.to(tensor, **options) if options else tensor
        goes = there if asked is None else asked == CUDA
        if goes != there and _key(result) == _key(tensor):
            result = result.clone()
        if goes:
            self._put(result)
        return result

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise the error that a GPU's kernels raise where tensors of two devices meet; numbers may be anywhere."""
        if func in _MAY_MIX:
            return
        if func in _INDEXED and self.holds(args[0]):
            return
        found = {self.holds(t) for t in _tensors((args, kwargs)) if t.dim()}
        if len(found) > 1:
            name = getattr(func, "__name__", func)
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu")


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _key(value: Any) -> int | None:
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        return None
    return int(value.untyped_storage()._cdata)


def _device(value: Any) -> torch.device | None:
    if value is None:
        return None
    return {"cuda": CUDA, "meta": _META}.get(torch.device(value).type, CPU)
