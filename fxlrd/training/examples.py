"""The examples of a batch, and the share of them that each of the processes that train together takes.

What is divided is examples, not entries: rows of tensors, and elements of lists with one for each image, such as a
detector's targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fxlrd.errors import FxlrdError


class Part(NamedTuple):
    """One process's examples of a batch, their weight in the mean over processes, and the size of the full batch."""

    inputs: tuple[Any, ...]
    target: Any
    weight: float
    size: int


def share(batch: Any, rank: int, world: int, device: torch.device) -> Part:
    """Return this process's part of a batch.

    A process without examples gets one of weight 0, since the others wait for its gradients.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise FxlrdError("finetune: the loader gives no (inputs, target) pairs")
    inputs, target = batch
    inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    count = _examples(inputs)
    low, high = count * rank // world, count * (rank + 1) // world
    if world > 1:
        part = slice(low, high) if high > low else slice(0, 1)
        inputs, target = (_rows(value, part, count) for value in (inputs, target))
    inputs, target = tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, (inputs, target))
    return Part(inputs, target, (high - low) * world / count, count)


def _examples(inputs: tuple[Any, ...]) -> int:
    """Return the number of examples in a batch: that of the first argument, a tensor, a list or a dict of tensors."""
    first = inputs[0] if inputs else ()
    value = next(iter(first.values()), ()) if isinstance(first, Mapping) else first
    if not isinstance(value, (Tensor, list, tuple)) or not len(value):
        raise FxlrdError("finetune: the number of examples is not known: the first input is no batch of tensors")
    return len(value)


def _rows(value: Any, part: slice, count: int) -> Any:
    """Return some examples of a batch: rows of tensors, and elements of lists with one for each example."""
    if isinstance(value, Tensor):
        return value[part] if _is_batch(value, count) else value
    if isinstance(value, Mapping):
        return {name: _rows(each, part, count) for name, each in value.items()}
    if isinstance(value, list) and len(value) == count and not all(_is_batch(each, count) for each in value):
        return value[part]
    if isinstance(value, (list, tuple)):
        return [_rows(each, part, count) for each in value]
    return value


def _is_batch(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == count
