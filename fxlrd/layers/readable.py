"""Factors that compose their layer's weight for code that reads it, and let it be scaled by rows.

Code that folds a BatchNorm into the conv before it (YOLO's fuse, torch.nn.utils.fuse_conv_bn_eval) reads the conv's
``weight`` and ``bias`` and sets both:

    W' = diag(s)·W,  b' = s·(b − mean) + shift

Factors of W become those of W' if the rows of the last one are scaled by s, which is exact. The bias of the last factor
is the layer's. Any other write would undo the compression or be lost: it raises an error that says what to do first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxlrd.errors import FxlrdError
from fxlrd.layers.described import DescribedFactors
from fxlrd.layers.kinds import LAYERS, OPTIONS, TRANSPOSED, as_layer, channels_per_group
from fxlrd.layers.weights import as_blocks, from_blocks, weight_blocks

_REMEDY = "call what writes weights (a merge of adapters, an initialisation) first, and then fxlrd.compress"
_ROUNDING = 16
"""Rounding errors, in units of the dtype's epsilon, that a product of a weight and a row's scale may have."""


class ComposedWeight(Tensor):
    """The product of a layer's factors, as it was when it was asked for. It can be read, and not written."""

    refusal = f"the weight of a decomposed layer is composed from its factors and read-only: {_REMEDY}"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Return what a plain tensor would. Raises FxlrdError for a write, which would be lost."""
        own = [v for v in tree_leaves((args, kwargs)) if isinstance(v, ComposedWeight)]
        with torch._C.DisableTorchFunctionSubclass():
            versions = [tensor._version for tensor in own]
            if func is not Tensor.requires_grad_ and getattr(func, "__name__", "") != "__set__":
                result = func(*args, **(kwargs or {}))
                if versions == [tensor._version for tensor in own]:
                    return _read_only(result, own)
        raise FxlrdError(own[0].refusal)


def _read_only(result: Any, weights: Sequence[Tensor]) -> Any:
    """Return the result of a function of composed weights so that a write to what it shares with them raises."""
    if isinstance(result, numpy.ndarray):
        result.setflags(write=False)
    if isinstance(result, (list, tuple)) and type(result) in (list, tuple):
        return type(result)(_read_only(value, weights) for value in result)
    if type(result) is Tensor and (shared := next((w for w in weights if _same_memory(result, w)), None)) is not None:
        return result.as_subclass(type(shared))
    return result


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.layout == b.layout == torch.strided and a.untyped_storage()._cdata == b.untyped_storage()._cdata


class ReadableFactors(nn.Sequential):
    """The factors of a layer, with a ``weight`` composed when it is read, and the ``bias`` of the last.

    Copies are of this class; pickles hold a plain nn.Sequential, which needs no fxlrd.

    Attributes:
        weight_shape: that of the layer's weight; None if its weight is not that of a stock layer.

    >>> factors = ReadableFactors(nn.Linear(4, 2, bias=False), nn.Linear(2, 8))
    >>> factors.weight_shape = (8, 4)
    >>> torch.allclose(factors.weight, factors[1].weight @ factors[0].weight), factors.bias is factors[1].bias
    (True, True)
    """

    weight_shape = None  # type: tuple[int, ...] | None  # torch.jit.script reads annotations, and has no such type

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of every module, or weight or bias of the layer.

        Raises AttributeError with the remedy where factors do not compose to a weight.
        """
        if name == "bias" and self.weight_shape is not None and isinstance(self[-1], LAYERS):
            return as_layer(self[-1]).bias
        if name != "weight":
            return super().__getattr__(name)
        weight = self._composed()
        if weight is None:
            parts = ", ".join(self._modules)
            raise AttributeError(f"a decomposed layer has no weight but its factors {parts}: {_REMEDY}")
        return weight.as_subclass(ComposedWeight) if type(weight) is Tensor else weight  # a fake one, for torch.export

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the bias in the last factor; a weight if it is the present one scaled by rows."""
        if name == "bias":
            self[-1].bias = value
        elif name == "weight":
            self._scale_to(value)
        else:
            super().__setattr__(name, value)

    def _composed(self) -> Tensor | None:
        return None if self.weight_shape is None else composed_weight(list(self), _groups(self), self.weight_shape)

    def _rows(self, weight: Tensor) -> Tensor:
        """Return a weight of the layer with a row for each output channel."""
        transposed = any(isinstance(part, TRANSPOSED) for part in self)
        return as_blocks(weight.detach(), _groups(self), transposed).flatten(0, 1).flatten(1)

    def _scale_to(self, weight: Any) -> None:
        now = self._composed()
        scale = None
        if now is not None and isinstance(weight, Tensor) and _alike(weight, now):
            scale = row_scale(self._rows(weight), self._rows(now))
        if scale is None:
            raise FxlrdError(
                "the weight of a decomposed layer was set to what is not its rows, scaled, as a BatchNorm that is "
                f"folded into it leaves them: {_REMEDY}"
            )
        last = as_layer(self[-1])
        blocks = weight_blocks(last)
        by_row = scale.view(*blocks.shape[:2], *[1] * (blocks.dim() - 2))
        new = from_blocks(last, (blocks.double() * by_row).to(blocks.dtype))
        with torch.no_grad():
            last.weight = nn.Parameter(torch.empty_like(last.weight).copy_(new), weight.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReadableFactors:
        """Return a copy of this class: pickling would make a plain nn.Sequential of it."""
        new = memo[id(self)] = object.__new__(type(self))
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def __copy__(self) -> ReadableFactors:
        """Return a shallow copy of this class."""
        new = object.__new__(type(self))
        vars(new).update({k: copy.copy(v) if k.startswith("_") else v for k, v in vars(self).items()})
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return what pickles as a plain nn.Sequential."""
        state = {name: value for name, value in vars(self).items() if name != "weight_shape"}
        return nn.Sequential, (), state


def _groups(factors: nn.Module) -> int:
    """Return the groups of the layer: an option of a conv, which it leaves on its factors."""
    return int(vars(factors).get("groups", 1))


def is_container(module: nn.Module) -> bool:
    """Whether the module is of a class that holds factors, and does nothing but call them in order."""
    return type(module) in (nn.Sequential, DescribedFactors, ReadableFactors)


def weight_shape_of(layer: nn.Module) -> tuple[int, ...] | None:
    """Return the shape of a layer's weight if factors compose to it: that of a stock layer, or of such factors."""
    if isinstance(layer, ReadableFactors):
        return layer.weight_shape
    return tuple(as_layer(layer).weight.shape) if type(layer) in OPTIONS and isinstance(layer, LAYERS) else None


def composed_weight(parts: Sequence[nn.Module], groups: int, shape: tuple[int, ...]) -> Tensor | None:
    """Return the weight of the stock layer that computes what ``parts`` do one after another, or None.

    ``shape`` and ``groups`` are those of the layer. It is differentiable with respect to the weights of the parts.
    Computed in float64, which Apple's GPUs lack, so that neither TF32 nor autocast rounds it.
    """
    if not all(type(part) in OPTIONS and isinstance(part, LAYERS) for part in parts):
        return None
    if any(as_layer(part).bias is not None for part in parts[:-1]):
        return None
    product: Tensor | None = None
    for part in parts:
        dense = _dense(part)
        product = dense if product is None else _product(dense, product)
        if product is None:
            return None
    if product is None or product.shape[0] % groups or product.shape[1] % groups:
        return None
    blocks = torch.einsum("gsgc...->gsc...", product.unflatten(1, (groups, -1)).unflatten(0, (groups, -1)))
    ordered = blocks.transpose(1, 2) if any(isinstance(part, TRANSPOSED) for part in parts) else blocks
    if ordered.numel() != math.prod(shape):
        return None
    return ordered.flatten(0, 1).reshape(shape).to(as_layer(parts[-1]).weight.dtype)


def _dense(part: nn.Module) -> Tensor:
    """Return the weight of a layer as (S, C, k…), with zeros between its groups."""
    groups = channels_per_group(part)[2]
    weight = as_layer(part).weight
    blocks = as_blocks(weight if weight.device.type == "mps" else weight.double(), groups, isinstance(part, TRANSPOSED))
    if groups == 1:
        return blocks[0]
    eye = torch.eye(groups, dtype=blocks.dtype, device=blocks.device)
    return torch.einsum("gh,gsc...->gshc...", eye, blocks).flatten(0, 1).flatten(1, 2)


def _product(second: Tensor, first: Tensor) -> Tensor | None:
    """Return the kernel of two layers in a row, of which one at most has a kernel of more than one position."""
    if second.shape[1] != first.shape[0]:
        return None
    if math.prod(second.shape[2:]) == 1:
        return torch.einsum("sr,rc...->sc...", second.flatten(1), first)
    return torch.einsum("sr...,rc->sc...", second, first.flatten(1)) if math.prod(first.shape[2:]) == 1 else None


def row_scale(new: Tensor, old: Tensor) -> Tensor | None:
    """Return s (S, float64) with new = diag(s)·old up to rounding, for matrices (S, n); None if there is none.

    >>> row_scale(torch.tensor([[2.0, 4.0], [0.0, 0.0]]), torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    tensor([2., 1.], dtype=torch.float64)
    """
    limits = torch.finfo(new.dtype)
    a, b = old.double(), new.double()
    squared = a.square().sum(1)
    scale = torch.where(squared > 0, (a * b).sum(1) / squared.where(squared > 0, torch.ones_like(squared)), 1.0)
    expected = scale[:, None] * a
    allowed = _ROUNDING * limits.eps * expected.abs() + limits.smallest_normal
    return scale if bool(((b - expected).abs() <= allowed).all()) else None


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and a.is_floating_point()
