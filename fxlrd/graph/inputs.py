"""A model's inputs as positional and keyword arguments."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
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

    def describe(self) -> str:
        """Return the tensors' dtypes, shapes and devices in words."""
        tensors = [t for t in tree_flatten((self.args, self.kwargs))[0] if isinstance(t, Tensor)]
        return ", ".join(f"{str(t.dtype)[6:]}{list(t.shape)} on {t.device}" for t in tensors) or "no tensor"


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in an output of any structure, in order; also those in dataclasses, which are no pytrees."""
    found: list[Tensor] = []
    for leaf in tree_flatten(value)[0]:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
    return found
