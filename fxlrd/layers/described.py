"""Factors that answer for their layer's weight, where other code asks for its dtype, device or shape.

Code such as ``x.to(self.wo.weight.dtype)`` (T5, ViT, CLIP) reads nothing of the weight but what describes it. A layer's
factors in an nn.Sequential have no ``weight``; in a `DescribedFactors` they have a description in its place, made when
it is asked for: dtype and device are those that the factors have by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    """The factors of a layer, and a description in the place of each parameter of the layer.

    Attributes:
        described: the shapes of these parameters, by name; None for one that the layer does not have.

    >>> factors = DescribedFactors(nn.Linear(4, 2, bias=False), nn.Linear(2, 8))
    >>> factors.described = {"weight": (8, 4)}
    >>> factors.half().weight
    Description([8, 4], torch.float16, cpu)
    """

    described: Mapping[str, tuple[int, ...] | None] = {}

    def __getattr__(self, name: str) -> Any:
        """Return the description of a parameter of the layer, or an attribute of every module."""
        if name not in self.described:
            return super().__getattr__(name)
        shape = self.described[name]
        if shape is None:
            return None
        like = next(chain(self.parameters(), self.buffers()))
        tensor = torch.empty((), dtype=like.dtype, device=like.device).expand(shape)
        return tensor.as_subclass(Description) if type(tensor) is Tensor else tensor  # a fake one, for torch.export
