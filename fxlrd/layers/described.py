"""Factors that answer for their layer's weight, where other code asks for its dtype, device or shape.

Code such as ``x.to(self.wo.weight.dtype)`` (T5, ViT, CLIP) reads nothing of the weight but what describes it. A layer's
factors in an nn.Sequential have no ``weight``; in a `DescribedFactors` they have a description in its place, made when
it is asked for: dtype and device are those that the factors have by then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fxlrd.errors import FxlrdError

_GETTERS = ("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta")
_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "is_signed")
_DESCRIBING = {
    *(getattr(Tensor, name).__get__ for name in _GETTERS),
    *(getattr(Tensor, name).__get__ for name in ("is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes")),
    *(getattr(Tensor, name) for name in (*_METHODS, "element_size", "get_device", "__len__")),
    *(torch.is_floating_point, torch.is_complex, torch.is_signed, torch.numel),
}
_MAKING = {
    *(getattr(Tensor, name) for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")),
    *(getattr(torch, f"{name}_like") for name in ("empty", "zeros", "ones", "full", "rand", "randn")),
}
"""Functions that make a tensor like their first argument."""
_CONVERTING = (Tensor.to, Tensor.type_as)
"""Functions that convert their first argument into what the second is."""


def only_describes(function: Callable[..., Any], arguments: Sequence[Any], tensor: Tensor) -> bool:
    """Whether a torch function reads nothing of ``tensor``, one of its arguments, but dtype, device, shape and such.

    >>> weight = torch.ones(2, 3)
    >>> only_describes(Tensor.size, (weight,), weight), only_describes(Tensor.sum, (weight,), weight)
    (True, False)
    """
    if function in _CONVERTING:
        return bool(arguments) and arguments[0] is not tensor
    return function in _DESCRIBING or function in _MAKING


class Description(Tensor):
    """Stands in the place of a weight: it has dtype, device and shape, and no values."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer what describes the weight. Raises FxlrdError for what would need its values."""
        kwargs = kwargs or {}
        own = [v for v in (*args, *kwargs.values()) if isinstance(v, cls)]
        if not all(only_describes(func, args, tensor) for tensor in own):
            raise FxlrdError(
                "the layer is decomposed: it has factors and no weight of its own, of which only dtype, device and "
                "shape can be read; compress with skip= and the layer's name to keep its weight"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return what it describes, in words."""
        with torch._C.DisableTorchFunctionSubclass():
            return f"Description({list(self.shape)}, {self.dtype}, {self.device})"


class DescribedFactors(nn.Sequential):
    """The factors of a layer; its parameters, by the names that they had in the layer, are descriptions.

    >>> factors = DescribedFactors(nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 8)), nn.Linear(4, 8))
    >>> factors.half().weight
    Description([8, 4], torch.float16, cpu)
    """

    def __init__(self, factors: nn.Sequential, layer: nn.Module) -> None:
        super().__init__(OrderedDict(factors.named_children()))
        self.training = factors.training
        own = layer._parameters.items()
        self.described = {name: None if p is None else tuple(p.shape) for name, p in own if name not in self._modules}

    def __getattr__(self, name: str) -> Any:
        """Return the description of a parameter of the layer, None for one that it did not have, or a module's own."""
        described: dict[str, tuple[int, ...] | None] = self.__dict__.get("described", {})
        if name not in described:
            return super().__getattr__(name)
        shape = described[name]
        if shape is None:
            return None
        like = next(_tensors(self))
        tensor = torch.empty((), dtype=like.dtype, device=like.device).expand(shape)
        return tensor.as_subclass(Description) if type(tensor) is Tensor else tensor  # not so while it is exported


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
