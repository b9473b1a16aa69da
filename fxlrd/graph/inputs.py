"""A model's inputs as positional and keyword arguments, and the tensors in values of any structure."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from fxlrd.errors import FxlrdError


@dataclass(frozen=True)
class Inputs:
    """Example inputs as positional and keyword arguments of the model's forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example_inputs: Any) -> Inputs:
        """Read a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments."""
        if isinstance(example_inputs, Inputs):
            return example_inputs
        if isinstance(example_inputs, Mapping):
            return cls((), dict(example_inputs))
        if isinstance(example_inputs, (tuple, list)):
            return cls(tuple(example_inputs))
        if isinstance(example_inputs, Tensor):
            return cls((example_inputs,))
        raise FxlrdError(
            f"example inputs: a {type(example_inputs).__name__} is not a tensor, a tuple of positional arguments "
            "or a dict of keyword arguments"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Inputs:
        return self

    def fresh(self) -> Inputs:
        """Return a copy with tensors, and caches, of its own, for a forward that may write into them."""
        args, kwargs = tree_map(
            lambda v: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v), (self.args, self.kwargs)
        )
        return Inputs(args, kwargs)

    def varied(self, generator: torch.Generator) -> Inputs:
        """Return other inputs of the same form: floating-point values drawn anew, integers permuted.

        Values are drawn from a normal distribution with the mean, the deviation and the range of those in the tensor.
        Masks stay as they are: bool tensors, and tensors with infinite values.
        """
        args, kwargs = map_tensors(lambda t: _varied(t, generator), (self.args, self.kwargs))
        return Inputs(args, kwargs)

    def first_rows(self, count: int = 1) -> Inputs | None:
        """Return the inputs with the first rows only of every tensor; None where these have no number in common."""
        sizes = {len(t) if t.dim() else 0 for t in tensors((self.args, self.kwargs))}
        if len(sizes) != 1 or max(sizes) <= count:
            return None
        args, kwargs = map_tensors(lambda t: t[:count], (self.args, self.kwargs))
        return Inputs(args, kwargs)

    def enlarged(self, times: int = 1, more: int = 0) -> Inputs | None:
        """Return the inputs with the rows of every tensor several times, and a few more; None as `first_rows`."""
        sizes = {len(t) if t.dim() else 0 for t in tensors((self.args, self.kwargs))}
        if len(sizes) != 1 or not max(sizes):
            return None
        rows = torch.arange(times * max(sizes) + more) % max(sizes)
        args, kwargs = map_tensors(lambda t: t[rows], (self.args, self.kwargs))
        return Inputs(args, kwargs)

    def describe(self) -> str:
        """Return the tensors' dtypes, shapes and devices in words."""
        found = tensors((self.args, self.kwargs))
        return ", ".join(f"{str(t.dtype)[6:]}{list(t.shape)} on {t.device}" for t in found) or "no tensor"


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a value of any structure, in order.

    Structures are those of torch's pytrees, mappings and dataclasses; if there are no tensors in those, also the
    attributes of objects.

    >>> [t.item() for t in tensors({"a": torch.tensor(1), "b": [torch.tensor(2), None]})]
    [1, 2]
    """
    return list(_tensors(value, _fields, {})) or list(_tensors(value, _attributes, {}))


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return the value with ``change`` applied to each tensor in it; structures as in `tensors`, without objects."""

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if (parts := _fields(leaf)) is None:
            return leaf
        new = copy.copy(leaf)
        for name, part in parts.items():
            if isinstance(leaf, Mapping):
                new[name] = map_tensors(change, part)
            else:
                object.__setattr__(new, name, map_tensors(change, part))
        return new

    return tree_map(changed, value)


def _tensors(
    value: Any, parts_of: Callable[[Any], Mapping[str, Any] | None], visited: dict[int, Any]
) -> Iterator[Tensor]:
    for leaf in tree_flatten(value)[0]:
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in visited and (parts := parts_of(leaf)) is not None:
            visited[id(leaf)] = leaf
            for part in parts.values():
                yield from _tensors(part, parts_of, visited)


def _fields(value: Any) -> Mapping[str, Any] | None:
    """Return what a mapping or a dataclass that is no pytree holds, by name; None for any other value."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    return None


def _attributes(value: Any) -> Mapping[str, Any] | None:
    if isinstance(value, (nn.Module, type)) or callable(value):
        return None
    parts = _fields(value)
    return parts if parts is not None else getattr(value, "__dict__", None)


def _varied(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if (
        tensor.is_meta
        or tensor.layout is not torch.strided
        or tensor.is_quantized
        or tensor.dtype is torch.bool
        or tensor.numel() < 2
    ):
        return tensor
    values = tensor.detach().cpu()
    if not (values.is_floating_point() or values.is_complex()):
        order = torch.randperm(values.numel(), generator=generator)
        return _like(tensor, values.flatten()[order].reshape(values.shape))
    if values.is_complex():
        return _like(
            tensor, torch.complex(_drawn(values.real.double(), generator), _drawn(values.imag.double(), generator))
        )
    return _like(tensor, _drawn(values.double(), generator))


def _drawn(values: Tensor, generator: torch.Generator) -> Tensor:
    if not bool(values.isfinite().all()):
        return values
    drawn = torch.randn(values.shape, dtype=torch.float64, generator=generator)
    low, high = values.aminmax()
    if low == high:
        return values + drawn * (low.abs() if low != 0 else 1)
    return (values.mean() + values.std() * drawn).clamp(low, high)


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(tensor).detach().copy_(values)
